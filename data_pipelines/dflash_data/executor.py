"""The only door to datatrove: phases of tasks on this machine, on Slurm or on Ray.

    dflash-train ingest recipe=smollm2 executor=local|slurm|ray

Three things are added to datatrove's executors:

- No log content leaks. datatrove writes an `executor.json` with every attribute of every step
  and, when a step fails, a log with the values of local variables: raw traffic. So diagnosis is
  switched off before its import, its logger is silenced, steps keep their data in objects whose
  text form shows none, and the last step of each phase withholds the text of foreign errors.
- Completed tasks stay completed. datatrove marks them by number inside its log folder, whatever
  the input was; the caller names the folder by the hash of the input. A crash costs one task.
- Counts survive a restart: they are summed from the file that each finished task left.
"""

import contextlib
import copy
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import types
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import orjson

os.environ["LOGURU_DIAGNOSE"] = "NO"  # read once, when datatrove imports loguru

from datatrove.data import Document
from datatrove.executor import (
    LocalPipelineExecutor,
    RayPipelineExecutor,
    SlurmPipelineExecutor,
)
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from dflash_train.config import ExecutorConfig, ExecutorKind, UnavailableError
from dflash_train.records.manifest import write_bytes

__all__ = ["Document", "Documents", "Phase", "PipelineStep", "run_phases", "slurm_script"]

logger.disable("datatrove")  # here, because worker processes import this module and no other

Documents = Iterator[Document] | None
"""What a step receives: the stream of the step before it, None for the first."""

SUBMITTED = "submitted.json"
MAX_ARRAY_SIZE = 1001
"""Tasks of one Slurm job array; the usual limit of clusters."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A pipeline that runs as so many tasks, after the phase before it."""

    name: str
    steps: list[PipelineStep]
    """A reader first; each task runs all of them."""
    num_tasks: int


def run_phases(phases: list[Phase], folder: Path, config: ExecutorConfig) -> Counter[str]:
    """Run the phases in order, except for tasks done before, and sum all counts by name.

    Args:
        phases: Counts of the same name are added up, whichever step they come from.
        folder: Where the marks of completion are kept; one folder for each input.
        config: Where to run.

    Raises:
        ValueError: A task met something that the user can fix.
        RuntimeError: A task failed.
        UnavailableError: The jobs are submitted or still run, or the cluster cannot be reached.
    """
    if config.kind is ExecutorKind.slurm:
        _run_on_slurm(phases, folder, config)
    elif config.kind is ExecutorKind.ray:
        _run_on_ray(phases, folder, config)
    else:
        for phase in phases:
            _run_locally(phase, folder, config)
    return _sum_counts(phases, folder)


class Guard(PipelineStep):
    """Drives the steps before it; keeps log content out of what a failing one reports."""

    name = "guard"
    type = "guard"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Documents = None, rank: int = 0, world_size: int = 1) -> None:
        """Run one task to its end."""
        failure = _failure_path(self.folder, rank)
        failure.unlink(missing_ok=True)
        try:
            deque(data or (), maxlen=0)
        except Exception as error:
            told = _content_free(error)
            write_bytes(failure, str(told).encode())
            raise told from None


