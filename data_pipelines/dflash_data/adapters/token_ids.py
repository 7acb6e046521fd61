"""Token ids as serving engines log them."""

from array import array
from typing import Any

from dflash_data.drops import DropReason, UnusableError

UINT32 = "I"
"""Type of an array that takes whole numbers from 0 up only; much faster than a look at each."""


def read_token_ids(value: Any, *, cut: str | None = None) -> list[int] | None:
    """Give a list of token ids; None if it is absent or empty.

    Args:
        value: What the log holds.
        cut: What the log writes in place of the ids that it left out.

    Raises:
        UnusableError: It is no list of ids, or ids were left out.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise UnusableError(DropReason.unparsable)
    try:
        return array(UINT32, value).tolist()
    except (TypeError, OverflowError):
        is_cut = cut is not None and cut in value
        raise UnusableError(DropReason.truncated_log if is_cut else DropReason.unparsable) from None
