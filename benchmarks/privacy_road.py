"""Takes a log through the real `dflash-train ingest` and looks for values in all it leaves.

Three runs in one folder, each with what it says on stdout and stderr caught beside its run folder;
errors come with their traceback:

    killed    SIGKILL once the first records are chained, so that temporary files are left
    finished  the same command again, up to its manifest
    refused   it may drop next to nothing, so it fails
"""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.byte_search import ByteSearch, Found, search_folder
from dflash_train.records.manifest import Manifest

KEEP_ALL = (
    "data.max_per_cluster=1000000000",
    "data.max_answers_per_prefix=1000000000",
    "data.max_drop_share=1",
)
"""No text is left out for being like another: what the scrubber missed has to show."""
MAX_RUN_S = 3600
POLL_S = 0.02
CONTROL = "a control value, in no log"


@dataclass(kw_only=True)
class Road:
    """What the runs left and what was found in it."""

    found: Found
    """Of everything at the end: two run folders, and all that was printed."""
    killed: Found
    """Of what lay there after the kill."""
    num_temporary: int
    """Searched temporary files."""
    exit_codes: dict[str, int] = field(default_factory=dict)
    """Of each run but the killed one."""
    counts: dict[str, Any] = field(default_factory=dict)
    """The books of the finished run: read, kept, dropped by reason."""


class RealIngest:
    """Runs the command line over logs, in a folder of its own."""

    def __init__(self, folder: Path, *, workers: int) -> None:
        """Make the folders `runs` and `said`; everything searched lies below `folder`."""
        self.folder = folder
        self._workers = workers
        (folder / "said").mkdir(parents=True)

    def run(self, name: str, logs: Path, *settings: str, kill_at: str | None = None) -> int:
        """Ingest and give the exit code; what is printed goes to `said/`.

        Args:
            name: Of the run.
            logs: The log.
            settings: Further recipe keys.
            kill_at: Glob inside the run folder: the first file to match it is the run's end.
        """
        command = [
            sys.executable, "-m", "dflash_train", "ingest", "recipe=smollm2", f"name={name}",
            f"runs_dir={self.folder / 'runs'}", f"data.logs={logs}",
            f"target.name_or_path={self.folder / 'no-target'}",
            f"executor.workers={self._workers}", *KEEP_ALL, *settings,
        ]  # fmt: skip
        said = self.folder / "said" / f"{name}-{len(list((self.folder / 'said').iterdir()))}.txt"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "DFLASH_TRACEBACK": "1"},
            )
            if kill_at is not None:
                _kill_at(process, self.folder / "runs" / name, kill_at)
            return process.wait(MAX_RUN_S)


def _kill_at(process: "subprocess.Popen[bytes]", run: Path, pattern: str) -> None:
    while process.poll() is None:
        if any(".partial-" not in str(path) for path in run.glob(pattern)):
            os.killpg(process.pid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


def walk_road(logs: Path, folder: Path, search: ByteSearch, *, workers: int) -> Road:
    """Do the four runs and search after the kill and at the end.

    Args:
        logs: Folder of the logs, outside `folder`.
        folder: For everything that is searched.
        search: Knows the values.
        workers: Processes of each run.
    """
    ingest = RealIngest(folder, workers=workers)
    ingest.run("whole", logs, kill_at="ingest/*/chained/*.zst")
    killed = search_folder(folder, search)
    temporary = [path for path in folder.glob("runs/whole/ingest/**/*") if path.is_file()]
    codes = {"finished": ingest.run("whole", logs)}
    codes["refused"] = ingest.run("refused", logs, "data.max_drop_share=0.0001")
    manifest = Manifest.read(folder / "runs" / "whole" / "conversations")
    counts = manifest.counts if manifest is not None else None
    return Road(
        found=search_folder(folder, search),
        killed=killed,
        num_temporary=len(temporary),
        exit_codes=codes,
        counts={} if counts is None else {"read": counts.read, "kept": counts.kept,
                                          "dropped": counts.dropped},
    )  # fmt: skip


def finds_controls(folder: Path) -> bool:
    """Say whether the search finds a value that is put, packed, into files made for this."""
    folder.mkdir()
    (folder / "plain.json").write_text(f'{{"x": "{CONTROL}"}}')
    (folder / "packed.gz").write_bytes(gzip.compress(gzip.compress(CONTROL.encode())))
    found = search_folder(folder, ByteSearch([CONTROL]))
    shutil.rmtree(folder)
    return found.values == {CONTROL: {"plain.json", "packed.gz"}}
