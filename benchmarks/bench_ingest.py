"""Ingest a mixed log of all ten formats: records per second by phase, adapters alone, memory.

    make bench-ingest
    python -m benchmarks.bench_ingest --records 1000000 [--workers 2] [--folder DIR]

The log is invented (`ingest_corpus`), outside the clock. It is ingested twice, each time by a
fresh process: a tenth of it, then all of it, whose difference in peak memory is the growth per
record. Memory is the proportional set size summed over the process and its workers, sampled.

The adapters are timed over lines read into memory, in turns with `orjson.loads` of the same
lines, by the clock of this process; nothing parsed is kept. vLLM's lines are text: there
orjson parses JSON of the same content, id lists and bodies as such. Evaluation prompts are as
many and as long as HumanEval's. Progress goes to stderr; the last line is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import orjson

from benchmarks.ingest_corpus import write_corpus
from dflash_data.adapters import FORMATS
from dflash_data.adapters.log_format import Line, LogFormat
from dflash_data.drops import Drop
from dflash_data.executor import run_phases
from dflash_data.ingest.stage import ingest, plan_ingest
from dflash_data.ingest.steps import phases
from dflash_data.logs.sniffing import read_file
from dflash_data.logs.sources import LogPart, plan_parts
from dflash_train.config import DataConfig, ExecutorConfig, RecipeConfig, TargetConfig
from dflash_train.records.conversation import Conversation, Turn
from dflash_train.records.manifest import Manifest

GOALS = {
    "records_per_s": 2500,
    "adapters_of_orjson": 0.25,
    "peak_memory_bytes": 10**9,
    "growth_bytes_per_record": 200,
}
SAMPLE_S = 0.2
"""Between two looks at the memory of the processes."""
NUM_ROUNDS = 5
NUM_JOINED = 500
"""Lines of each file of a batch, for the adapters alone."""
NUM_EVALUATION_PROMPTS = 164
SMALL_SHARE = 10
"""The small log holds one of so many records."""


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What one run over one log took."""

    records: int
    kept: int
    dropped: dict[str, int]
    phases_s: dict[str, float]
    """Wall-clock seconds of each phase, in order."""
    peak_memory_bytes: int

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(self.phases_s.values())


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One format: how fast its lines are parsed, and parsed and adapted."""

    lines: int
    calls: int
    orjson_s: float
    adapter_s: float


def main() -> None:
    """Make the logs, measure and print."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-ingest-", dir=options.folder) as name:
        folder = Path(name)
        small, whole = folder / "small", folder / "whole"
        num_small = max(1, options.records // SMALL_SHARE)
        _tell(f"writing {num_small} and {options.records} records below {folder}")
        write_corpus(small, num_small, seed=options.seed + 1)
        num_bytes = write_corpus(whole, options.records, seed=options.seed)
        _tell("adapters")
        by_format = time_adapters(plan_parts(str(whole)), options.lines)
        _tell("ingest, a tenth")
        before = _in_fresh_process(small, folder, options.workers)
        _tell("ingest, all")
        after = _in_fresh_process(whole, folder, options.workers)
    print(adapter_table(by_format))
    print(phase_table(after))
    print(json.dumps(figures(by_format, before, after, num_bytes) | _about(options)))


def time_adapters(parts: list[LogPart], num_lines: int) -> dict[str, Adapted]:
    """Time each format over its first lines."""
    of_format: dict[str, list[LogPart]] = defaultdict(list)
    for part in parts:
        of_format[part.format].append(part)
    return {
        name: _time_adapter(FORMATS[name], list(islice(_lines_of(some), num_lines)))
        for name, some in of_format.items()
    }


def _time_adapter(form: LogFormat, lines: list[Line]) -> Adapted:
    """Time one format over some lines; medians of several rounds."""
    texts = [line.text for line in lines]
    if form.recognises_text is not None:
        texts = [_as_json(text) for text in texts]

    def parse() -> int:
        for text in texts:
            orjson.loads(text)
        return len(texts)

    def adapt() -> int:
        num_calls = 0
        for call in form.read(iter(lines)):
            num_calls += not isinstance(call, Drop)
        return num_calls

    rounds = [(_seconds(parse), _seconds(adapt)) for _ in range(NUM_ROUNDS)]
    return Adapted(
        lines=len(lines),
        calls=adapt(),
        orjson_s=median(parsing for parsing, _ in rounds),
        adapter_s=median(adapting for _, adapting in rounds),
    )


def run_ingest(logs: Path, folder: Path, workers: int) -> Ingested:
    """Ingest a log, phase by phase as the stage does; the stage itself then finds them done."""
    config = RecipeConfig(
        name=logs.name,
        runs_dir=str(folder / "runs"),
        target=TargetConfig(name_or_path=str(folder)),  # no record needs its tokenizer
        data=DataConfig(),
        executor=ExecutorConfig(workers=workers),
    )
    evaluation = {"invented": _evaluation()}
    phases_s: dict[str, float] = {}
    with PeakMemory() as memory:
        begin = time.perf_counter()
        plan = plan_ingest(config, plan_parts(str(logs)), evaluation)
        phases_s["plan"] = time.perf_counter() - begin
        for phase in phases(plan):
            begin = time.perf_counter()
            run_phases([phase], plan.work, config.executor)
            phases_s[phase.name] = time.perf_counter() - begin
        begin = time.perf_counter()
        manifest = Manifest(stage="ingest", recipe_hash="sha256:0")
        ingest(config, logs, evaluation=evaluation, manifest=manifest)
        # It plans once more, which a real run does not.
        phases_s["finish"] = max(0.0, time.perf_counter() - begin - phases_s["plan"])
    assert manifest.counts is not None
    return Ingested(
        records=manifest.counts.read,
        kept=manifest.counts.kept,
        dropped={reason: count for reason, count in manifest.counts.dropped.items() if count},
        phases_s=phases_s,
        peak_memory_bytes=memory.peak_bytes,
    )


class PeakMemory:
    """Samples the memory of this process and all below it while a block runs."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, _tree(os.getpid()))))


def figures(
    by_format: dict[str, Adapted], before: Ingested, after: Ingested, num_bytes: int
) -> dict[str, object]:
    """Give what the last line holds: figures, goals, and which goals are met."""
    # As in the corpus, where each format has about as many calls as the next.
    parsing = sum(each.orjson_s / each.calls for each in by_format.values())
    adapting = sum(each.adapter_s / each.calls for each in by_format.values())
    growth = (after.peak_memory_bytes - before.peak_memory_bytes) / max(
        1, after.records - before.records
    )
    found = {
        "records_per_s": round(after.records / after.seconds, 1),
        "adapters_of_orjson": round(parsing / adapting, 4),
        "peak_memory_bytes": after.peak_memory_bytes,
        "growth_bytes_per_record": round(growth, 1),
    }
    floors = ("records_per_s", "adapters_of_orjson")
    met = {
        name: found[name] >= goal if name in floors else found[name] <= goal
        for name, goal in GOALS.items()
    }
    return found | {
        "goals": GOALS,
        "met": met,
        "log_bytes": num_bytes,
        "whole": asdict(after),
        "small": asdict(before),
        "adapters": {name: asdict(each) for name, each in by_format.items()},
    }


def phase_table(run: Ingested) -> str:
    """Give one line for each phase."""
    rows = [*run.phases_s.items(), ("all", run.seconds)]
    lines = [f"{'phase':8} {'seconds':>9} {'records/s':>11} {'share':>6}"]
    lines += [
        f"{name:8} {seconds:9.2f} {run.records / max(seconds, 1e-9):11.0f} "
        f"{seconds / run.seconds:6.1%}"
        for name, seconds in rows
    ]
    peak = run.peak_memory_bytes / 2**20
    return "\n".join([*lines, f"{run.records} records, {run.kept} kept; peak {peak:.0f} MiB"])


def adapter_table(by_format: dict[str, Adapted]) -> str:
    """Give one line for each format: microseconds a call, and the share of orjson's speed."""
    lines = [f"{'format':14} {'lines':>6} {'calls':>6} {'orjson us':>10} {'us':>8} {'speed':>6}"]
    for name, each in by_format.items():
        parsing, adapting = (1e6 * s / each.calls for s in (each.orjson_s, each.adapter_s))
        lines.append(
            f"{name:14} {each.lines:6} {each.calls:6} {parsing:10.2f} {adapting:8.2f} "
            f"{parsing / adapting:6.1%}"
        )
    return "\n".join(lines)


def _lines_of(parts: list[LogPart]) -> Iterator[Line]:
    """Yield the lines of the parts of one format; of a batch as many answers as requests."""
    for part in parts:
        is_joined = FORMATS[part.format].is_request is not None
        for piece in part.slices:
            lines = read_file(
                piece.address, piece.name, piece.layout, start=piece.start, end=piece.end
            )
            some = islice(lines, NUM_JOINED) if is_joined else lines
            yield from (line for line in some if isinstance(line, Line))


def _as_json(text: bytes) -> bytes:
    """Give what vLLM would write if it logged JSON: a body or an id list beside the text."""
    for name, end in ((b" JSON body: ", b""), (b"_token_ids: ", b"]")):
        before, found, rest = text.partition(name)
        if found:
            value, _, after = rest.partition(end) if end else (rest, b"", b"")
            told = orjson.dumps((before + after).decode())
            return b'{"text": ' + told + b', "value": ' + value + end + b"}"
    return orjson.dumps({"text": text.decode()})


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _evaluation() -> list[Conversation]:
    """Invent prompts with no word of the log."""
    return [
        Conversation(
            id=f"prompt-{number}",
            source="invented",
            messages=[Turn(role="user", content=" ".join(f"w{number}x{n}" for n in range(80)))],
        )
        for number in range(NUM_EVALUATION_PROMPTS)
    ]


def _in_fresh_process(logs: Path, folder: Path, workers: int) -> Ingested:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_ingest, logs, folder, workers).result()


def _tree(pid: int) -> list[int]:
    """Give a process and all below it; those that have just ended are left out."""
    found = [pid]
    for process in found:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                continue
    return found


def _pss_bytes(pid: int) -> int:
    """Give the proportional set size of a process; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:")), 0
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="processes; the goal is for 2")
    parser.add_argument("--lines", type=int, default=2_000, help="of each format, for adapters")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where the logs go for the time being; needs 10 KB/record")
    return parser.parse_args()


def _about(options: argparse.Namespace) -> dict[str, object]:
    load, *_ = os.getloadavg()
    return {"workers": options.workers, "seed": options.seed, "load": round(load, 2)}


def _tell(what: str) -> None:
    print(f"bench-ingest: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
