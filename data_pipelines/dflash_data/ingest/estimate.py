"""What `ingest` would take, before it starts: counted in full, measured on a sample.

    dflash-train ingest recipe=smollm2 data.logs=LOGS --dry-run

Parts and bytes are counted. Records, disk and time are measured: some lines of each format, from
parts spread over the log, go through everything that a record goes through, in memory. Nothing is
written, a key that the run has not made yet is not made now, and no content is told.
"""

import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import pyarrow as pa

from dflash_data.adapters import FORMATS
from dflash_data.adapters.log_format import Line
from dflash_data.drops import Drop
from dflash_data.executor import slurm_script
from dflash_data.ingest.explode import explode
from dflash_data.ingest.on_policy import drop_reason, judge
from dflash_data.ingest.plan import IngestPlan
from dflash_data.ingest.record_arrays import index_records
from dflash_data.ingest.stage import plan_ingest
from dflash_data.ingest.steps import name_sessions, phases
from dflash_data.logs.sniffing import read_file
from dflash_data.logs.sources import LogPart, plan_parts
from dflash_data.privacy.pseudonyms import rehearsal_pseudonyms
from dflash_data.privacy.scrub import has_secret_in_answer, scrub_call
from dflash_data.privacy.text_of_ids import has_ids, hides_text
from dflash_train.config import ExecutorKind, RecipeConfig, UnavailableError
from dflash_train.records.conversation import Conversation

SAMPLED_PARTS = 4
SAMPLED_LINES = 250
"""Lines of each sampled part."""


@dataclass(kw_only=True)
class IngestEstimate:
    """What ingesting a log takes."""

    num_parts: int
    num_workers: int
    bytes_of_format: dict[str, int] = field(default_factory=dict)
    """Bytes of log by format, decompressed; estimated where files are compressed."""
    num_records: int = 0
    """Calls of the log, those included that are dropped."""
    num_usable: int = 0
    """Calls that reach the disk; repeats and near-duplicates are not known before the end."""
    temporary_bytes: int = 0
    result_bytes: int = 0
    seconds: float = 0.0
    """On one core."""
    scripts: dict[str, str] = field(default_factory=dict)
    """What `executor=slurm` would submit, by phase."""

    @property
    def disk_bytes(self) -> int:
        """The most that lies on the disk at one time."""
        return self.temporary_bytes + self.result_bytes

    def lines(self) -> list[str]:
        """Give it as lines to print."""
        formats = [f"{name} {size} bytes" for name, size in self.bytes_of_format.items()]
        lines = [
            f"log: {sum(self.bytes_of_format.values())} bytes in {self.num_parts} parts",
            f"formats: {', '.join(formats)}",
            f"records: about {self.num_records}, of which about {self.num_usable} usable",
            f"disk: about {self.result_bytes} bytes, and {self.temporary_bytes} while it runs",
            f"time: about {self.seconds / self.num_workers:.0f} s on {self.num_workers} workers",
        ]
        for phase, script in self.scripts.items():
            lines += [f"script of the phase {phase}, not submitted:", script]
        return lines


@dataclass(kw_only=True)
class _Sample:
    """What the sampled lines of one format were and took."""

    num_bytes: int = 0
    num_records: int = 0
    num_usable: int = 0
    temporary_bytes: int = 0
    result_bytes: int = 0
    seconds: float = 0.0


def estimate_ingest(
    config: RecipeConfig, logs: str, *, evaluation: dict[str, list[Conversation]]
) -> IngestEstimate:
    """Plan an ingest, and measure a sample of it in memory.

    Raises:
        ValueError: There is no log, or it is refused.
    """
    parts = plan_parts(logs, format=config.data.format)
    plan = plan_ingest(config, parts, evaluation, pseudonyms=rehearsal_pseudonyms(config))
    workers = min(len(parts), config.executor.workers or os.cpu_count() or 1)
    estimate = IngestEstimate(num_parts=len(parts), num_workers=workers)
    by_format = sorted(parts, key=lambda part: part.format)
    for name, group in groupby(by_format, key=lambda part: part.format):
        mine = list(group)
        estimate.bytes_of_format[name] = sum(part.num_bytes for part in mine)
        _add(estimate, _measure(plan, mine), estimate.bytes_of_format[name])
    if config.executor.kind is ExecutorKind.slurm:
        estimate.scripts = _scripts(plan, config)
    return estimate


