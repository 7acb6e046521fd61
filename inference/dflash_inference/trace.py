"""What one request went through, step by step: one format for every way of decoding.

Live decoding, plain decoding, replay and prompt lookup all write `DecodeTrace` lines, so one
reader, one statistic and one comparison serve them all. Files are JSON lines, written whole
or not at all.
"""

from dataclasses import dataclass, field
from pathlib import Path

import orjson

from dflash_train.records.manifest import write_bytes

TRAFFIC_SPLIT = "test"
"""The split of held-out traffic; evaluation sets are splits named `eval-NAME`."""


@dataclass(kw_only=True)
class StepTrace:
    """One verify step. Times are 0 where no target ran."""

    start: int
    """Position of the anchor."""
    width: int
    """Tokens that verify reads: the anchor and width - 1 drafts; 1 where nothing was drafted.

    It is the ceiling of this step's acceptance length, but for a tree (`num_levels`). Slots of the
    drafter's block are another number: a plain block has as many, DSpark's shifted block one fewer.
    """
    num_accepted: int
    """Drafted tokens that verify kept, before the stop token or the budget clipped them."""
    committed: int
    """Tokens that joined the output, after clipping."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    bookkeeping_s: float = 0.0
    source: str = "drafter"
    """Who proposed: `drafter`, `lookup` (copied from the text before), or `none`."""
    tree_depth: int = 0
    """Deepest node of a tree of width - 1 drafts; 0 says that the drafts are a chain."""

    @property
    def num_levels(self) -> int:
        """Drafted tokens that verify could have kept: the ceiling of `num_accepted`."""
        return self.tree_depth or self.width - 1

    @property
    def acceptance_length(self) -> int:
        """Tokens this step commits when nothing clips it: `num_accepted + 1`."""
        return self.num_accepted + 1


@dataclass(kw_only=True)
class TopTwo:
    """The two best tokens of the target at one output position, best first."""

    ids: tuple[int, int]
    logits: tuple[float, float]

    @property
    def gap(self) -> float:
        """How far the best logit is ahead, at least 0."""
        return self.logits[0] - self.logits[1]


@dataclass(kw_only=True)
class DecodeTrace:
    """One request: its output and every step that led there."""

    id: str = ""
    """Record id of the request; empty until its caller names it."""
    group: str = ""
    """Tenant or evaluation set, for slices."""
    conversation: str = ""
    """Session it belongs to, the unit of the bootstrap; its own id if it stands alone."""
    weight: int = 1
    """How many logged calls it stands for."""
    prompt_length: int
    block_size: int
    """K of the drafter, 1 for plain decoding. A full step verifies K tokens, K + 1 of DSpark's."""
    output_ids: list[int]
    """Tokens after the prompt, the one from prefill first, the stop token included."""
    steps: list[StepTrace]
    prefill_s: float = 0.0
    finish_reason: str
    """`stop`, `length` or `cancelled`."""
    top_two: list[TopTwo] = field(default_factory=list)
    """One entry per output token in plain decoding, else empty."""

    @property
    def last_position(self) -> int:
        """Position of the last output token."""
        return self.prompt_length + len(self.output_ids) - 1

    @property
    def decode_s(self) -> float:
        """Seconds spent after prefill; a step shared by several requests counts in equal parts."""
        return sum(step.draft_s + step.verify_s + step.bookkeeping_s for step in self.steps)

    @classmethod
    def from_json(cls, line: bytes) -> "DecodeTrace":
        """Read one line of a trace file."""
        fields = orjson.loads(line)
        fields["steps"] = [StepTrace(**step) for step in fields["steps"]]
        fields["top_two"] = [
            TopTwo(ids=tuple(pair["ids"]), logits=tuple(pair["logits"]))
            for pair in fields["top_two"]
        ]
        return cls(**fields)


def group_of(tenant: str | None, *, split: str) -> str:
    """Name the slice a request belongs to: its tenant, its evaluation set, or the split."""
    return tenant or split.removeprefix("eval-")


def steps_of(
    starts: list[int], num_accepted: list[int], widths: list[int], *, last_position: int
) -> list[StepTrace]:
    """Turn the chain of a replay into steps; the last one is clipped at `last_position`."""
    return [
        StepTrace(
            start=start,
            width=width,
            num_accepted=accepted,
            committed=min(accepted + 1, last_position - start),
        )
        for start, accepted, width in zip(starts, num_accepted, widths, strict=True)
    ]


def write_traces(path: Path, traces: list[DecodeTrace]) -> None:
    """Write one JSON line per trace, atomically."""
    write_bytes(path, b"".join(orjson.dumps(trace) + b"\n" for trace in traces))


def read_traces(path: Path) -> list[DecodeTrace]:
    """Read a file of `write_traces`.

    Raises:
        ValueError: A line is damaged or of another version.
    """
    try:
        return [DecodeTrace.from_json(line) for line in path.read_bytes().splitlines()]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds a line that is no decode trace ({type(error).__name__}). "
            "Run the stage 'evaluate' again with --force."
        ) from error


@dataclass(kw_only=True)
class StepDifference:
    """Where two traces part: the index of the step and what each did there (None: no such step)."""

    index: int
    first: StepTrace | None
    second: StepTrace | None


def first_difference(
    first: DecodeTrace, second: DecodeTrace, *, counts_are_clipped: bool = False
) -> StepDifference | None:
    """Find the first step at which two traces of one request differ; None if they never do.

    Start, width and tokens committed must agree, and so must `num_accepted` up to the last output
    token: verify may look past a stop token, replay has nothing stored there.

    Args:
        first: One trace.
        second: Another trace of the same request.
        counts_are_clipped: True if one of them comes from a tool that records accepted tokens
            after clipping; the last step is then compared by its committed tokens alone.
    """

    def identity(trace: DecodeTrace, step: StepTrace) -> tuple[int, ...]:
        accepted = min(step.num_accepted, trace.last_position - step.start)
        counted = () if counts_are_clipped else (accepted,)
        return (step.start, step.width, step.committed, *counted)

    for index in range(max(len(first.steps), len(second.steps))):
        mine = first.steps[index] if index < len(first.steps) else None
        other = second.steps[index] if index < len(second.steps) else None
        if mine is None or other is None or identity(first, mine) != identity(second, other):
            return StepDifference(index=index, first=mine, second=other)
    return None


def num_matching_tokens(first: list[int], second: list[int]) -> int:
    """Count the tokens before the first difference of two outputs."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def token_match_rate(first: list[int], second: list[int]) -> float:
    """Give matching tokens before the first difference, over the longer length (1 if identical)."""
    longer = max(len(first), len(second))
    return num_matching_tokens(first, second) / longer if longer else 1.0
