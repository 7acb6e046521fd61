"""The teacher: the target's next-token distributions, kept as the top k and the rest's mass.

Row t of a stored row is the target's distribution of the token at t + 1, so a label at position p
uses row p - 1. Only the rows before answer tokens carry one (P - 1 .. N - 2 of N tokens, P of them
prompt); the others are zeros, which no distribution is. Probabilities are float32: k is small
(8 bytes per kept token, 64 per row at k = 8, where SmolLM2's features take 5760), while float16 in
steps of 2^-11 near 1 would lose the rest mass of every confident row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.config import require

KEPT_TOKEN_BYTES = 8
"""Stored bytes of one kept token: an int32 id and a float32 probability."""


@dataclass(kw_only=True)
class TeacherRow:
    """The k most probable next tokens at each of N positions."""

    ids: Tensor
    """`[N, k]` int32, most probable first: greedily, the first is the token that follows."""
    probabilities: Tensor
    """`[N, k]` float32; a row of zeros carries no distribution."""

    @property
    def rest_mass(self) -> Tensor:
        """Give `[N]`: the mass outside the top k, never negative; 1 where nothing is carried."""
        return (1 - self.probabilities.sum(-1)).clamp(min=0)

    def split(self, sizes: list[int]) -> "list[TeacherRow]":
        """Cut along N into pieces of the given sizes."""
        pieces = zip(self.ids.split(sizes), self.probabilities.split(sizes), strict=True)
        return [TeacherRow(ids=ids, probabilities=mass) for ids, mass in pieces]

    def over_the_row(self, prompt_length: int) -> "TeacherRow":
        """Lay the distributions of the answer's tokens out over prompt and answer.

        Args:
            prompt_length: P, at least 1; `self` holds one position per answer token.

        Returns:
            Row P - 1 is the first token's, the rows before it and the last one are zeros.
        """
        frame = (0, 0, prompt_length - 1, 1)
        return TeacherRow(
            ids=functional.pad(self.ids, frame),
            probabilities=functional.pad(self.probabilities, frame),
        )


def join(pieces: list[TeacherRow]) -> TeacherRow:
    """Put pieces behind one another along N."""
    return TeacherRow(
        ids=torch.cat([piece.ids for piece in pieces]),
        probabilities=torch.cat([piece.probabilities for piece in pieces]),
    )


def top_tokens(logits: Tensor, top_k: int) -> TeacherRow:
    """Keep the top k of softmax(logits), computed in float32.

    Args:
        logits: `[N, V]`, as the target gives them out, its own scale and soft cap included.
        top_k: k, 1 .. V.

    Raises:
        ValueError: k is larger than V.
    """
    require(
        top_k <= logits.shape[-1],
        f"data.teacher_top_k (={top_k}) must be at most the target's vocabulary of "
        f"{logits.shape[-1]} ids. Set it to 8.",
    )
    # Equal logits are common in bfloat16, and topk may begin with another one than argmax does,
    # which wrote the token: lift that one above all.
    chosen = logits.argmax(-1, keepdim=True)
    ids = logits.scatter(-1, chosen, torch.inf).topk(top_k).indices
    probabilities = logits.float().softmax(-1).gather(-1, ids)
    return TeacherRow(ids=ids.int(), probabilities=probabilities)
