"""Where curves go: `metrics.jsonl` always, Weights & Biases when asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from dflash_train.config import TrackingConfig

METRICS_NAME = "metrics.jsonl"


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
        kept = _lines_up_to(path, resumed_step) if path.exists() else []
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
    """A Weights & Biases run; after an interruption a new run joins the same group."""

    def __init__(
        self, config: TrackingConfig, *, run_dir: Path, name: str, settings: dict[str, Any]
    ) -> None:
        """Start a run.

        Args:
            config: Project and mode.
            run_dir: Folder of our run; W&B writes below it.
            name: Name and group of the run.
            settings: The recipe, as plain values.

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
        self._run = wandb.init(
            project=config.wandb_project,
            mode=config.wandb_mode.value,
            dir=str(run_dir),
            name=name,
            group=name,
            config=settings,
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of one step under slash-separated names."""
        self._run.log(flatten(values), step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[list[Any]]) -> None:
        """Send a table; its cells are plain values or None."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=list(rows))})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


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
