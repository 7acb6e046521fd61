"""Drafters of every dialect: read, written, and read again before success is told.

    dflash-train export checkpoint=DIR format=zlab|speculators out=DIR

One drafter in memory, three layouts on disk (`Format`). A conversion is lossless or refused by the
name of what the layout cannot hold.
"""

from dflash_train.release.formats.conversion import (
    Written,
    carries_tables,
    read_drafter,
    write_drafter,
)
from dflash_train.release.formats.detection import Format, Imported, detect

__all__ = [
    "Format",
    "Imported",
    "Written",
    "carries_tables",
    "detect",
    "read_drafter",
    "write_drafter",
]
