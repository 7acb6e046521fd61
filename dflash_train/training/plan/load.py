"""What a micro-batch holds: counted from collected features, or as the recipe allows.

Legend: T context rows, A blocks, K slots of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from dflash_train.config import RecipeConfig
from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.store import IndexLine
from dflash_train.training.batching import plan_epoch


@dataclass(frozen=True, kw_only=True)
class Load:
    """One micro-batch; a mean of many may hold fractions."""

    rows: float
    tokens: float
    """Of the rows."""
    context: float
    """T, feature rows that some block sees."""
    blocks: float
    """A."""
    labels: float
    """Slots with a label, which meet the LM head."""
    pairs: float
    """Pairs of a block and a context row that it sees: A times the mean of its anchors."""

    def __add__(self, other: "Load") -> "Load":
        """Add two parts of one micro-batch."""
        return Load(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(Load)
            }
        )

    def scaled(self, factor: float) -> "Load":
        """Give `factor` of it."""
        return Load(**{field.name: factor * getattr(self, field.name) for field in fields(Load)})


def row_load(
    num_tokens: float, prompt_length: float, *, num_anchors: int, drafter: DrafterConfig
) -> Load:
    """Give what one row is expected to add to its micro-batch.

    Anchors are drawn uniformly from the answer's tokens but the last; a block's labels end with the
    answer.
    """
    eligible = max(0.0, num_tokens - prompt_length - 1)
    blocks = min(float(num_anchors), eligible)
    reach = [
        min(1.0, max(0.0, (eligible + 1 - ahead) / eligible)) if eligible else 0.0
        for ahead in range(1, drafter.num_drafts + 1)
    ]
    last_anchor = prompt_length + eligible * blocks / (blocks + 1)
    return Load(
        rows=1.0,
        tokens=num_tokens,
        context=last_anchor if blocks else 0.0,
        blocks=blocks,
        labels=blocks * sum(reach),
        pairs=blocks * (prompt_length + (eligible - 1) / 2),
    )


@dataclass(frozen=True, kw_only=True)
class Loads:
    """The micro-batches of a run."""

    mean: Load
    largest: Load
    """The one with the most blocks."""
    source: str
    """Where the figures come from, as words to print."""


def loads_of_features(
    lines: Sequence[IndexLine],
    config: RecipeConfig,
    drafter: DrafterConfig,
    *,
    most_rows: int | None = None,
) -> Loads:
    """Count the packs of the first epoch.

    Args:
        lines: Index of the training split.
        config: The recipe: anchors, pack and seed.
        drafter: The drafter's shape.
        most_rows: Rows that are looked at, the first ones; None takes all.
    """
    kept = [line for line in lines if line.num_tokens - line.prompt_length >= 2][:most_rows]
    settings = config.training
    rows = [
        row_load(
            line.num_tokens, line.prompt_length, num_anchors=settings.num_anchors, drafter=drafter
        )
        for line in kept
    ]
    packs = plan_epoch(
        [line.num_tokens for line in kept],
        pack_tokens=settings.pack_tokens,
        seed=config.seed,
        epoch=0,
    )
    loads = [_sum([rows[row] for row in pack]) for pack in packs]
    return Loads(
        mean=_sum(loads).scaled(1 / len(loads)),
        largest=max(loads, key=lambda load: load.blocks),
        source=f"{len(kept)} rows of collected features",
    )


def loads_of_recipe(config: RecipeConfig, drafter: DrafterConfig) -> Loads:
    """Take rows of `plan.row_tokens`, or the longest that the recipe allows, all alike."""
    data, settings = config.data, config.training
    longest = data.max_prompt_tokens + data.max_new_tokens
    tokens = config.plan.row_tokens or longest
    num_rows = max(1, settings.pack_tokens // tokens)
    prompt = tokens * data.max_prompt_tokens / longest
    row = row_load(tokens, prompt, num_anchors=settings.num_anchors, drafter=drafter)
    load = row.scaled(num_rows)
    return Loads(
        mean=load,
        largest=load,
        source=f"no features yet: rows of {tokens} tokens, {num_rows} in a pack (plan.row_tokens)",
    )


def _sum(loads: list[Load]) -> Load:
    total = loads[0]
    for load in loads[1:]:
        total += load
    return total
