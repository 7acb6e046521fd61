"""Read-only checks of a checkpoint: one line and one remedy each.

    dflash-train doctor checkpoint=DIR                                # the files alone
    dflash-train doctor checkpoint=DIR target.name_or_path=NAME       # and with their target
    dflash-train doctor recipe=NAME [checkpoint=DIR]                  # and with a run's answers

A drafter that fits its tensors can still be worthless: a wrong tap, mask id or rotation changes no
shape and raises nothing, and the acceptance length is 1. Each check here is one such mistake, or
one server that would read the file otherwise. The more stands beside the checkpoint, the more is
looked at; a check without its evidence is skipped and says what it wants. A further check is a
function from the patient to a finding and a line of CHECKS.
"""

import tempfile
from pathlib import Path

from dflash_train.config import RecipeConfig
from dflash_train.features.target import Target
from dflash_train.release.answer_checks import (
    check_acceptance,
    check_conventions,
    check_decoding,
)
from dflash_train.release.config_checks import (
    check_files,
    check_format,
    check_mask_token,
    check_reading,
    check_shapes,
    check_taps,
)
from dflash_train.release.equivalence import check_equivalence
from dflash_train.release.evidence import DecodePrompts, StoredAnswers
from dflash_train.release.finding import Check, Evidence, Finding, run_check
from dflash_train.release.layout_checks import admit, check_layout, check_round_trip
from dflash_train.release.serving_checks import check_attention, check_rope, check_scales
from dflash_train.release.training_checks import (
    check_origin,
    check_positions,
    check_recipe,
    check_thinking,
)
from dflash_train.release.weight_checks import check_golden_forward, check_tensors

_FILES, _LAYOUT = ("files",), ("layout",)
_TARGET, _RECIPE, _ANSWERS = Evidence.target, Evidence.recipe, Evidence.answers
CHECKS = (
    Check(name="files", examine=check_files),
    Check(name="layout", examine=check_layout, needs=_FILES),
    Check(name="format", examine=check_format, needs=_LAYOUT),
    Check(name="taps", examine=check_taps, needs=_LAYOUT),
    Check(name="mask token", examine=check_mask_token, needs=_LAYOUT),
    Check(name="shapes", examine=check_shapes, needs=_LAYOUT),
    Check(name="positions", examine=check_positions, needs=_LAYOUT),
    Check(name="rope", examine=check_rope, needs=_LAYOUT),
    Check(name="attention", examine=check_attention, needs=_LAYOUT),
    Check(name="scales", examine=check_scales, needs=_LAYOUT),
    # Our own reader comes last: what it refuses is said better above.
    Check(
        name="reading",
        examine=check_reading,
        needs=("format", "taps", "mask token", "shapes", "rope", "attention", "scales"),
    ),
    Check(name="tensors", examine=check_tensors, needs=("reading",)),
    Check(name="golden", examine=check_golden_forward, needs=("tensors",)),
    Check(name="round trip", examine=check_round_trip, needs=("tensors",)),
    Check(name="origin", examine=check_origin, evidence=(_TARGET,), needs=("taps",)),
    Check(name="recipe", examine=check_recipe, evidence=(_RECIPE, _TARGET), needs=("tensors",)),
    Check(name="thinking", examine=check_thinking, evidence=(_RECIPE,), needs=_LAYOUT),
    Check(name="equivalence", examine=check_equivalence, evidence=(_TARGET,), needs=("tensors",)),
    Check(
        name="decoding",
        examine=check_decoding,
        evidence=(_TARGET, Evidence.decoder),
        needs=("equivalence",),
    ),
    Check(
        name="conventions",
        examine=check_conventions,
        evidence=(_TARGET, _ANSWERS),
        needs=("tensors",),
    ),
    Check(
        name="acceptance",
        examine=check_acceptance,
        evidence=(_TARGET, _ANSWERS),
        needs=("conventions",),
    ),
)


def examine(
    folder: Path,
    target: Target | None = None,
    *,
    recipe: RecipeConfig | None = None,
    run_dir: Path | None = None,
    decode: DecodePrompts | None = None,
    checks: tuple[Check, ...] = CHECKS,
) -> list[Finding]:
    """Run the checks in order.

    Args:
        folder: The checkpoint.
        target: The loaded target; its taps do not matter. None leaves out what needs it.
        recipe: The recipe that trained the drafter, or that it will serve.
        run_dir: Folder of a run of this target, whose stored answers are replayed.
        decode: Decodes prompts with target and drafter.
        checks: What to run; each may need those before it.
    """
    with tempfile.TemporaryDirectory() as workspace:
        patient = admit(folder, target, workspace=Path(workspace))
        patient.recipe, patient.decode = recipe, decode
        if run_dir is not None and target is not None:
            try:
                data = None if recipe is None else recipe.data
                patient.answers = StoredAnswers.of_run(run_dir, target, data=data)
            except ValueError as error:
                patient.remarks[Evidence.answers] = str(error)
        for check in checks:
            patient.findings[check.name] = run_check(check, patient)
    return list(patient.findings.values())
