"""The deployable drafter on disk: `config.json` and one `model.safetensors`, z-lab's layout.

It is what `dflash` 0.1.0, vLLM and SGLang load: keys that servers read in two places are written
in both, and everything that other readers would have to guess is explicit.
"""

from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dflash_train.config import require
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.records.manifest import atomic_path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ARCHITECTURE = "DFlashDraftModel"

_TOP_LEVEL = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "block_size",
    "num_target_layers", "rms_norm_eps", "attention_bias",
)  # fmt: skip
_NESTED = (
    "block_size", "mask_token_id", "target_layer_ids",
    "input_embedding_scale", "output_multiplier", "final_logit_softcapping",
)  # fmt: skip


def save_checkpoint(drafter: Drafter, folder: Path) -> None:
    """Write the drafter as a folder, atomically: a reader sees the old one or the new one."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_path(folder) as partial:
        partial.mkdir()
        config = orjson.dumps(
            describe_config(drafter.config, dtype),
            option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS,
        )
        (partial / CONFIG_NAME).write_bytes(config + b"\n")
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})


def load_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a drafter folder and check every name and shape.

    Raises:
        ValueError: The folder is not a plain DFlash drafter, or its tensors do not fit its config.
    """
    drafter = Drafter(read_config(folder)).to(dtype)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint (={folder}): {WEIGHTS_NAME} cannot be read: {error}. Export it again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    require(
        not wrong,
        f"checkpoint (={folder}): tensors missing, unknown or of another shape than "
        f"{CONFIG_NAME} says: "
        f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}. Export it again.",
    )
    drafter.load_state_dict(tensors)
    return drafter.eval()


def describe_config(config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """Give the content of `config.json`; nothing in it is left to a reader's default."""
    rope = dict(config.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "dtype": dtype,
        **{name: getattr(config, name) for name in _TOP_LEVEL},
        "dflash_config": {name: getattr(config, name) for name in _NESTED},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": False,
    }


def read_config(folder: Path) -> DrafterConfig:
    """Read `config.json` of a plain DFlash drafter.

    Raises:
        ValueError: No such folder, another architecture, or a key that this version cannot honour.
    """
    path = folder / CONFIG_NAME
    require(
        path.is_file(),
        f"checkpoint (={folder}) holds no {CONFIG_NAME}. Give the folder that training wrote.",
    )
    try:
        content = orjson.loads(path.read_bytes())
        nested = content["dflash_config"]
        _check_plain(content, folder)
        fields = {name: content[name] for name in _TOP_LEVEL} | {
            name: nested[name] for name in _NESTED
        }
        return DrafterConfig(**fields, rope_parameters=content["rope_parameters"])
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint (={folder}): {CONFIG_NAME} lacks or garbles {error}. Export it again."
        ) from error


def _check_plain(content: dict[str, Any], folder: Path) -> None:
    architectures = content["architectures"]
    require(
        architectures == [ARCHITECTURE],
        f"checkpoint (={folder}): architectures (={architectures}) must be ['{ARCHITECTURE}']: "
        "this "
        "version reads plain DFlash drafters.",
    )
    nested_size = content["dflash_config"]["block_size"]
    require(
        content["block_size"] == nested_size,
        f"checkpoint (={folder}): block_size (={content['block_size']}) and "
        "dflash_config.block_size "
        f"(={nested_size}) must be equal. Correct the one that training did not use.",
    )
    windowed = (
        "sliding_attention" in content.get("layer_types", [])
        or content.get("is_causal") is not None
    )
    require(
        not windowed,
        f"checkpoint (={folder}): sliding or causal layers are not read by this version. "
        "Use a drafter whose layers are all full and bidirectional.",
    )
