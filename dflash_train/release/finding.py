"""What the doctor's checks share: the patient, a finding, and how a check names a broken rule.

A check is a function from the patient to one finding. It reads as a list of rules: `demand()`
ends it at the first broken one, with a sentence and a remedy. `needs` names the checks without
whose success it has nothing to say, so one fault gives one failed line and not a dozen.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import orjson
from safetensors import SafetensorError, safe_open

from dflash_train.config import RecipeConfig
from dflash_train.drafter.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_checkpoint,
    weight_files,
)
from dflash_train.drafter.metadata import CheckpointMetadata, read_metadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target
from dflash_train.release.evidence import DecodePrompts, StoredAnswers
from dflash_train.release.formats import Format


class Evidence(Enum):
    """What may stand beside a checkpoint; the value is the remedy where it is missing."""

    target = "no target is given: add target.name_or_path=NAME"
    recipe = "no recipe is given: add recipe=NAME"
    answers = "no run with stored features is given: add recipe=NAME of a run that has them"
    decoder = "no decoder is at hand: use the command `dflash-train doctor`"


class Status(Enum):
    """How a check ended; only `failed` makes the checkpoint unfit."""

    ok = "ok"
    warning = "warning"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found, in one sentence and one remedy."""

    check: str = ""
    """Name of the check; the runner fills it in."""
    status: Status
    sentence: str
    remedy: str = ""
    """What to do; empty where nothing is wrong, or where the sentence ends with it."""

    def __str__(self) -> str:
        """Give the line that is printed."""
        text = f"{self.sentence} {self.remedy}".strip()
        return f"{self.status.value:<8} {self.check:<13} {text}"


def skipped(sentence: str) -> Finding:
    """Give the finding of a check that has nothing to look at."""
    return Finding(status=Status.skipped, sentence=sentence)


def ok(sentence: str) -> Finding:
    """Give the finding of a check that holds."""
    return Finding(status=Status.ok, sentence=sentence)


def warning(sentence: str, *, remedy: str) -> Finding:
    """Give the finding of something that works here and may not elsewhere."""
    return Finding(status=Status.warning, sentence=sentence, remedy=remedy)


class BrokenRuleError(Exception):
    """A rule does not hold; it carries the finding."""

    def __init__(self, finding: Finding) -> None:
        """Keep the finding."""
        super().__init__(finding.sentence)
        self.finding = finding


def broken(sentence: str, *, remedy: str) -> BrokenRuleError:
    """Give the error that ends a check as failed."""
    return BrokenRuleError(Finding(status=Status.failed, sentence=sentence, remedy=remedy))


def demand(condition: bool, sentence: str, *, remedy: str) -> None:
    """End the check as failed unless the condition holds."""
    if not condition:
        raise broken(sentence, remedy=remedy)


@dataclass(kw_only=True)
class Patient:
    """A checkpoint folder, and what it is examined with; None is evidence that nobody gave."""

    folder: Path
    target: Target | None = None
    """The loaded target; its own taps are not read."""
    recipe: RecipeConfig | None = None
    """What the drafter was trained by, or will be served by."""
    answers: StoredAnswers | None = None
    """Held-out answers of that target with features."""
    decode: DecodePrompts | None = None
    """Decodes prompts with the target alone and with the drafter."""
    dialect: Format = Format.zlab
    """Layout that the checkpoint came in; `folder` holds z-lab's."""
    notes: list[str] = field(default_factory=list)
    """What reading that layout brought to light; sentences."""
    unreadable: str | None = None
    """Why it could not be turned into z-lab's layout."""
    remarks: dict[Evidence, str] = field(default_factory=dict)
    """Why a piece of evidence is missing, where that is not simply that nobody gave it."""
    findings: dict[str, Finding] = field(default_factory=dict)
    """Findings so far, by name of the check."""

    def missing(self, evidence: Evidence) -> str | None:
        """Say why a piece of evidence is not there; None if it is."""
        given = {
            Evidence.target: self.target,
            Evidence.recipe: self.recipe,
            Evidence.answers: self.answers,
            Evidence.decoder: self.decode,
        }
        return None if given[evidence] else self.remarks.get(evidence, evidence.value)

    @functools.cached_property
    def drafter(self) -> Drafter:
        """Give the loaded drafter, in float32 on the target's device; raises as the reader does."""
        drafter = load_checkpoint(self.folder)
        return drafter if self.target is None else drafter.to(self.target.device)

    @functools.cached_property
    def metadata(self) -> CheckpointMetadata | None:
        """Give our own facts about the checkpoint; None for a drafter of another toolkit."""
        return read_metadata(self.folder)

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """Give everything in `config.json`, as it stands there."""
        path = self.folder / CONFIG_NAME
        remedy = "Give the folder that training wrote, or export it again."
        demand(path.is_file(), f"{CONFIG_NAME} is missing.", remedy=remedy)
        try:
            content = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise broken(f"{CONFIG_NAME} is not JSON: {error}.", remedy=remedy) from error
        demand(isinstance(content, dict), f"{CONFIG_NAME} is not an object.", remedy=remedy)
        return content

    @functools.cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Give names and shapes of the tensors on disk."""
        remedy = "Copy the file again, or export it again."
        files = weight_files(self.folder)
        demand(bool(files), f"{WEIGHTS_NAME} is missing.", remedy=remedy)
        shapes: dict[str, list[int]] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
            except (OSError, SafetensorError) as error:
                raise broken(f"{path.name} cannot be read: {error}.", remedy=remedy) from error
        return shapes

    def value(self, key: str, *kinds: type) -> Any:
        """Give a value of `config.json` by its dotted key.

        Args:
            key: Such as `dflash_config.mask_token_id`.
            kinds: Types that are accepted; `type(None)` accepts null and an absent key.
        """
        found: Any = self.content
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        is_bool_for_number = isinstance(found, bool) and bool not in kinds
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        demand(
            isinstance(found, kinds) and not is_bool_for_number,
            f"{key} (={found}) must be {wanted}.",
            remedy="Export the checkpoint again, or set it to what training used.",
        )
        return found


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's report."""

    name: str
    examine: Callable[[Patient], Finding]
    """Gives the finding; a BrokenRuleError or a reader's ValueError is a failure."""
    evidence: tuple[Evidence, ...] = ()
    """What it looks at beside the checkpoint; without that it is skipped with the reason."""
    needs: tuple[str, ...] = ()
    """Checks that must not have failed or been skipped before this one makes sense."""


def run_check(check: Check, patient: Patient) -> Finding:
    """Run one check, whatever it meets, and name its finding."""
    return replace(_run(check, patient), check=check.name)


def _run(check: Check, patient: Patient) -> Finding:
    for evidence in check.evidence:
        reason = patient.missing(evidence)
        if reason is not None:
            return skipped(reason)
    unfit = (Status.failed, Status.skipped)
    unmet = [name for name in check.needs if patient.findings[name].status in unfit]
    if unmet:
        return skipped(f"needs {', '.join(unmet)}")
    try:
        return check.examine(patient)
    except BrokenRuleError as error:
        return error.finding
    except ValueError as error:  # a reader's message: value, rule and remedy
        return Finding(status=Status.failed, sentence=str(error))
