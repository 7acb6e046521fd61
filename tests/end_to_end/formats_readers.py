"""The packages that other people load drafters with, each asked the same question.

`dflash` 0.1.0, `speculators` 0.9.0 and `specforge` 0.2.0 run their own, unchanged loading and model
code. A question is a sequence with its features and some anchors; the answer are the hidden states
of the blocks that stand there.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dflash_train.config import require
from dflash_train.drafter.attention import Blocks
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter, block_embeddings
from dflash_train.features.frozen_head import FrozenHead

RANDOM_SCALE = 0.1
"""Standard deviation of the weights of drafters that a package makes itself."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Where blocks are to be drafted: N tokens, L taps, A anchors."""

    input_ids: Tensor
    """`[N]` int64; N is the last anchor plus a block."""
    features: Tensor
    """`[N, L*E]` float32."""
    anchors: list[int]
    head: FrozenHead

    @classmethod
    def random(cls, config: DrafterConfig, head: FrozenHead, anchors: list[int]) -> "Question":
        """Draw tokens and features."""
        generator = torch.Generator().manual_seed(7)
        length = max(anchors) + config.block_size
        width = config.num_taps * config.hidden_size
        return cls(
            input_ids=torch.randint(config.vocab_size, (length,), generator=generator),
            features=torch.randn(length, width, generator=generator),
            anchors=anchors,
            head=head,
        )

    def embeddings(self, config: DrafterConfig) -> Tensor:
        """Give the input rows of the blocks, `[A, K, E]`."""
        anchor_ids = self.input_ids[self.anchors]
        return block_embeddings(self.head, anchor_ids, num_slots=config.block_size, config=config)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a package made of a folder."""

    hidden: Tensor
    """`[A, K, E]`."""
    settings: dict[str, Any]
    """What it drafts by beside the weights: K, mask id, layers of the target (0-based), kinds of
    layers."""


@torch.no_grad()
def ours(drafter: Drafter, question: Question) -> Tensor:
    """Give our hidden states, `[A, K, E]`."""
    blocks = Blocks(
        context_offsets=[0, len(question.features)],
        block_offsets=[0, len(question.anchors)],
        anchor_positions=torch.tensor(question.anchors),
    )
    return drafter(question.embeddings(drafter.config), question.features, blocks)


@torch.no_grad()
def ours_as_speculators_trains(drafter: Drafter, question: Question) -> Tensor:
    """Give what a one-layer sliding drafter computes when slot k sees k + 1 older tokens.

    In one layer a slot's output depends on no other slot's, so slot k is taken from a drafter
    whose window is k + 1 tokens wider.
    """
    config, slots = drafter.config, []
    assert config.num_hidden_layers == 1
    assert config.sliding_window is not None
    for slot in range(config.block_size):
        wider = Drafter(replace(config, sliding_window=config.sliding_window + slot + 1))
        wider.load_state_dict(drafter.state_dict())
        slots.append(ours(wider.eval(), question)[:, slot])
    return torch.stack(slots, dim=1)


@torch.no_grad()
def dflash_answer(folder: Path, question: Question, config: DrafterConfig) -> Answer:
    """Load a folder with `dflash` and ask it, one pass per anchor."""
    model = load_dflash(folder)
    blocks = []
    for block, anchor in zip(question.embeddings(config), question.anchors, strict=True):
        positions = torch.arange(anchor + config.block_size)[None]
        context = question.features[None, :anchor]
        blocks.append(
            model(position_ids=positions, noise_embedding=block[None], target_hidden=context)[0]
        )
    settings = {
        "block_size": model.block_size,
        "mask_token_id": model.mask_token_id,
        "target_layer_ids": model.target_layer_ids,
        "layer_types": model.config.layer_types,
    }
    return Answer(hidden=torch.stack(blocks), settings=settings)


def load_dflash(folder: Path) -> Any:
    """Load a folder with the class of `dflash` that its configuration names.

    Raises:
        ValueError: A tensor of the file found no place, or a parameter no tensor.
    """
    official = import_module("dflash.model")
    config = import_module("transformers").Qwen3Config.from_pretrained(folder)
    kind = vars(official)[config.architectures[0]]
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    require(not wrong, f"dflash: {wrong} have no place or no tensor.")
    return model.eval()


@torch.no_grad()
def speculators_answer(folder: Path, question: Question) -> Answer:
    """Load a folder with `speculators` and ask it, by its own training pass."""
    model = load_speculators(folder)
    core = import_module("speculators.models.dflash.core")
    attention = import_module("torch.nn.attention.flex_attention")
    model.config.transformer_layer_config._attn_implementation = "sdpa"
    model._create_mask_fn = attention.create_mask  # dense: its usual kernel is for accelerators
    anchors_A = torch.tensor(question.anchors)
    length = len(question.input_ids)
    width = model.config.transformer_layer_config.hidden_size
    with _fixed(core, "select_anchors", lambda *_: (anchors_A, torch.ones_like(anchors_A) > 0)):
        hidden, *_ = model._backbone_forward(
            hidden_states=question.features[None],
            input_ids=question.input_ids[None],
            loss_mask=torch.ones(1, length, dtype=torch.int64),
            verifier_last_hidden_states=torch.zeros(1, length, width),
            document_ids=torch.zeros(1, length, dtype=torch.int64),
            position_ids=torch.arange(length)[None],
            max_anchors=len(question.anchors),
        )
    settings = {
        "block_size": model.config.block_size,
        "mask_token_id": model.config.mask_token_id,
        "target_layer_ids": [i - 1 for i in model.config.aux_hidden_state_layer_ids],
        "layer_types": model.config.transformer_layer_config.layer_types,
    }
    return Answer(hidden=hidden.view(len(question.anchors), -1, width), settings=settings)


def load_speculators(folder: Path) -> Any:
    """Load a folder with the class of `speculators` that it names; the target's tables come too.

    Raises:
        ValueError: A tensor of the file is not what the model holds.
    """
    package = import_module("speculators")
    model = package.SpeculatorModel.from_pretrained(str(folder), dtype=torch.float32)
    state = model.state_dict()
    wrong = [
        name
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name not in state or not torch.equal(state[name], tensor)
    ]
    require(not wrong, f"speculators: {wrong} did not arrive.")
    return model.eval()


@contextmanager
def _fixed(module: Any, name: str, value: Callable[..., Any]) -> Any:
    before = vars(module)[name]
    vars(module)[name] = value
    try:
        yield
    finally:
        vars(module)[name] = before


def save_with_dflash(config: dict[str, Any], folder: Path) -> Path:
    """Let `dflash` make and save a drafter of its own.

    Args:
        config: Keys of a released `config.json`.
        folder: Where to.
    """
    official = import_module("dflash.model")
    kind = vars(official)[config["architectures"][0]]
    model = kind(import_module("transformers").Qwen3Config(**config))
    _randomize(model)
    model.save_pretrained(folder)
    return folder


def save_with_specforge(config: dict[str, Any], folder: Path) -> Path:
    """Let SpecForge make a drafter, write its training state and export it.

    Args:
        config: Keys of SpecForge's draft configuration.
        folder: Holds the state; the export goes to `export` in it.
    """
    drafts = import_module("specforge.modeling.draft.dflash")
    export = import_module("specforge.export.to_hf")
    folder.mkdir(parents=True)
    settings = import_module("transformers").Qwen3Config(**config)
    settings.save_pretrained(folder)
    model = drafts.DFlashDraftModel(settings)
    _randomize(model)
    torch.save({"draft_state_dict": model.state_dict()}, folder / "training_state.pt")
    target = folder / "export"
    export.export_to_hf(str(folder), str(folder / "config.json"), str(target))
    return target


def save_with_speculators(folder: Path, out: Path) -> Path:
    """Let `speculators` load a folder, change every weight, and save it as its own.

    Args:
        folder: A drafter in its layout.
        out: Where to.
    """
    model = load_speculators(folder)
    _randomize(model)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Give every trained weight a random value; some packages leave memory as they found it."""
    generator = torch.Generator().manual_seed(11)
    borrowed = ("embed_tokens.", "lm_head.", "verifier_")
    for name, parameter in model.named_parameters():
        if not name.startswith(borrowed):
            noise = torch.randn(parameter.shape, generator=generator) * RANDOM_SCALE
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