def _scripts(plan: IngestPlan, config: RecipeConfig) -> dict[str, str]:
    """Give the scripts by phase; datatrove makes its folders at once, so here it makes others."""
    with tempfile.TemporaryDirectory(prefix="dflash-plan-") as elsewhere:
        scripts = {
            phase.name: slurm_script(phase, Path(elsewhere), config.executor)
            for phase in phases(plan)
        }
        return {name: script.replace(elsewhere, str(plan.work)) for name, script in scripts.items()}


def check_disk(estimate: IngestEstimate, config: RecipeConfig) -> None:
    """Raise UnavailableError unless the disk of the run folder would hold it."""
    folder = config.run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if estimate.disk_bytes > free:
        raise UnavailableError(
            f"{config.run_dir}: ingest takes about {estimate.disk_bytes} bytes, and {free} are "
            "free. Give runs_dir=DIR on another disk."
        )


def _add(estimate: IngestEstimate, sample: _Sample, num_bytes: int) -> None:
    """Let a sample stand for all bytes of its format."""
    factor = num_bytes / sample.num_bytes if sample.num_bytes else 0.0
    estimate.num_records += round(factor * sample.num_records)
    estimate.num_usable += round(factor * sample.num_usable)
    estimate.temporary_bytes += round(factor * sample.temporary_bytes)
    estimate.result_bytes += round(factor * sample.result_bytes)
    estimate.seconds += factor * sample.seconds


def _measure(plan: IngestPlan, parts: list[LogPart]) -> _Sample:
    """Take lines of one format through all that a record goes through."""
    sample = _Sample()
    started = time.perf_counter()
    records: list[Conversation] = []
    for part in parts[:: max(1, len(parts) // SAMPLED_PARTS)][:SAMPLED_PARTS]:
        records += _usable(plan, part, sample)
    records = name_sessions(explode(records).kept).kept
    rows, bands = index_records(records, plan.evaluation)
    content = b"\n".join(record.to_json() for record in records)
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(content, asbytes=True)
    # Scrubbed records lie there twice: as they were read, and by session.
    sample.temporary_bytes = 2 * len(packed) + rows.nbytes + bands.nbytes
    sample.result_bytes = len(gzip.compress(content, compresslevel=1))
    sample.num_usable = len(records)
    sample.seconds = time.perf_counter() - started
    return sample


def _usable(plan: IngestPlan, part: LogPart, sample: _Sample) -> Iterator[Conversation]:
    """Yield the scrubbed calls of the first lines of a part."""
    pseudonyms, text_of_ids = plan.rehearsal, plan.text_of_ids()
    assert pseudonyms is not None, "an estimate is made with a key at hand"
    for call in FORMATS[part.format].read(_first_lines(part, sample)):
        sample.num_records += 1
        if isinstance(call, Drop):
            continue
        judge(call, plan.data)
        if hides_text(call) and text_of_ids.reveal(call) is not None:
            continue
        came_with_ids = has_ids(call)
        by_role = scrub_call(call, pseudonyms)
        if came_with_ids:
            text_of_ids.vet(call)
        if not has_secret_in_answer(by_role) and drop_reason(call, plan.data) is None:
            yield call


def _first_lines(part: LogPart, sample: _Sample) -> Iterator[Line]:
    """Yield the first lines of a part, and count their bytes; broken ones are passed over."""
    lines = (
        line
        for piece in part.slices
        for line in read_file(
            piece.address, piece.name, piece.layout, start=piece.start, end=piece.end
        )
    )
    for line in islice(lines, SAMPLED_LINES):
        if isinstance(line, Line):
            sample.num_bytes += len(line.text) + 1
            yield line
