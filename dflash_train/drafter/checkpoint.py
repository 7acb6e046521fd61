"""The deployable drafter on disk: `config.json` and one `model.safetensors`, z-lab's layout.

Our own `dflash_train.json` lies beside them; servers do not read it.

It is what `dflash` 0.1.0, vLLM and SGLang load: keys that servers read in two places are written
in both, and everything that other readers would have to guess is explicit. DFlash 2's keys stand in
`dflash_config`, as z-lab and vLLM read them; DSpark's stand at the top, as vLLM reads them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_train.config import require
from dflash_train.drafter.config import FULL, SLIDING, DrafterConfig
from dflash_train.drafter.golden import golden_forward
from dflash_train.drafter.metadata import CheckpointMetadata, write_metadata
from dflash_train.drafter.model import Drafter
from dflash_train.records.manifest import atomic_path, content_hash, file_hash

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SHARDS_NAME = "model.safetensors.index.json"
PLAIN, DFLASH2, DSPARK = "DFlashDraftModel", "DFlash2DraftModel", "Qwen3DSparkModel"

_TOP_LEVEL = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "block_size",
    "num_target_layers", "rms_norm_eps", "attention_bias",
)  # fmt: skip
_NESTED = (
    "block_size", "mask_token_id", "target_layer_ids",
    "input_embedding_scale", "output_multiplier", "final_logit_softcapping",
)  # fmt: skip
_NESTED_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_MARKOV_TYPES = {False: "vanilla", True: "gated"}


def save_checkpoint(
    drafter: Drafter, folder: Path, *, metadata: CheckpointMetadata | None = None
) -> None:
    """Write the drafter as a folder, atomically: a reader sees the old one or the new one.

    Args:
        drafter: What to save.
        folder: Replaced where it exists.
        metadata: What is known about the drafter; its golden forward is computed here.
    """
    dtype = str(drafter.fc.weight.dtype).removeprefix("torch.")
    write_folder(
        folder,
        content=describe_config(drafter.config, dtype),
        tensors=drafter.state_dict(),
        metadata=with_golden(drafter, metadata),
    )


def with_golden(drafter: Drafter, metadata: CheckpointMetadata | None) -> CheckpointMetadata:
    """Give the metadata of a drafter that is about to be written."""
    return replace(metadata or CheckpointMetadata(), golden=golden_forward(drafter))


def write_folder(
    folder: Path,
    *,
    content: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: CheckpointMetadata,
) -> None:
    """Write the three files of a checkpoint, in any dialect, atomically.

    Args:
        folder: Replaced where it exists.
        content: Of `config.json`.
        tensors: By name, on any device.
        metadata: Of `dflash_train.json`.
    """
    config = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder) as partial:
        partial.mkdir()
        (partial / CONFIG_NAME).write_bytes(config + b"\n")
        save_file(stored, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        write_metadata(partial, metadata)


def load_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a drafter folder and check every name and shape.

    Raises:
        ValueError: The folder is not a DFlash drafter, or its tensors do not fit its config.
    """
    return build_drafter(read_config(folder), read_tensors(folder), folder).to(dtype)


def weight_files(folder: Path) -> list[Path]:
    """Give the files that hold a drafter's tensors, in the order of their names.

    We write one, `model.safetensors`. Others split large drafters, and list the parts in an index
    beside them; without either the list is empty.

    Raises:
        ValueError: The index is damaged, or names a file that is missing or elsewhere.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / SHARDS_NAME
    if not index.is_file():
        return []
    try:
        names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint (={folder}): {SHARDS_NAME} has no weight_map. Copy it again."
        ) from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    require(
        not missing,
        f"checkpoint (={folder}): {SHARDS_NAME} names {', '.join(missing[:3])}, not there. Copy "
        "all parts.",
    )
    return [folder / name for name in names]


def weights_hash(folder: Path) -> str:
    """Hash the bytes of a drafter's weight files; of one file it is that file's own hash.

    Raises:
        ValueError: There is none, or the index is damaged.
    """
    hashes = [file_hash(path) for path in weight_files(folder)]
    require(
        bool(hashes),
        f"checkpoint (={folder}) holds no {WEIGHTS_NAME}. Run `train` first, or give "
        "checkpoint=DIR.",
    )
    return hashes[0] if len(hashes) == 1 else content_hash(hashes)


def drafter_hash(folder: Path) -> str:
    """Hash what a server reads of a drafter: its config and its weights."""
    return content_hash([file_hash(folder / CONFIG_NAME), weights_hash(folder)])


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a drafter, in the number format it is stored in.

    Raises:
        ValueError: There is no weight file, or one is damaged.
    """
    files = weight_files(folder)
    require(
        bool(files), f"checkpoint (={folder}) holds no {WEIGHTS_NAME}. Give a drafter's folder."
    )
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint (={folder}): {path.name} cannot be read: {error}. Export it again."
            ) from error
    return tensors


def build_drafter(config: DrafterConfig, tensors: dict[str, Tensor], folder: Path) -> Drafter:
    """Build a drafter that holds these tensors as they are, after checking names and shapes.

    Args:
        config: Its shape.
        tensors: By parameter name.
        folder: Where they come from, for messages.

    Raises:
        ValueError: A tensor is missing, unknown or of another shape.
    """
    with torch.random.fork_rng(devices=[]):  # reading draws no random numbers
        drafter = Drafter(config)
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
    # Assigned, not copied into, so that each keeps its number format; cloned, since the rows of a
    # mapped file lie at odd addresses, where products may round in another way.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    drafter.load_state_dict(own, assign=True)
    if drafter.draft_token_ids is not None:
        drafter.set_draft_vocabulary(drafter.draft_token_ids)  # checks what the file holds
    return drafter.eval()


