"""The target's tables in the speculators layout: written for a reduced vocabulary, else dropped.

The drafter borrows embedding and head. Where only some ids can be drafted, readers want the head's
rows of those ids in the file; older files carry whole copies, which say nothing new if they are
the target's and cannot be kept if they are not.
"""

from pathlib import Path

from torch import Tensor

from dflash_train.config import require
from dflash_train.features.frozen_head import FrozenHead

BORROWED = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight")
"""Copies of the target's tables that older files carry."""


def add_tables(tensors: dict[str, Tensor], head: FrozenHead | None) -> dict[str, Tensor]:
    """Add what readers want of a reduced vocabulary: the head's rows and `t2d`.

    Raises:
        ValueError: The vocabulary is reduced and there is no target to take the rows from.
    """
    if "d2t" not in tensors:
        return tensors
    require(
        head is not None,
        "drafter.draft_vocab_size: the speculators layout carries the target's rows for the ids "
        "that can be drafted. Set target.name_or_path to the target.",
    )
    assert head is not None
    ids = tensors["d2t"] + _counting(tensors["d2t"])
    t2d = ids.new_zeros(len(head.lm_head_weight)).bool()
    t2d[ids] = True
    rows = head.lm_head_weight.detach().cpu()[ids].to(tensors["fc.weight"].dtype)
    return tensors | {"t2d": t2d, "lm_head.weight": rows}


def drop_tables(
    tensors: dict[str, Tensor], head: FrozenHead | None, folder: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Drop copies of the target's tables after comparing them, and say so.

    Raises:
        ValueError: They differ from the target's, or there is no target to compare with.
    """
    own = {name: value for name, value in tensors.items() if name not in (*BORROWED, "t2d")}
    own.pop("verifier_norm.weight", None)  # only training looks at it
    copies = {name: tensors[name] for name in BORROWED if name in tensors}
    if not copies:
        return own, []
    names = ", ".join(copies)
    require(
        head is not None,
        f"checkpoint (={folder}) carries {names}; the drafter borrows the target's. Set "
        "target.name_or_path to the target, to see that they are the same.",
    )
    assert head is not None
    ids = None if "d2t" not in tensors else tensors["d2t"] + _counting(tensors["d2t"])
    for name, copy in copies.items():
        table = head.embedding_weight if name == "embed_tokens.weight" else head.lm_head_weight
        rows = table if ids is None or name == "embed_tokens.weight" else table[ids]
        same = rows.shape == copy.shape and bool((rows.cpu().to(copy.dtype) == copy).all())
        require(
            same,
            f"checkpoint (={folder}): {name} differs from the target's, and the drafter has no "
            "place for a table of its own. Give the target it was trained with, if it is another.",
        )
    return own, [f"{names}: equal to the target's, dropped."]


def _counting(d2t: Tensor) -> Tensor:
    return d2t.new_ones(len(d2t)).cumsum(0) - 1
