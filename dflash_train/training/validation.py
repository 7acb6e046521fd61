"""Validation: rows spread over the split, replayed by all ranks together.

Replay gives the acceptance length itself, from stored answers, so the best checkpoint is the one
that drafts best and not the one of the lowest loss.
"""

from typing import Any

from dflash_train.config import require
from dflash_train.drafter.model import Drafter
from dflash_train.features.frozen_head import FrozenHead
from dflash_train.features.row_source import RowSource
from dflash_train.training.accelerator import Accelerator, sum_over_ranks
from dflash_train.training.metrics import AcceptanceCounts
from dflash_train.training.replay import replay_many


def replay_validation_rows(
    drafter: Drafter,
    head: FrozenHead,
    store: RowSource,
    *,
    max_rows: int,
    accelerator: Accelerator,
) -> AcceptanceCounts:
    """Replay up to `max_rows` rows, spread evenly over the split, shared among ranks.

    Args:
        drafter: The whole drafter, the same on every rank.
        head: The target's embedding and LM head, on the drafter's device.
        store: The validation split.
        max_rows: Rows replayed, at most.
        accelerator: Tells which rows are this rank's, and adds the counts up.

    Raises:
        ValueError: No row has a step to replay.
    """
    num_rows = min(len(store), max_rows)
    chosen = [number * len(store) // num_rows for number in range(num_rows)]
    own = chosen[accelerator.process_index :: accelerator.num_processes]
    own_counts = replay_many(drafter, head, store.read(own))
    counts = AcceptanceCounts.from_tensor(sum_over_ranks(accelerator, own_counts.to_tensor()))
    require(
        counts.num_steps > 0,
        f"{store.folder} has no answer of two tokens or more, so no step can be replayed. "
        "Raise data.validation_share or data.max_new_tokens.",
    )
    return counts


def validation_values(counts: AcceptanceCounts) -> dict[str, Any]:
    """Give what a line of metrics.jsonl says about a validation."""
    lengths = {"pooled": counts.pooled, "per_request": counts.per_request}
    return {
        "validation": {
            "acceptance_length": lengths,
            "acceptance_by_position": counts.by_position,
            "num_requests": counts.num_requests,
        }
    }
