"""What the doctor may look at beside a checkpoint: answers that a run stored, and a decoder.

Answers are held-out ones of the split `test`, with the target's features; where a run keeps none
(`data.features=online`), the target reads them again. Their text is the target's own, so the
acceptance length of any drafter follows from them without decoding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
import torch

from dflash_train.config import DataConfig, require
from dflash_train.drafter.model import Drafter
from dflash_train.features.online_rows import OnlineRows, Reading
from dflash_train.features.row_source import RowSource
from dflash_train.features.store import WITHOUT_FEATURES, FeatureRow, FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.manifest import Manifest

FEATURES_FOLDER, SPLIT = "features", "test"
REPORT_PATH = Path("report", "report.json")
NUM_ROWS, NUM_TOKENS = 24, 1 << 15
"""Answers that are replayed, spread evenly over the split, and their tokens, at most."""
_NOT_THE_TARGET = "target_layer_ids"
"""Part of a manifest's target block that a drafter decides."""


def with_taps(target: Target, layers: list[int]) -> Target:
    """Give the same loaded target, read at other layers."""
    return Target(
        target.model, target.tokenizer, layers, name=target.name, revision=target.revision
    )


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One prompt, decoded greedily by the target alone and with the drafter."""

    num_tokens: int
    """Tokens that the target alone wrote."""
    num_equal: int
    """Leading tokens that both ways share."""
    num_steps: int
    """Verify steps of the drafter's way."""
    is_near_tie: bool
    """The first difference is between two logits that lie within rounding of each other."""


class UndecodableTargetError(ValueError):
    """No decoder here takes this target, whatever the drafter; a message as of any ValueError."""


DecodePrompts = Callable[[Target, Drafter, list[list[int]]], list[Decoded]]
"""Decodes prompts (token ids) with a target and a drafter, or raises UndecodableTargetError; the
room above provides it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run's report says about the drafter that it measured."""

    weights: str | None
    """Hash of that drafter's weights."""
    pooled: float
    interval: tuple[float, float]
    """Of the pooled acceptance length, over all requests of the split."""
    by_request: dict[str, tuple[int, int]]
    """Committed tokens and verify steps of each request, by its id."""
    joint: list[float]
    """Share of steps that accepted at least so many drafts, by position."""

    @classmethod
    def read(cls, path: Path) -> "Report | None":
        """Read the figures of a `report.json`; None if there is none.

        Raises:
            ValueError: It is no report of this version.
        """
        if not path.is_file():
            return None
        try:
            content = orjson.loads(path.read_bytes())
            length, rows = content["acceptance_length"], content["requests"][SPLIT]
            counts = zip(rows["tokens"], rows["steps"], strict=True)
            return cls(
                weights=content["checkpoint"]["inputs"].get("checkpoint"),
                pooled=length["pooled"],
                interval=tuple(length["interval"]),
                by_request=dict(zip(rows["id"], counts, strict=True)),
                joint=content["positions"]["joint"],
            )
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no report of this version: it lacks {error}. Run the stage `report` "
                "again with --force."
            ) from error


@dataclass(frozen=True, kw_only=True)
class StoredAnswers:
    """Held-out answers of a run, and what its report says of them."""

    run_dir: Path
    store: RowSource
    target_layer_ids: list[int]
    """Layers whose outputs are stored."""

    @classmethod
    def of_run(
        cls, run_dir: Path, target: Target, *, data: DataConfig | None = None
    ) -> "StoredAnswers":
        """Open the answers that a target gave in a run.

        Args:
            run_dir: Folder of the run.
            target: Reads the answers of a run that keeps no features.
            data: The run's settings, which say how features are rounded; None rounds none.

        Raises:
            ValueError: There are none, or they are another target's.
        """
        folder = run_dir / FEATURES_FOLDER
        manifest = Manifest.read(folder)
        require(manifest is not None, f"{folder} holds no complete features")
        assert manifest is not None
        stored, given = manifest.target or {}, target.describe()
        other = [key for key in given if key != _NOT_THE_TARGET and stored.get(key) != given[key]]
        require(not other, f"{folder} was made with another target: {', '.join(other)} differ")
        layers = stored[_NOT_THE_TARGET]
        is_online = WITHOUT_FEATURES.items() <= manifest.details.items()
        store = FeatureStore.open(folder / SPLIT, verify=False, needs_features=not is_online)
        require(len(store) > 0, f"{folder / SPLIT} holds no answer")
        rows = _read_again(store, with_taps(target, layers), data) if is_online else store
        return cls(run_dir=run_dir, store=rows, target_layer_ids=layers)

    @functools.cached_property
    def rows(self) -> list[FeatureRow]:
        """Give a fixed choice of answers, each up to its first redaction."""
        number = min(NUM_ROWS, len(self.store))
        chosen: list[FeatureRow] = []
        for place in range(number):
            row = self.store[place * len(self.store) // number].until_first_gap()
            if chosen and sum(len(each.input_ids) for each in [*chosen, row]) > NUM_TOKENS:
                break
            chosen.append(row)
        return chosen

    @property
    def longest(self) -> int:
        """Give the tokens of the longest request, its budget included."""
        return max(line.max_length for line in self.store.lines)

    def report(self) -> Report | None:
        """Read the report of the run; None before there is one.

        Raises:
            ValueError: It is no report of this version.
        """
        return Report.read(self.run_dir / REPORT_PATH)


def _read_again(tokens: FeatureStore, target: Target, data: DataConfig | None) -> OnlineRows:
    """Give rows whose features the target computes when they are asked for."""
    num_taps = len(target.target_layer_ids)
    whole = Reading(dtype=torch.float32, num_taps=num_taps, teacher_top_k=0, batch_size=1)
    reading = whole if data is None else Reading.of(data, num_taps=num_taps)
    return OnlineRows(tokens, target, reading=replace(reading, teacher_top_k=0))
