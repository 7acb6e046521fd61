"""What the manifests of a run say about its drafter, and whether its data may be spoken of.

A card tells how a drafter was trained as far as manifests and the checkpoint's own metadata know;
what they do not know is left out. Addresses of logs, folders and customers never enter it.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_train.config import require
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.features.store import INDEX_NAME, read_index
from dflash_train.records.conversation import SPLITS, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.release.evaluation_results import describe_machine

_TOLD = ("recipe=", "seed=", "drafter.", "training.", "loss.", "optim.", "launch.", "evaluate.")
"""Beginnings of command-line arguments that a card may repeat: none of them names a place."""
_PLACES = ("evaluate.datasets_dir", "evaluate.eval_sets", "evaluate.concurrency", "evaluate.cost")


@dataclass(frozen=True, kw_only=True)
class SplitRow:
    """Size of one split of the training data."""

    split: str
    answers: int
    tokens: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """How a drafter came to be."""

    target: dict[str, Any] | None
    """The manifests' target block; None for a drafter that others trained."""
    training: dict[str, str] = field(default_factory=dict)
    """Facts by name, in the words of the card."""
    splits: list[SplitRow] = field(default_factory=list)
    read: int | None = None
    """Logged calls that `ingest` read; None if this run has no books."""
    kept: int | None = None
    redacted_records: int | None = None
    """Records in which the scrubber replaced something."""
    is_simulated: bool = False
    """Whether the log was played by the simulated fleet."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Code, versions and hashes."""


def run_of(checkpoint: Path) -> Path | None:
    """Give the run folder in which training wrote a checkpoint; None if it was not training."""
    written = Manifest.read(checkpoint.resolve().parent)
    return checkpoint.resolve().parents[1] if written and written.stage == "train" else None


def check_scrubbed(run_dir: Path) -> None:
    """Refuse a run whose conversations are not known to be scrubbed, record by record.

    Raises:
        ValueError: `ingest` is not complete, is not what the features were made from, or a record
            was not scrubbed. No content enters the message.
    """
    folder = run_dir / "conversations"
    ingest, collect = Manifest.read(folder), Manifest.read(run_dir / "features")
    require(
        ingest is not None and "privacy" in ingest.details,
        f"{folder} is not complete, so nothing shows that the training data was scrubbed. Run "
        "`dflash-train ingest` with this recipe first.",
    )
    assert ingest is not None
    require(
        collect is None or collect.inputs.get("ingest") == ingest.hash,
        f"{folder} is not what the features of this run were made from. Run `dflash-train run` "
        "with this recipe first.",
    )
    for place, split, is_scrubbed in _privacy_flags(run_dir):
        require(
            is_scrubbed,
            f"record {place} of {split} has privacy.scrubbed=false: the drafter may have learnt "
            "private values. Run `dflash-train ingest` again and train on its result.",
        )


def _privacy_flags(run_dir: Path) -> Iterator[tuple[int, str, bool]]:
    for stage in ("conversations", "regenerated"):
        for split in SPLITS:
            for place, record in enumerate(read_split(run_dir / stage, split)):
                yield place, f"{stage}/{split}", record.privacy.scrubbed


def read_record(
    run_dir: Path | None, metadata: CheckpointMetadata | None, *, weights_hash: str
) -> RunRecord:
    """Gather what is known of a drafter from its run and from the file beside its weights.

    Args:
        run_dir: The run that trained or measured it; None if there is none.
        metadata: Of the checkpoint.
        weights_hash: `sha256:` of the weights; a run speaks for those alone that it wrote.
    """
    train = Manifest.read(run_dir / "checkpoint") if run_dir is not None else None
    ingest = Manifest.read(run_dir / "conversations") if run_dir is not None else None
    is_simulated = ingest is not None and "sample-traffic" in ingest.inputs
    if train is not None and weights_hash not in {entry.sha256 for entry in train.outputs}:
        train = None
    known = metadata.provenance if metadata is not None else {}
    if run_dir is None or train is None or ingest is None:
        return RunRecord(
            target=metadata.target if metadata is not None else None,
            training=_training_facts(None, known),
            provenance=_provenance(None, known),
            is_simulated=is_simulated,
        )
    assert ingest.counts is not None
    return RunRecord(
        target=train.target,
        training=_training_facts(train, known),
        splits=_splits(run_dir),
        read=ingest.counts.read,
        kept=ingest.counts.kept,
        redacted_records=ingest.details["privacy"]["records_touched"],
        is_simulated=is_simulated,
        provenance=_provenance(train, known),
    )


def told_command(command: str) -> str:
    """Give a command line without what names a place or a customer."""
    words = [
        word
        for word in shlex.split(command)
        if word.startswith(_TOLD) and not word.startswith(_PLACES)
    ]
    return shlex.join(["dflash-train", "run", *words])


def _training_facts(train: Manifest | None, known: dict[str, Any]) -> dict[str, str]:
    details = {} if train is None else train.details
    steps, calibration = details.get("steps", known.get("steps")), details.get("calibration")
    found: dict[str, Any] = {
        "Recipe": f"`{told_command(train.command)}`" if train is not None else known.get("recipe"),
        "Steps": f"{steps:,}" if steps is not None else None,
        "Training rows": details.get("training_rows", known.get("training_rows")),
        "Processes": details.get("processes", known.get("processes")),
        "Hardware": describe_machine(known["hardware"]) if "hardware" in known else None,
    }
    if calibration is not None and steps is not None:
        hours = steps * calibration["seconds_per_step"] / 3600
        found["Time"] = f"about {hours:.1f} hours (calibrated)"
    return {name: str(value) for name, value in found.items() if value is not None}


def _splits(run_dir: Path) -> list[SplitRow]:
    rows = []
    for split in SPLITS:
        folder = run_dir / "features" / split
        if (folder / INDEX_NAME).is_file():
            lines = read_index(folder)
            tokens = sum(line.num_tokens for line in lines)
            answer_tokens = tokens - sum(line.prompt_length for line in lines)
            rows.append(
                SplitRow(
                    split=split, answers=len(lines), tokens=tokens, answer_tokens=answer_tokens
                )
            )
    return rows


def _provenance(train: Manifest | None, known: dict[str, Any]) -> dict[str, str]:
    code = train.code if train is not None else known.get("code", {})
    versions = train.versions if train is not None else known.get("versions", {})
    found = {
        "Code": f"commit `{code['sha']}`" + (", with local changes" if code["dirty"] else "")
        if code.get("sha")
        else None,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        "Manifest of `train`": f"`{train.hash}`" if train is not None else None,
    }
    return {name: value for name, value in found.items() if value is not None}
