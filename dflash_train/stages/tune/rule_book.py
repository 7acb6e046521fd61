"""`promotion_rule.json` of a run: the rule, and who is compared with whom, before anything runs.

A rule that is chosen when the figures are known proves nothing. So it is written first, its hash
stands in the verdict and in the registry's history, and a run whose rule is changed later is judged
again and says by which rules it was judged before.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from dflash_train.records.manifest import content_hash, write_bytes
from dflash_train.release.promotion import PromotionRule

BOOK_NAME = "promotion_rule.json"
_FORMAT = "dflash-train/promotion-rule"


@dataclass(frozen=True, kw_only=True)
class RuleBook:
    """What a tuning has committed itself to."""

    run: str
    """Name of the run and a random mark: no two runs have the same book."""
    rule: PromotionRule
    incumbent: str
    """Hash of the drafter that serves, which the candidate must beat."""
    start: str
    """Hash of the drafter that training starts from."""
    judged_before: list[str] = field(default_factory=list)
    """Hashes of the books by which this run's window was judged already; a window that was looked
    at proves less than a new one."""

    @property
    def hash(self) -> str:
        """Hash of all of it."""
        return content_hash([_FORMAT, asdict(self)])

    def write(self, run_dir: Path) -> None:
        """Write it into the folder of a run, atomically."""
        content = asdict(self) | {
            "format": _FORMAT,
            "promoted_if": self.rule.sentences(),
            "hash": self.hash,
        }
        text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
        write_bytes(run_dir / BOOK_NAME, text + b"\n")


def read_book(run_dir: Path) -> RuleBook | None:
    """Read the book of a run; None before it was written.

    Raises:
        ValueError: It was changed by hand or is damaged.
    """
    path = run_dir / BOOK_NAME
    if not path.is_file():
        return None
    try:
        content = orjson.loads(path.read_bytes())
        book = RuleBook(
            run=content["run"],
            rule=PromotionRule(**content["rule"]),
            incumbent=content["incumbent"],
            start=content["start"],
            judged_before=content["judged_before"],
        )
        is_whole = book.hash == content["hash"] and book.rule.sentences() == content["promoted_if"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}). {_REMEDY}") from error
    if not is_whole:
        raise ValueError(f"{path} was changed after it was written. {_REMEDY}")
    return book


_REMEDY = "Set tune.min_requests and tune.tenant_margin in the command, and delete the file."