def describe_config(config: DrafterConfig, dtype: str) -> dict[str, Any]:
    """Give the content of `config.json`; nothing in it is left to a reader's default."""
    rope = dict(config.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": [_architecture(config)],
        "model_type": "qwen3",
        "dtype": dtype,
        **{name: getattr(config, name) for name in _TOP_LEVEL},
        "dflash_config": {name: getattr(config, name) for name in _nested_names(config)},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "layer_types": config.layer_types or [FULL] * config.num_hidden_layers,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": False,
        **_optional_keys(config),
    }


def _architecture(config: DrafterConfig) -> str:
    if config.is_dflash2:
        return DFLASH2
    return DSPARK if config.is_shifted else PLAIN


def _nested_names(config: DrafterConfig) -> tuple[str, ...]:
    return (*_NESTED, *_NESTED_DFLASH2) if config.is_dflash2 else _NESTED


def _optional_keys(config: DrafterConfig) -> dict[str, Any]:
    """Give the top-level keys that a plain drafter does not have."""
    keys: dict[str, Any] = {}
    if config.is_causal is not None:
        keys["is_causal"] = config.is_causal
    if config.draft_vocab_size is not None:
        keys["draft_vocab_size"] = config.draft_vocab_size
    if config.is_shifted:
        keys |= {
            "markov_rank": config.markov_rank,
            "markov_head_type": _MARKOV_TYPES[config.markov_gated],
            "enable_confidence_head": config.has_confidence_head,
            "confidence_head_with_markov": config.confidence_sees_markov,
            "sample_from_anchor": True,
        }
    return keys


def read_config(folder: Path) -> DrafterConfig:
    """Read `config.json` of a DFlash, DFlash 2 or DSpark drafter.

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
    except orjson.JSONDecodeError as error:
        raise ValueError(
            f"checkpoint (={folder}): {CONFIG_NAME} is no JSON: {error}. Export it again."
        ) from error
    return parse_config(content, folder)


def parse_config(content: dict[str, Any], folder: Path) -> DrafterConfig:
    """Turn the content of `config.json`, as `describe_config` gives it, into a drafter's shape.

    Args:
        content: With every key that `describe_config` writes; others are left alone.
        folder: Where it comes from, for messages.

    Raises:
        ValueError: Another architecture, or a key that this version cannot honour.
    """
    try:
        nested = content["dflash_config"]
        _check_known(content, folder)
        fields = {name: content[name] for name in _TOP_LEVEL} | {
            name: nested[name] for name in _NESTED
        }
        return DrafterConfig(
            **fields,
            **_variant_fields(content),
            rope_parameters=content["rope_parameters"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint (={folder}): {CONFIG_NAME} lacks or garbles {error}. Export it again."
        ) from error


def _variant_fields(content: dict[str, Any]) -> dict[str, Any]:
    """Read the fields that differ from plain DFlash."""
    fields: dict[str, Any] = {"is_causal": content.get("is_causal")}
    if SLIDING in content.get("layer_types", []):
        fields |= {name: content[name] for name in ("layer_types", "sliding_window")}
    if content.get("draft_vocab_size") != content["vocab_size"]:
        fields["draft_vocab_size"] = content.get("draft_vocab_size")
    if content["architectures"] == [DFLASH2]:
        fields |= {name: content["dflash_config"][name] for name in _NESTED_DFLASH2}
    if content["architectures"] == [DSPARK]:
        fields |= {
            "markov_rank": content["markov_rank"],
            "markov_gated": content["markov_head_type"] == _MARKOV_TYPES[True],
            "has_confidence_head": content["enable_confidence_head"],
            "confidence_sees_markov": content["confidence_head_with_markov"],
        }
    return fields


def _check_known(content: dict[str, Any], folder: Path) -> None:
    """Refuse what this version would misread."""
    where, nested = f"checkpoint (={folder}):", content["dflash_config"]
    architectures = content["architectures"]
    require(
        architectures in ([PLAIN], [DFLASH2], [DSPARK]),
        f"{where} architectures (={architectures}) must be one of {PLAIN}, {DFLASH2}, {DSPARK}. "
        "Convert the drafter to one of them.",
    )
    require(
        content["block_size"] == nested["block_size"],
        f"{where} block_size (={content['block_size']}) and dflash_config.block_size "
        f"(={nested['block_size']}) must be equal. Correct the one that training did not use.",
    )
    only_vllm = sorted({"causal", "use_swa", "swa_window_size"} & nested.keys())
    require(
        not only_vllm,
        f"{where} dflash_config holds {', '.join(only_vllm)}, which vLLM alone reads. Write "
        "layer_types, sliding_window and is_causal at the top instead.",
    )
    slides = SLIDING in content.get("layer_types", [])
    require(
        not slides or content["use_sliding_window"],
        f"{where} use_sliding_window must be true where layer_types slide: Transformers drops the "
        "window without it.",
    )
    markov = content.get("markov_head_type")
    require(
        architectures != [DSPARK]
        or (content["sample_from_anchor"] and markov in _MARKOV_TYPES.values()),
        f"{where} sample_from_anchor must be true and markov_head_type (={markov}) one of "
        f"{', '.join(_MARKOV_TYPES.values())}. Other DSpark layouts are not read.",
    )
