"""The verb `export`: a drafter of any dialect, written in one that servers read.

dflash-train export checkpoint=DIR format=zlab|speculators out=DIR [target.name_or_path=NAME]
"""

from pathlib import Path
from typing import Any

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.metadata import METADATA_NAME
from dflash_train.release.formats import Format, Written, write_drafter
from dflash_train.stages.drafters import import_drafter, target_facts, target_head
from dflash_train.stages.workshop import Workshop

EXPORT_FORMATS = (Format.zlab.value, Format.speculators.value)


def export_checkpoint(config: RecipeConfig, *, format_name: str, out: str) -> Written:
    """Write the recipe's drafter in a dialect; what is written is read back and compared.

    Args:
        config: `checkpoint` is the drafter, `target` what it was trained for.
        format_name: `zlab` or `speculators`.
        out: The folder; an earlier export in it is replaced, anything else is not.

    Raises:
        ValueError: The format cannot hold the drafter, `out` holds something else, or the target
            is another one.
    """
    require(
        format_name in EXPORT_FORMATS,
        f"export: format (={format_name}) must be one of {', '.join(EXPORT_FORMATS)}. "
        f"Add format={EXPORT_FORMATS[0]}.",
    )
    require(bool(out), "export: out must be set: add out=DIR.")
    source, folder = Workshop(config).checkpoint, Path(out)
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(
        folder.resolve() != source.resolve() and (is_free or (folder / METADATA_NAME).is_file()),
        f"export: out (={out}) holds something else, which would be replaced. Give a new folder.",
    )
    imported = import_drafter(source, config.target, dtype=None)
    chosen, shape = Format(format_name), imported.drafter.config
    target = head = None
    if chosen is Format.speculators:
        target = target_facts(config.target)
        _check_target(target, shape)
        head = None if shape.draft_vocab_size is None else target_head(config.target)
    return write_drafter(
        imported.drafter,
        folder,
        format=chosen,
        metadata=imported.metadata,
        target=target,
        head=head,
    )


def _check_target(target: dict[str, Any], shape: DrafterConfig) -> None:
    """Refuse a target that cannot be the one the drafter was trained for."""
    wanted = {
        "num_hidden_layers": shape.num_target_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
    }
    wrong = [f"{name} {target[name]}, not {size}" for name, size in wanted.items()
             if target[name] != size]  # fmt: skip
    require(
        not wrong,
        f"target.name_or_path (={target['name']}) has {', '.join(wrong)}: the drafter was trained "
        "for another target. Set target.name_or_path to that one.",
    )
