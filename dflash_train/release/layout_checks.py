"""The doctor's checks of the layout as a whole: which dialect it is, and what survives conversion.

The other checks read z-lab's layout. A drafter in the speculators layout, or in one that leaves
keys out, is turned into that one in a temporary folder first, and that is what is looked at.
"""

import tempfile
from pathlib import Path

from dflash_train.drafter.checkpoint import (
    build_drafter,
    describe_config,
    read_config,
    read_tensors,
    write_folder,
)
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata
from dflash_train.features.target import Target
from dflash_train.release.config_checks import text_config
from dflash_train.release.finding import Finding, Patient, broken, ok, skipped, warning
from dflash_train.release.formats import Format, Imported, detect, read_drafter, write_drafter

WRITTEN = (Format.zlab, Format.speculators)
LAYOUTS = {
    Format.zlab: "z-lab's layout.",
    Format.speculators: "the speculators layout; what follows reads it as z-lab's.",
    Format.specforge_export: "z-lab's layout with keys left out, which servers fill differently.",
    Format.specforge_state: "a training state of SpecForge.",
}


def admit(folder: Path, target: Target | None, *, workspace: Path) -> Patient:
    """Give the patient of a folder, in the layout that the checks read.

    Args:
        folder: The checkpoint, in any dialect.
        target: Helps to read files that leave to it what it knows.
        workspace: An empty folder for a converted checkpoint.
    """
    patient = Patient(folder=folder, target=target)
    try:
        kind = detect(folder)
    except ValueError:  # the check of files says what is wrong, in one line
        return patient
    is_ours = (folder / METADATA_NAME).is_file()  # then no key may be left out
    if kind is Format.zlab or (is_ours and kind is not Format.speculators):
        return patient
    patient.dialect = kind
    try:
        imported = _read(folder, target)
    except ValueError as error:
        patient.unreadable = str(error)
        return patient
    converted = workspace / "converted"
    _write_zlab(imported, converted)
    return Patient(folder=converted, target=target, notes=imported.notes, dialect=imported.format)


def _read(folder: Path, target: Target | None) -> Imported:
    if target is None:
        return read_drafter(folder)
    facts = {"num_hidden_layers": text_config(target).num_hidden_layers}
    return read_drafter(folder, target=facts, head=target.head)


def _write_zlab(imported: Imported, folder: Path) -> None:
    drafter = imported.drafter
    dtype = str(drafter.fc.weight.dtype).removeprefix("torch.")
    write_folder(
        folder,
        content=describe_config(drafter.config, dtype),
        tensors=drafter.state_dict(),
        metadata=imported.metadata or CheckpointMetadata(),
    )


def check_layout(patient: Patient) -> Finding:
    """Check that the dialect is one that can be read, and say what its reader noticed."""
    layout, unreadable = LAYOUTS[patient.dialect], patient.unreadable
    if unreadable is not None and patient.dialect is Format.speculators and patient.target is None:
        return skipped(f"the speculators layout: {unreadable}")
    if unreadable is not None:
        raise broken(unreadable, remedy="")
    found = " ".join([layout, *patient.notes])
    if patient.dialect is Format.specforge_export:
        return warning(found, remedy="Write it whole: `dflash-train export format=zlab`.")
    return ok(found)


def check_round_trip(patient: Patient) -> Finding:
    """Check that every dialect we write either gives the same bits back or refuses by name."""
    drafter = build_drafter(
        read_config(patient.folder), read_tensors(patient.folder), patient.folder
    )
    head = None if patient.target is None else patient.target.head
    held, refused = [], []
    for kind in WRITTEN:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / kind.value
            try:
                write_drafter(
                    drafter,
                    copy,
                    format=kind,
                    metadata=patient.metadata,
                    target={"name": "unknown"},
                    head=head,
                )
                held.append(kind.value)
            except (ValueError, RuntimeError) as error:
                if copy.exists() or isinstance(
                    error, RuntimeError
                ):  # it was written, and came back otherwise
                    raise broken(str(error), remedy="Keep the layout it has.") from error
                refused.append(str(error))  # the layout has no place for it
    same = (
        f"same bits and settings through {', '.join(held)}." if held else "nothing was converted."
    )
    return ok(" ".join([same, *refused]))
