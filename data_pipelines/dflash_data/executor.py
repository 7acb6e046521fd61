"""The only door to datatrove: its local executor, run so that no log content can leak.

datatrove writes an `executor.json` with every attribute of every step and, when a step fails,
a log with the values of local variables: raw traffic. So diagnosis is switched off before its
import, its logger is silenced (errors still reach the caller), and steps keep their data in
functions whose text form shows none.

The log folder is named by the hash of the input, because datatrove marks completed tasks by
number inside it, whatever the input was. The pipelines here are one task: sessions span
files, and nothing may touch the disk before it is scrubbed, so a task cut short is done anew.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["LOGURU_DIAGNOSE"] = "NO"  # read once, when datatrove imports loguru

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

__all__ = ["Document", "Documents", "PipelineStep", "run_pipeline"]

Documents = Iterator[Document] | None
"""What a step receives: the stream of the step before it, None for the first."""


def run_pipeline(steps: list[PipelineStep], logs: Path, input_hash: str) -> Counter[str]:
    """Run the steps as one local task and give the sum of their statistics by name.

    Args:
        steps: A reader first, then steps in order; they must not share statistic names.
        logs: Folder under which the log folder of this input is made.
        input_hash: `sha256:` and hexadecimal digits.
    """
    logger.disable("datatrove")
    folder = logs / f"ingest-{input_hash.removeprefix('sha256:')[:12]}"
    executor = LocalPipelineExecutor(
        list(steps), tasks=1, workers=1, logging_dir=str(folder), skip_completed=False
    )
    statistics = executor.run()
    assert statistics is not None, "skip_completed is off, so the task has run"
    totals: Counter[str] = Counter()
    for step in statistics.stats:
        totals.update({name: int(metric.total) for name, metric in step.stats.items()})
    return totals