def _content_free(error: Exception) -> Exception:
    """Keep our own messages, which name a setting first; of all others tell type and place."""
    if isinstance(error, ValueError) and str(error).startswith("data."):
        return ValueError(str(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_filename if trace is not None else "unknown"
    line = trace.tb_lineno if trace is not None else 0
    return RuntimeError(
        f"a task stopped at {Path(code).name}:{line} with {type(error).__name__}; the error's own "
        "text is withheld, since it may quote the log. Please report it."
    )


def _steps(phase: Phase, folder: Path) -> list[PipelineStep]:
    return [*phase.steps, Guard(folder / phase.name)]


def _run_locally(phase: Phase, folder: Path, config: ExecutorConfig) -> None:
    workers = min(phase.num_tasks, config.workers or os.cpu_count() or 1)
    executor = _LocalExecutor(
        list(_steps(phase, folder)),
        tasks=phase.num_tasks,
        workers=workers,
        logging_dir=str(folder / phase.name),
    )
    # Worker processes are forked from one that has imported the steps: they start at once and
    # share its memory.
    modules = sorted({type(step).__module__ for step in phase.steps})
    multiprocessing.set_forkserver_preload(modules)
    with _hidden_program():
        executor.run()


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor with worker processes that end when this one does, however it ends.

    Its own `run` starts a manager process that a killed program leaves behind for ever, and waits
    for ever for a worker that the kernel has killed.
    """

    def run(self) -> None:
        """Run the tasks that are not marked as completed.

        Raises:
            RuntimeError: A worker process was killed.
        """
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in ranks:
                _run_task(copy.deepcopy(self), rank)
            return
        pool = ProcessPoolExecutor(
            min(self.workers, len(ranks)),
            mp_context=multiprocessing.get_context("forkserver"),
            initializer=_end_with_the_program,
        )
        try:
            for task in [pool.submit(_run_task, self, rank) for rank in ranks]:
                task.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process was killed, by the kernel if memory ran out. Run the command "
                "again to go on, with a smaller executor.workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run one task; its counts come back through the file that it leaves."""
    executor._run_for_rank(rank)


def _end_with_the_program() -> None:
    """End this worker process when the program that started it is gone, even by a kill."""
    program = multiprocessing.parent_process()
    assert program is not None, "only workers call this"

    def wait() -> None:
        program.join()
        os._exit(1)  # what it was writing is a partial file, which nobody reads

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _hidden_program() -> Iterator[None]:
    """Keep worker processes from importing the program's own file and, through it, torch."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _run_on_ray(phases: list[Phase], folder: Path, config: ExecutorConfig) -> None:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnavailableError(
            "executor.kind (=ray) needs the package ray. Install the extra: pip install "
            "'dflash-train[ray]', or choose executor=local."
        ) from error
    workers = config.workers or os.cpu_count() or 1
    # Task processes of Ray start from a clean environment.
    names = ("LOGURU_DIAGNOSE", "PYTHONPATH", "DFLASH_HMAC_KEY")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    ray.init(
        address=config.ray_address,
        num_cpus=workers if config.ray_address is None else None,
        include_dashboard=False if config.ray_address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": variables},
    )
    try:
        for phase in phases:
            executor = RayPipelineExecutor(
                list(_steps(phase, folder)),
                tasks=phase.num_tasks,
                workers=min(workers, phase.num_tasks),
                mem_per_cpu_gb=config.memory_gb,
                logging_dir=str((folder / phase.name).absolute()),
            )
            executor.run()
            unfinished = executor.get_incomplete_ranks()
            _raise_failures(phase, folder, unfinished)
            if unfinished:  # a worker was killed more often than Ray tries again
                raise RuntimeError(f"{len(unfinished)} tasks of {phase.name} did not finish on Ray")
    finally:
        ray.shutdown()


def _raise_failures(phase: Phase, folder: Path, ranks: list[int], *, forget: bool = False) -> None:
    """Raise what the first failed task told; with `forget`, the next run tries it again."""
    for rank in ranks:
        path = _failure_path(folder / phase.name, rank)
        if path.exists():
            told = path.read_text()
            if forget:
                path.unlink()
            raise (ValueError if told.startswith("data.") else RuntimeError)(told)


def _run_on_slurm(phases: list[Phase], folder: Path, config: ExecutorConfig) -> None:
    """Submit the phases as chained job arrays, unless all tasks are done.

    Raises:
        UnavailableError: Always, except where nothing is left to do: the jobs run on their own.
    """
    executors = _slurm_executors(phases, folder, config)
    unfinished = [executor.get_incomplete_ranks() for executor in executors]
    if not any(unfinished):
        return
    jobs = _active_jobs(folder)
    if not jobs:
        for phase, ranks in zip(phases, unfinished, strict=True):
            _raise_failures(phase, folder, ranks, forget=True)
        jobs = _submit(executors, folder)
    raise UnavailableError(
        f"ingest runs as the Slurm jobs {', '.join(jobs)}. Run this command again when they have "
        f"ended: it then writes the manifest. Their scripts are {folder}/*/launch_script.slurm."
    )


def _submit(executors: list[SlurmPipelineExecutor], folder: Path) -> list[str]:
    """Hand the phases to Slurm, each after the one before it, and give the job ids."""
    if shutil.which("sbatch") is None:
        raise UnavailableError(
            "executor.kind (=slurm) needs the command sbatch, which this machine does not have. "
            "Run on a login node of the cluster, or choose executor=local."
        )
    executors[-1].launch_job()  # launches those it depends on first
    jobs = [str(executor.job_id) for executor in executors if executor.job_id not in (None, -1)]
    write_bytes(folder / SUBMITTED, orjson.dumps(jobs))
    return jobs


def slurm_script(phase: Phase, folder: Path, config: ExecutorConfig) -> str:
    """Give the script that `executor=slurm` submits for a phase, without submitting it."""
    (executor,) = _slurm_executors([phase], folder, config)
    pickled = executor.logging_dir.resolve_paths("executor.pik")
    return executor.get_launch_file_contents(
        executor.get_sbatch_args(min(phase.num_tasks, MAX_ARRAY_SIZE)),
        f"srun  -l -n 1 launch_pickled_pipeline {pickled}",
    )


def _slurm_executors(
    phases: list[Phase], folder: Path, config: ExecutorConfig
) -> list[SlurmPipelineExecutor]:
    executors: list[SlurmPipelineExecutor] = []
    for phase in phases:
        executors.append(
            SlurmPipelineExecutor(
                list(_steps(phase, folder)),
                tasks=phase.num_tasks,
                time=config.slurm_time,
                partition=config.slurm_partition,
                mem_per_cpu_gb=config.memory_gb,
                workers=config.workers or -1,
                job_name=f"ingest-{phase.name}",
                qos="",
                env_command=f"export LOGURU_DIAGNOSE=NO; {config.slurm_environment}".strip("; "),
                max_array_size=MAX_ARRAY_SIZE,
                depends=executors[-1] if executors else None,
                logging_dir=str((folder / phase.name).absolute()),
            )
        )
    return executors


def _active_jobs(folder: Path) -> list[str]:
    """Give the submitted jobs that Slurm still knows as waiting or running."""
    path = folder / SUBMITTED
    if not path.exists():
        return []
    jobs: list[str] = orjson.loads(path.read_bytes())
    if shutil.which("squeue") is None:
        return jobs
    listed = subprocess.run(
        ["squeue", "--noheader", "--format=%A", "--jobs", ",".join(jobs)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return jobs if listed.returncode == 0 and listed.stdout.strip() else []


def _failure_path(folder: Path, rank: int) -> Path:
    return folder / "failures" / f"{rank:05d}"


def _sum_counts(phases: list[Phase], folder: Path) -> Counter[str]:
    """Add up the counts that the tasks of all phases left."""
    totals: Counter[str] = Counter()
    for phase in phases:
        for rank in range(phase.num_tasks):
            path = folder / phase.name / "stats" / f"{rank:05d}.json"
            for step in orjson.loads(path.read_bytes()):
                for name, metric in step["stats"].items():
                    total = metric["total"] if isinstance(metric, dict) else metric
                    totals[name] += int(total)
    return totals
