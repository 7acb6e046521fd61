"""Where curves go: `metrics.jsonl` always, Weights & Biases and TensorBoard when asked."""

import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from dflash_train.config import RecipeConfig, TrackingConfig, to_plain

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_WANDB_ID = Path("wandb") / "run-id.txt"


class Tracker(Protocol):
    """A place that takes the values of a step."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the values of one step; nested dicts and lists are allowed."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class JsonlTracker:
    """One JSON line per call, on disk at once."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open the file and drop what an interrupted run wrote after the step it resumes from.

        Args:
            path: The file; it is created if needed.
            resumed_step: Steps already in the train state; 0 starts an empty file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(path, resumed_step) if resumed_step and path.exists() else []
        path.write_bytes(b"".join(kept))
        self._stream = path.open("ab")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        self._stream.write(orjson.dumps({"step": step, **values}) + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class WandbTracker:
    """A Weights & Biases run, the same one after an interruption and for the report.

    Curves run over our own step and not over W&B's counter of calls, so what a resumed run computes
    again falls on the points that are there.
    """

    def __init__(
        self,
        config: TrackingConfig,
        *,
        run_dir: Path,
        name: str,
        settings: dict[str, Any],
        is_new: bool = True,
    ) -> None:
        """Start a run, or go on with the one of this folder.

        Args:
            config: Project and mode.
            run_dir: Folder of our run; W&B writes below it.
            name: Name and group of the run.
            settings: The recipe, as plain values.
            is_new: False takes the id that an earlier process has left, if one has.

        Raises:
            ValueError: The package is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "tracking.wandb (=true) needs the package wandb. Run "
                "pip install 'dflash-train[wandb]' or leave it out."
            ) from error
        run_dir.mkdir(parents=True, exist_ok=True)
        self._name = name
        self._run = wandb.init(
            project=config.wandb_project,
            mode=config.wandb_mode.value,
            dir=str(run_dir),
            id=_wandb_id(run_dir, is_new=is_new),
            resume="allow",
            name=name,
            group=name,
            config=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of one step under slash-separated names."""
        self._run.log({"step": step, **flatten(values)})

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[list[Any]]) -> None:
        """Send a table; its cells are plain values or None."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=list(rows))})

    def log_folder(self, folder: Path, *, kind: str) -> None:
        """Send the files of a folder as an artifact, its type and the end of its name `kind`."""
        import wandb

        name = re.sub(r"[^\w.-]", "-", f"{self._name}-{kind}")
        artifact = wandb.Artifact(name=name, type=kind)
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    @property
    def id(self) -> str:
        """W&B's id of the run."""
        return self._run.id

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard's event files in `tensorboard/` of the run folder."""

    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        """Open a new file beside those of earlier processes.

        Args:
            run_dir: Folder of our run.
            resumed_step: Steps already in the train state; what was written after them is hidden.
                0 removes all files.

        Raises:
            ValueError: The package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracking.tensorboard (=true) needs the package tensorboard. Run "
                "pip install 'dflash-train[tensorboard]' or leave it out."
            ) from error
        folder = run_dir / TENSORBOARD_FOLDER
        if resumed_step == 0 and folder.is_dir():
            shutil.rmtree(folder)
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of one step under slash-separated names."""
        for name, value in flatten(values).items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_trackers(config: RecipeConfig, *, run_dir: Path, resumed_step: int) -> list[Tracker]:
    """Open the trackers that a recipe asks for; only one process of a run does.

    Args:
        config: The recipe.
        run_dir: Folder of the run.
        resumed_step: Steps already in the train state.

    Raises:
        ValueError: A package is not installed.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_NAME, resumed_step=resumed_step)]
    if config.tracking.wandb:
        trackers.append(open_wandb(config, run_dir=run_dir, is_new=resumed_step == 0))
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(run_dir, resumed_step=resumed_step))
    return trackers


def open_wandb(config: RecipeConfig, *, run_dir: Path, is_new: bool) -> WandbTracker:
    """Open a recipe's W&B run: a new one, or the one that its folder remembers."""
    return WandbTracker(
        config.tracking,
        run_dir=run_dir,
        name=config.name,
        settings=to_plain(config),
        is_new=is_new,
    )


class Trackers:
    """Several trackers as one, closed at the end of a `with` block."""

    def __init__(self, trackers: list[Tracker]) -> None:
        """Wrap trackers; an empty list, as on ranks other than 0, writes nothing."""
        self._trackers = trackers

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Pass the values of one step to all."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *raised: object) -> None:
        for tracker in self._trackers:
            tracker.close()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Give nested numbers as one level: `validation/acceptance_length/pooled`, `slot_accuracy/1`.

    Lists count from 1, since slot 0 has no entry; None is left out.
    """
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list):
            value = {str(index): item for index, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            flat |= flatten(value, prefix=f"{name}/")
        elif value is not None:
            flat[name] = value
    return flat


def _lines_up_to(path: Path, last_step: int) -> list[bytes]:
    """Read the whole lines of steps 1 to `last_step`; a torn last line is dropped."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = orjson.loads(line)["step"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            break
        if step > last_step or not line.endswith(b"\n"):
            break
        kept.append(line)
    return kept


def _wandb_id(run_dir: Path, *, is_new: bool) -> str:
    """Give the id that this folder remembers, or a new one, to be remembered."""
    path = run_dir / _WANDB_ID
    if not is_new and path.is_file():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = secrets.token_hex(4)
    path.write_text(chosen + "\n")
    return chosen
