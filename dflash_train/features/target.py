"""The frozen target: it answers prompts, and its tap layers give the drafter's features.

A tap with id k is the output of decoder layer k (0-based), `hidden_states[k + 1]` in
Transformers, before the final norm. Taps are read by hooks on those layers alone, so no other
layer's states are kept. Legend: B rows, Q new tokens, L taps, E hidden size, V vocabulary,
P prompt tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dflash_train.config import TargetConfig, require
from dflash_train.features.frozen_head import frozen_head
from dflash_train.features.generated_row import GeneratedRow, OpenRow
from dflash_train.features.sampling import RowSampler
from dflash_train.features.taps import tap_layers
from dflash_train.features.target_loading import load_model, load_tokenizer, stop_token_ids
from dflash_train.features.target_text import target_block, vocabulary_hash
from dflash_train.features.target_weights import locate_target
from dflash_train.features.teacher import TeacherRow, join, top_tokens

_LOGIT_ROWS = 256
"""Answer tokens whose logits `[rows, V]` exist at once when a finished row is read."""


@dataclass(kw_only=True)
class TargetOutput:
    """What one target pass gives."""

    logits: Tensor
    """`[B, Q, V]`, or `[B, 1, V]` if only the last were asked for."""
    features: Tensor
    """`[B, Q, L*E]`, the tap layers' outputs side by side in the order of their ids."""


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
        with tap_layers(self.model, self.target_layer_ids) as tapped:
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
        with tap_layers(self.model, self.target_layer_ids) as tapped:
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
        rows = [OpenRow(prompt) for prompt in prompts]
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
                # Recurrent layers know no other way to keep some rows.
                cache.reorder_cache(keep)  # pyright: ignore[reportArgumentType] any int64 tensor
                next_ids, attention_mask, position_ids = (
                    tensor[keep] for tensor in (next_ids, attention_mask, position_ids)
                )
            input_ids = next_ids[:, None]
            attention_mask = functional.pad(attention_mask, (0, 1), value=1)
            position_ids = position_ids[:, -1:] + 1
        return [row.close(self.stop_token_ids) for row in rows]


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
