"""The doctor's checks of files, layout, taps, mask token and shapes.

They read `config.json` as it stands, not through our loader: servers read the same keys, some of
them in two places, and fill what is absent with defaults of their own.
"""

import pickle

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dflash_train.drafter.checkpoint import (
    CONFIG_NAME,
    DFLASH2,
    DSPARK,
    PLAIN,
    WEIGHTS_NAME,
    read_config,
)
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.release.finding import Finding, Patient, broken, demand, ok, warning

ARCHITECTURES = (PLAIN, DFLASH2, DSPARK)
MASK_EMBEDDING_NAME = "mask_embedding.pt"
REMADE = "Export the checkpoint again."


def check_files(patient: Patient) -> Finding:
    """Check that both files are there and can be read."""
    num_keys, num_tensors = len(patient.content), len(patient.shapes)
    return ok(f"{CONFIG_NAME} has {num_keys} keys, {WEIGHTS_NAME} {num_tensors} tensors.")


def check_format(patient: Patient) -> Finding:
    """Check that the layout is z-lab's, and K the same in the two places that servers read."""
    content = patient.content
    found = content.get("architectures")
    demand(
        isinstance(found, list) and len(found) == 1 and found[0] in ARCHITECTURES,
        f"architectures (={found}) must hold one of {', '.join(ARCHITECTURES)}.",
        remedy=REMADE,
    )
    demand(
        content.get("model_type") == "qwen3",
        f"model_type (={content.get('model_type')}) must be qwen3, whatever the target: servers "
        "read the file with that class.",
        remedy="Set it to qwen3.",
    )
    demand(
        "auto_map" not in content,
        "auto_map makes servers ask for remote code, and none needs it.",
        remedy="Remove the key.",
    )
    sizes = patient.value("block_size", int), patient.value("dflash_config.block_size", int)
    demand(
        sizes[0] == sizes[1] and sizes[0] >= 2,
        f"block_size (={sizes[0]}) and dflash_config.block_size (={sizes[1]}) must be equal and at "
        "least 2: some servers read the one, some the other.",
        remedy="Set both to the K that training used.",
    )
    demand(
        found != [DSPARK] or content.get("sample_from_anchor") is True,
        f"sample_from_anchor (={content.get('sample_from_anchor')}) must be true: a DSpark block "
        "drafts from its first slot, and readers differ in what its absence means.",
        remedy="Set it to true.",
    )
    return ok(f"{content['architectures'][0]}, z-lab layout, K = {sizes[0]}.")


def check_taps(patient: Patient) -> Finding:
    """Check that the tap layers are layers of the target, distinct, and not the last one."""
    num_layers = patient.value("num_target_layers", int)
    if patient.target is not None:
        own = text_config(patient.target).num_hidden_layers
        demand(
            num_layers == own,
            f"num_target_layers (={num_layers}) must be the target's {own}.",
            remedy="Give the target that this drafter was trained for.",
        )
    ids = patient.value("dflash_config.target_layer_ids", list)
    demand(
        len(ids) > 0 and all(isinstance(i, int) for i in ids) and len(set(ids)) == len(ids),
        f"dflash_config.target_layer_ids (={ids}) must be distinct whole numbers.",
        remedy=REMADE,
    )
    demand(
        all(0 <= i < num_layers - 1 for i in ids),
        f"dflash_config.target_layer_ids (={ids}) must lie in 0..{num_layers - 2}: Transformers "
        "norms the last layer's output, servers do not.",
        remedy="Train with other taps, or subtract 1 if the ids were taken from a server's config.",
    )
    width = patient.value("hidden_size", int)
    columns = patient.shapes.get("fc.weight", [0, len(ids) * width])[-1]
    demand(
        columns == len(ids) * width,
        f"fc.weight has {columns} columns, but {len(ids)} taps of width {width} need "
        f"{len(ids) * width}.",
        remedy="Set dflash_config.target_layer_ids to the layers that training read, in order.",
    )
    return ok(f"layers {ids} of {num_layers}.")


def check_mask_token(patient: Patient) -> Finding:
    """Check that the mask id has an embedding row and stands in no conversation."""
    target = patient.target
    mask_id = patient.value("dflash_config.mask_token_id", int)
    if target is None:
        num_rows = patient.value("vocab_size", int)
    else:
        num_rows = target.head.embedding_weight.shape[0]
    demand(
        0 <= mask_id < num_rows,
        f"dflash_config.mask_token_id (={mask_id}) must lie in 0..{num_rows - 1}, the target's "
        "embedding table.",
        remedy=REMADE,
    )
    if target is None:
        return ok(f"id {mask_id} lies inside the table of {num_rows}.")
    use = _use_in_conversations(patient, target, mask_id)
    demand(
        use is None,
        f"dflash_config.mask_token_id (={mask_id}, {_token(target, mask_id)}) is {use}, and the "
        "drafter could not tell it from a masked slot.",
        remedy="Train with a token that the target never emits.",
    )
    if (patient.folder / MASK_EMBEDDING_NAME).is_file():
        return _check_mask_embedding(patient, target, mask_id)
    if mask_id < len(target.tokenizer) and mask_id not in target.tokenizer.added_tokens_decoder:
        return warning(
            f"id {mask_id}, {_token(target, mask_id)}, is a token of ordinary text.",
            remedy="Make sure that the target never emits it, or train with a special token.",
        )
    return ok(f"id {mask_id}, {_token(target, mask_id)}, stands in no conversation.")


