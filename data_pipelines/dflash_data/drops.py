"""Why a record leaves the pipeline: a closed list, shown whole in every manifest.

A data stage never drops silently. A step that removes something names a `DropReason`; the
names carry no log content, so they may appear in messages and reports.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dflash_train.records.conversation import Conversation


class DropReason(Enum):
    """Every reason for which a logged call may be missing from a stage's output."""

    unparsable = "unparsable"
    content_missing = "content_missing"
    truncated_log = "truncated_log"
    not_success = "not_success"
    content_filter = "content_filter"
    tool_error = "tool_error"
    empty_output = "empty_output"
    extra_choice = "extra_choice"
    stream_fragment = "stream_fragment"
    cache_hit = "cache_hit"
    non_text = "non_text"
    unknown_role = "unknown_role"
    bad_tool_order = "bad_tool_order"
    duplicate = "duplicate"
    cluster_cap = "cluster_cap"
    off_policy = "off_policy"
    ids_mismatch = "ids_mismatch"
    unstable_boundary = "unstable_boundary"
    no_supervised_token = "no_supervised_token"
    too_long = "too_long"
    secret_in_answer = "secret_in_answer"
    excluded_tenant = "excluded_tenant"
    expired = "expired"
    contaminated = "contaminated"
    straddles_cut = "straddles_cut"


ASKED_FOR = frozenset({DropReason.excluded_tenant, DropReason.expired})
"""What the recipe leaves out by intent; however many, nothing is wrong with the log."""


@dataclass(frozen=True)
class Drop:
    """One call that was read but not kept."""

    reason: DropReason


Call = Conversation | Drop
"""What an adapter gives for one logged call."""


class UnusableError(Exception):
    """Stop reading a log line at any depth; the adapter turns it into a `Drop`."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def all_reasons(counts: Mapping[DropReason, int]) -> dict[str, int]:
    """Give the count of every reason by name, zeros included, in the order of the list."""
    return {reason.value: counts.get(reason, 0) for reason in DropReason}


def worst_first(counts: Mapping[str, int]) -> str:
    """Write the reasons that occurred for a message: `unparsable 12, not_success 3`."""
    occurred = sorted((item for item in counts.items() if item[1]), key=lambda item: -item[1])
    return ", ".join(f"{reason} {count}" for reason, count in occurred) or "none"
