"""Is live decoding what it claims to be: replay step by step, plain decoding token by token?

Two ways of computing the same logits may round differently and flip a near-tie, so a mismatch is
never hidden and never assumed harmless: it is listed with both logits and called a near-tie only
if their gap is at rounding level of the target's number format.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from dflash_inference.trace import (
    DecodeTrace,
    first_difference,
    num_matching_tokens,
    token_match_rate,
)
from dflash_train.records.manifest import write_bytes

LIVE_CHECK_FILE = "live-check.json"
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Largest gap of a near-tie relative to the top logit, or to 1 if that is smaller."""


@dataclass(kw_only=True)
class Mismatch:
    """Where speculative output parts from plain output, in the words of plain decoding."""

    position: int
    """Index into the output."""
    plain_token: int
    speculative_token: int
    plain_logit: float
    """Of the token that plain decoding chose, its best."""
    runner_up_logit: float
    gap: float
    is_near_tie: bool
    """The speculative token is plain decoding's runner-up, and the gap is at rounding level."""


@dataclass(kw_only=True)
class LiveCheck:
    """One request decoded live, against replay, plain decoding and the stored answer."""

    id: str
    group: str
    num_output_tokens: int
    num_steps: int
    num_steps_equal: int
    """Steps before the first that differs from replay; equal to `num_steps` if none does."""
    equals_replay: bool
    token_match_rate: float
    mismatch: Mismatch | None
    batch_match_rate: float
    """Plain decoding against the target alone in a batch: the noise floor of rounding."""
    stored_match_rate: float
    """Plain decoding against the stored answer, whoever wrote it and however it was sampled."""


def find_mismatch(
    plain: DecodeTrace, speculative: DecodeTrace, *, dtype: torch.dtype
) -> Mismatch | None:
    """Explain the first token that differs; None if the outputs are identical."""
    position = num_matching_tokens(plain.output_ids, speculative.output_ids)
    if position == len(plain.output_ids) == len(speculative.output_ids):
        return None
    best = plain.top_two[position]
    other = speculative.output_ids[position]
    limit = NEAR_TIE[dtype] * max(1.0, abs(best.logits[0]))
    return Mismatch(
        position=position,
        plain_token=best.ids[0],
        speculative_token=other,
        plain_logit=best.logits[0],
        runner_up_logit=best.logits[1],
        gap=best.gap,
        is_near_tie=other == best.ids[1] and best.gap <= limit,
    )


def check_live(
    live: DecodeTrace,
    *,
    plain: DecodeTrace,
    replayed: DecodeTrace,
    batch_ids: list[int],
    stored_ids: list[int],
    dtype: torch.dtype,
) -> LiveCheck:
    """Compare one live request with its replay, with plain decoding and with the stored answer.

    Args:
        live: Speculative decoding.
        plain: Plain decoding of the same prompt and budget.
        replayed: Replay of the live output, its features from one teacher-forced pass.
        batch_ids: The target's output of the same prompt and budget, decoded in a batch.
        stored_ids: The answer in the feature store; compared as far as both budgets reach.
        dtype: Number format of the target, which says what rounding level is.
    """
    difference = first_difference(live, replayed)
    shared = min(len(stored_ids), len(plain.output_ids))
    return LiveCheck(
        id=live.id,
        group=live.group,
        num_output_tokens=len(live.output_ids),
        num_steps=len(live.steps),
        num_steps_equal=len(live.steps) if difference is None else difference.index,
        equals_replay=difference is None,
        token_match_rate=token_match_rate(plain.output_ids, live.output_ids),
        mismatch=find_mismatch(plain, live, dtype=dtype),
        batch_match_rate=token_match_rate(plain.output_ids, batch_ids),
        stored_match_rate=token_match_rate(plain.output_ids[:shared], stored_ids[:shared]),
    )


def write_checks(path: Path, checks: list[LiveCheck]) -> None:
    """Write all checks as one JSON file, atomically."""
    content = {"requests": [asdict(check) for check in checks]}
    write_bytes(path, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


def read_checks(path: Path) -> list[LiveCheck]:
    """Read a file of `write_checks`.

    Raises:
        ValueError: The file is damaged or of another version.
    """
    try:
        requests: list[dict[str, Any]] = orjson.loads(path.read_bytes())["requests"]
        for request in requests:
            found = request["mismatch"]
            request["mismatch"] = None if found is None else Mismatch(**found)
        return [LiveCheck(**request) for request in requests]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no live check ({type(error).__name__}). "
            "Run the stage 'evaluate' again with --force."
        ) from error
