"""Read-only checks of a checkpoint against its target: one line and one remedy each.

    dflash-train doctor checkpoint=DIR target.name_or_path=NAME

A drafter that fits its tensors can still be worthless: a wrong tap, mask id or rotation changes no
shape and raises nothing, and the acceptance length is 1. Each check here is one such mistake, or
one server that would read the file otherwise. A further check is a function from the patient to a
finding and a line of CHECKS.
"""

from pathlib import Path

from dflash_train.features.target import Target
from dflash_train.release.config_checks import (
    check_files,
    check_format,
    check_mask_token,
    check_reading,
    check_shapes,
    check_taps,
)
from dflash_train.release.equivalence import check_equivalence
from dflash_train.release.finding import Check, Finding, Patient, run_check
from dflash_train.release.serving_checks import check_attention, check_rope, check_scales
from dflash_train.release.weight_checks import check_tensors

_FILES = ("files",)
CHECKS = (
    Check(name="files", examine=check_files),
    Check(name="format", examine=check_format, needs=_FILES),
    Check(name="taps", examine=check_taps, needs=_FILES),
    Check(name="mask token", examine=check_mask_token, needs=_FILES),
    Check(name="shapes", examine=check_shapes, needs=_FILES),
    Check(name="rope", examine=check_rope, needs=_FILES),
    Check(name="attention", examine=check_attention, needs=_FILES),
    Check(name="scales", examine=check_scales, needs=_FILES),
    # Our own reader comes last: what it refuses is said better above.
    Check(
        name="reading",
        examine=check_reading,
        needs=("format", "taps", "mask token", "shapes", "rope", "attention", "scales"),
    ),
    Check(name="tensors", examine=check_tensors, needs=("reading",)),
    Check(name="equivalence", examine=check_equivalence, needs=("tensors",)),
)


def examine(folder: Path, target: Target, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Run the checks in order.

    Args:
        folder: The checkpoint.
        target: The loaded target; its taps do not matter.
        checks: What to run; each may need those before it.
    """
    patient = Patient(folder=folder, target=target)
    for check in checks:
        patient.findings[check.name] = run_check(check, patient)
    return list(patient.findings.values())
