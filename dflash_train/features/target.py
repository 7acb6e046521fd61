"""The frozen target: it answers prompts, and its tap layers give the drafter's features.

A tap with id k is the output of decoder layer k (0-based), `hidden_states[k + 1]` in
Transformers, before the final norm. Taps are read by hooks on those layers alone, so no other
layer's states are kept. Legend: B rows, Q new tokens, L taps, E hidden size, V vocabulary,
P prompt tokens, N output tokens.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import TargetConfig, require
from dflash_train.features.sampling import RowSampler
from dflash_train.features.target_loading import load_model, load_tokenizer, stop_token_ids
from dflash_train.features.target_text import target_block, vocabulary_hash
from dflash_train.features.target_weights import locate_target
from dflash_train.features.teacher import TeacherRow, join, top_tokens

_LOGIT_ROWS = 256
"""Answer tokens whose logits `[rows, V]` exist at once when a finished row is read."""


@dataclass(kw_only=True)
class FrozenHead:
    """The target's embedding table and LM head, which the drafter borrows."""

    embedding_weight: Tensor
    """`[V, E]`."""
    lm_head_weight: Tensor
    """`[V, E]`; the same tensor as the embedding where the target ties them. `[Vd, E]` where only
    some ids can be drafted."""
    draft_token_ids: Tensor | None = None
    """`[Vd]` int64, ascending: the target's id of each row of the head; None means all V."""

    def embed(self, ids: Tensor) -> Tensor:
        """Look up raw rows `[..., E]`, without any scale of the target's embedding module."""
        return functional.embedding(ids, self.embedding_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply `[..., E]` hidden states with the head: `[..., V]`, or `[..., Vd]`."""
        return functional.linear(hidden, self.lm_head_weight)

    def restricted(self, ids: Tensor) -> "FrozenHead":
        """Give the head of a reduced draft vocabulary, from a full one.

        Args:
            ids: `[Vd]` int64, ascending ids of the target's vocabulary.
        """
        assert self.draft_token_ids is None
        ids = ids.to(self.lm_head_weight.device)
        return FrozenHead(
            embedding_weight=self.embedding_weight,
            lm_head_weight=self.lm_head_weight[ids],
            draft_token_ids=ids,
        )

    def to_target_ids(self, index: Tensor) -> Tensor:
        """Turn rows of the head, such as an argmax, into ids of the target's vocabulary."""
        return index if self.draft_token_ids is None else self.draft_token_ids[index]


@dataclass(kw_only=True)
class TargetOutput:
    """What one target pass gives."""

    logits: Tensor
    """`[B, Q, V]`, or `[B, 1, V]` if only the last were asked for."""
    features: Tensor
    """`[B, Q, L*E]`, the tap layers' outputs side by side in the order of their ids."""


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


@dataclass(kw_only=True)
class ReadAnswer:
    """What one pass over a finished row gives."""

    features: Tensor
    """`[tokens, L*E]`; the last row is zeros, since the last token is never fed."""
    teacher: TeacherRow | None = None
    """`[tokens, k]`; None where it was not asked for."""


class Target:
    """A frozen causal language model with taps."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target_layer_ids: list[int],
        *,
        name: str,
        revision: str,
    ) -> None:
        """Freeze a loaded model; use `load_target` to load one by its recipe."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.target_layer_ids = list(target_layer_ids)
        self.name = name
        self.revision = revision
        self.head = frozen_head(model)
        self.stop_token_ids = stop_token_ids(model, tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.model.device

    @property
    def features_width(self) -> int:
        """L*E, the width of one feature row."""
        return len(self.target_layer_ids) * self.head.embedding_weight.shape[1]

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the vocabulary; ids of another tokenizer are not ours."""
        return vocabulary_hash(self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """Give the `target` block of manifests; stages refuse inputs whose block differs."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return target_block(self, dtype=dtype, target_layer_ids=self.target_layer_ids)

    def new_cache(self) -> DynamicCache:
        """Give an empty key-value cache whose sliding layers can be cropped too."""
        cache = DynamicCache(config=self.model.config)
        cache.activate_past_recording()
        return cache

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last_logits_only: bool = False,
    ) -> TargetOutput:
        """Run new tokens `[B, Q]` after those in the cache, which grows by Q.

        Args:
            input_ids: `[B, Q]` int64.
            cache: Cache of the tokens before; None starts at position 0 and keeps nothing.
            attention_mask: `[B, cached + Q]`, 0 at padding; None means no padding.
            position_ids: `[B, Q]`; None counts from the cache's length.
            last_logits_only: Compute logits of the last token alone.
        """
        with self._taps() as tapped:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1 if last_logits_only else 0,
            )
        return TargetOutput(logits=output.logits, features=torch.cat(tapped, dim=-1))

    def features_of(self, rows: list[list[int]]) -> list[Tensor]:
        """Run finished rows once and give their features, `[tokens, L*E]` each, last row zeros."""
        answers = self.read_answers(rows, prompt_lengths=[1] * len(rows), teacher_top_k=0)
        return [answer.features for answer in answers]

    @torch.no_grad()
    def read_answers(
        self, rows: list[list[int]], *, prompt_lengths: list[int], teacher_top_k: int
    ) -> list[ReadAnswer]:
        """Run finished rows once; give features and the distributions of their answers' tokens.

        Args:
            rows: Token ids of prompt and answer.
            prompt_lengths: P of each row, at least 1; read for the teacher only.
            teacher_top_k: Tokens kept of each distribution; 0 keeps none.
        """
        fed = [row[:-1] for row in rows]
        input_ids, attention_mask = _pad(fed, left=False, device=self.device)
        with self._taps() as tapped:
            output = self.model.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            )
        features = torch.cat(tapped, dim=-1)
        answers = [
            ReadAnswer(features=functional.pad(features[index, : len(row)], (0, 0, 0, 1)))
            for index, row in enumerate(fed)
        ]
        if teacher_top_k:
            final = output.last_hidden_state
            hidden = [
                final[index, prompt_length - 1 : len(row)]
                for index, (row, prompt_length) in enumerate(zip(fed, prompt_lengths, strict=True))
            ]
            teachers = self._teachers_of(hidden, teacher_top_k)
            for answer, teacher, length in zip(answers, teachers, prompt_lengths, strict=True):
                answer.teacher = teacher.over_the_row(length)
        return answers

    def _teachers_of(self, hidden: list[Tensor], top_k: int) -> list[TeacherRow]:
        """Give the top k after each final state, `[tokens, k]` for each `[tokens, E]`."""
        require(
            self._is_head_and_cap,
            f"data.teacher_top_k (={top_k}) needs a target whose logits are its LM head's, soft "
            f"cap or not; target.name_or_path (={self.name}) changes them further. Set it to 0.",
        )
        chunks = torch.cat(hidden).split(_LOGIT_ROWS)
        kept = join([top_tokens(self._head_and_cap(chunk), top_k) for chunk in chunks])
        return kept.split([len(states) for states in hidden])

    def _head_and_cap(self, hidden: Tensor) -> Tensor:
        """Give the target's logits `[..., V]` of its hidden states after the final norm."""
        head = self.model.get_output_embeddings()
        assert head is not None, "frozen_head has refused such a target"
        logits = head(hidden)
        cap = self.model.config.get_text_config().to_dict().get("final_logit_softcapping")
        return logits if not cap else cap * torch.tanh(logits / cap)

    @functools.cached_property
    def _is_head_and_cap(self) -> bool:
        """Whether `_head_and_cap` gives the model's own logits; Granite and Cohere scale theirs."""
        ids = torch.arange(4, device=self.device)[None]
        want = self.model(input_ids=ids, use_cache=False).logits
        got = self._head_and_cap(self.model.get_decoder()(input_ids=ids).last_hidden_state)
        error = (got - want).abs().max()
        return bool(error <= 2e-2 * want.abs().max())  # room for bfloat16, not for a scale

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        teacher_top_k: int = 0,
        samplers: list[RowSampler] | None = None,
    ) -> list[GeneratedRow]:
        """Answer prompts and keep the features of the very passes that wrote the answers.

        A finished row leaves the batch at once, so nothing is computed past a stop. Rounding, and
        with it a near-tie, depends on how prompts are grouped: the caller fixes the grouping.

        Args:
            prompts: Token ids of each prompt, any lengths.
            max_new_tokens: Budget of each answer, in tokens.
            teacher_top_k: Tokens kept of the distribution that each answer token came from, before
                any sampling setting bends it; 0 keeps none.
            samplers: Chooses the tokens of each prompt; None takes the likeliest.
        """
        input_ids, attention_mask = _pad(prompts, left=True, device=self.device)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        rows = [_OpenRow(prompt) for prompt in prompts]
        live = list(range(len(prompts)))
        while live:
            output = self.forward(
                input_ids,
                cache=cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                last_logits_only=True,
            )
            logits = output.logits[:, -1]
            if samplers is None:
                next_ids = logits.argmax(-1)
            else:
                chosen = [samplers[i].choose(row) for i, row in zip(live, logits, strict=True)]
                next_ids = torch.tensor(chosen, device=self.device)
            for slot, index in enumerate(live):
                rows[index].take(output.features[slot], int(next_ids[slot]))
            if teacher_top_k:
                kept_tokens = top_tokens(logits, teacher_top_k)
                for index, teacher in zip(live, kept_tokens.split([1] * len(live)), strict=True):
                    rows[index].teacher.append(teacher)
            kept = [
                slot
                for slot, index in enumerate(live)
                if not rows[index].is_finished(self.stop_token_ids, max_new_tokens)
            ]
            if len(kept) < len(live):
                live = [live[slot] for slot in kept]
                keep = torch.tensor(kept, dtype=torch.int64, device=self.device)
                cache.batch_select_indices(keep)
                next_ids, attention_mask, position_ids = (
                    tensor[keep] for tensor in (next_ids, attention_mask, position_ids)
                )
            input_ids = next_ids[:, None]
            attention_mask = functional.pad(attention_mask, (0, 1), value=1)
            position_ids = position_ids[:, -1:] + 1
        return [row.close(self.stop_token_ids) for row in rows]

    @contextmanager
    def _taps(self) -> Iterator[list[Tensor]]:
        """Collect the outputs of the tap layers, in the order of their ids, during a pass."""
        collected: dict[int, Tensor] = {}
        tapped: list[Tensor] = []

        def keep(layer_id: int) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: Any) -> None:
                collected[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        decoder = self.model.get_decoder()
        handles = [
            decoder.get_submodule(f"layers.{k}").register_forward_hook(keep(k))
            for k in self.target_layer_ids
        ]
        try:
            yield tapped
            tapped.extend(collected[k] for k in self.target_layer_ids)
        finally:
            for handle in handles:
                handle.remove()


class _OpenRow:
    """One row while it is being generated."""

    def __init__(self, prompt: list[int]) -> None:
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
        return self.output_ids[-1] in stop_ids or len(self.output_ids) >= max_new_tokens

    def close(self, stop_ids: frozenset[int]) -> GeneratedRow:
        stopped = self.output_ids[-1] in stop_ids
        return GeneratedRow(
            output_ids=self.output_ids,
            features=functional.pad(torch.cat(self.features), (0, 0, 0, 1)),
            finish_reason="stop" if stopped else "length",
            teacher=join(self.teacher).over_the_row(self.prompt_length) if self.teacher else None,
        )


def load_target(config: TargetConfig, target_layer_ids: list[int]) -> Target:
    """Load the target of a recipe onto the accelerator if there is one, else the CPU.

    Raises:
        ValueError: The model cannot be found or read, has no chat template, or a tap is out of
        range.
    """
    location = locate_target(config)
    model, tokenizer = load_model(location, config), load_tokenizer(location)
    num_layers = model.config.get_text_config().num_hidden_layers
    require(
        all(0 <= layer < num_layers - 1 for layer in target_layer_ids),
        f"drafter.target_layer_ids (={target_layer_ids}) must lie in 0..{num_layers - 2} for "
        "this target.",
    )
    return Target(
        model, tokenizer, target_layer_ids, name=config.name_or_path, revision=location.label
    )


def frozen_head(model: PreTrainedModel) -> FrozenHead:
    """Borrow embedding and LM head of a loaded model, through its accessors."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    require(
        output is not None,
        f"target.name_or_path (={model.name_or_path}) has no LM head. Use a causal language model.",
    )
    assert output is not None
    return FrozenHead(
        embedding_weight=embedding.get_parameter("weight").detach(),
        lm_head_weight=output.get_parameter("weight").detach(),
    )


def _pad(rows: list[list[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad to one length: ids `[B, Q]` (0 at padding) and attention mask `[B, Q]` int64."""
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        input_ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return input_ids.to(device), attention_mask.to(device)
