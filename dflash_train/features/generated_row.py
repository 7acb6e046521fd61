"""The target's answer to one prompt, while it is written and when it is finished.

Legend: P prompt tokens, N output tokens, L taps, E hidden size, k teacher tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dflash_train.features.teacher import TeacherRow, join


@dataclass(kw_only=True)
class GeneratedRow:
    """The target's answer to one prompt."""

    output_ids: list[int]
    """`[N]`, with the stop token if there is one."""
    features: Tensor
    """`[P + N, L*E]`; the last row is zeros, since the last token is never fed."""
    finish_reason: str
    """`stop` or `length`."""
    teacher: TeacherRow | None
    """`[P + N, k]`, of the passes that wrote the answer; None where it was not asked for."""


class OpenRow:
    """One row while it is being generated."""

    def __init__(self, prompt: list[int]) -> None:
        """Begin with nothing written."""
        self.prompt_length = len(prompt)
        self.output_ids: list[int] = []
        self.features: list[Tensor] = []
        self.teacher: list[TeacherRow] = []

    def take(self, features: Tensor, token_id: int) -> None:
        """Keep the features of the tokens just fed (padding cut off) and the token they chose."""
        is_prefill = not self.features
        fed = features[-self.prompt_length :] if is_prefill else features
        self.features.append(fed.clone())
        self.output_ids.append(token_id)

    def is_finished(self, stop_ids: frozenset[int], max_new_tokens: int) -> bool:
        """Say whether the last token stops the answer or uses up the budget."""
        return self.output_ids[-1] in stop_ids or len(self.output_ids) >= max_new_tokens

    def close(self, stop_ids: frozenset[int]) -> GeneratedRow:
        """Give the finished row."""
        stopped = self.output_ids[-1] in stop_ids
        return GeneratedRow(
            output_ids=self.output_ids,
            features=functional.pad(torch.cat(self.features), (0, 0, 0, 1)),
            finish_reason="stop" if stopped else "length",
            teacher=join(self.teacher).over_the_row(self.prompt_length) if self.teacher else None,
        )
