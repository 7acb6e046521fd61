"""Token ids as serving engines log them."""

from typing import Annotated, Any

from msgspec import DecodeError, Meta, ValidationError, convert
from msgspec.json import Decoder

from dflash_data.drops import DropReason, UnusableError

TokenIds = list[Annotated[int, Meta(ge=0, lt=2**32)]]
LOGGED_IDS = Decoder(TokenIds)


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
        return convert(value, TokenIds)
    except ValidationError:
        is_cut = cut is not None and cut in value
        raise UnusableError(DropReason.truncated_log if is_cut else DropReason.unparsable) from None


def parse_token_ids(text: str) -> list[int]:
    """Read token ids that stand one after another, with commas between them.

    Raises:
        UnusableError: They are no ids.
    """
    try:
        return LOGGED_IDS.decode(f"[{text}]")  # much faster than a look at each parsed number
    except DecodeError:
        raise UnusableError(DropReason.unparsable) from None