def _use_in_conversations(patient: Patient, target: Target, token_id: int) -> str | None:
    """Say what an id is there for in conversations, stored ones too; None for nothing."""
    tokenizer = target.tokenizer
    turns = [Turn(role=role, content="Hello") for role in ("user", "assistant", "user")]
    if token_id in target.stop_token_ids:
        return "an end token"
    if token_id == tokenizer.bos_token_id:
        return "the start token"
    if token_id == tokenizer.pad_token_id:
        return "the padding token"
    if token_id in render_prompt(tokenizer, turns):
        return "a token of rendered conversations"
    rows = [] if patient.answers is None else patient.answers.rows
    if any(token_id in row.input_ids for row in rows):
        return "a token of stored conversations"
    return None


def _check_mask_embedding(patient: Patient, target: Target, mask_id: int) -> Finding:
    """Check that a vector shipped for masked slots is the row that this toolkit feeds."""
    row = target.head.embedding_weight[mask_id].cpu()
    remedy = "Ship the pair that training wrote, or remove the file."
    try:
        shipped = torch.load(
            patient.folder / MASK_EMBEDDING_NAME, map_location="cpu", weights_only=True
        )
        vector = shipped["embedding"] if isinstance(shipped, dict) else shipped
        claimed = shipped["mask_token_id"] if isinstance(shipped, dict) else mask_id
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        raise broken(f"{MASK_EMBEDDING_NAME} cannot be read: {error}.", remedy=remedy) from error
    demand(
        claimed == mask_id and isinstance(vector, Tensor) and vector.shape == row.shape,
        f"{MASK_EMBEDDING_NAME} must hold {row.numel()} numbers for id {mask_id}, "
        f"dflash_config.mask_token_id; it is for id {claimed}.",
        remedy=remedy,
    )
    if torch.allclose(vector.float(), row.float(), atol=0.0, rtol=1e-2):
        return ok(f"id {mask_id}, {_token(target, mask_id)}; {MASK_EMBEDDING_NAME} is its row.")
    return warning(
        f"{MASK_EMBEDDING_NAME} differs from the target's row {mask_id}: servers that read the "
        "file feed another vector than this toolkit.",
        remedy="Remove the file if the drafter was trained on the target's row.",
    )


def _token(target: Target, token_id: int) -> str:
    return repr(target.tokenizer.convert_ids_to_tokens(token_id))


def check_shapes(patient: Patient) -> Finding:
    """Check that widths shared with the target agree, and that the drafter's own are written."""
    width, rows = patient.value("hidden_size", int), patient.value("vocab_size", int)
    if patient.target is not None:
        own_rows, own_width = patient.target.head.embedding_weight.shape
        for key, found, own in (("hidden_size", width, own_width), ("vocab_size", rows, own_rows)):
            demand(
                found == own,
                f"{key} (={found}) must be the target's {own}: embedding and head are shared.",
                remedy="Give the target that this drafter was trained for.",
            )
    demand(
        isinstance(patient.content.get("head_dim"), int),
        "head_dim is not written, and readers would take 128.",
        remedy="Write the head width that training used.",
    )
    heads = patient.value("num_attention_heads", int)
    kv_heads = patient.value("num_key_value_heads", int)
    demand(
        kv_heads > 0 and heads % kv_heads == 0,
        f"num_attention_heads (={heads}) must be a multiple of num_key_value_heads (={kv_heads}).",
        remedy=REMADE,
    )
    whose = "" if patient.target is None else " are the target's"
    return ok(f"E {width} and V {rows}{whose}; {heads} heads, {kv_heads} for keys.")


def text_config(target: Target) -> PreTrainedConfig:
    """Give the target's text configuration."""
    return target.model.config.get_text_config()


def check_reading(patient: Patient) -> Finding:
    """Check that this toolkit's own reader takes the file."""
    config = read_config(patient.folder)
    kind = patient.content["architectures"][0]
    return ok(f"{kind} of {config.num_hidden_layers} layers, {config.num_drafts} drafts per block.")
