"""The commands that serve a drafter, and the engines that would not serve it as it was trained.

Engines count a block differently: vLLM and llama.cpp want the drafts of a step (K - 1 behind the
anchor, K in DSpark's shifted layout), SGLang the width of the block, K. An engine that would apply
another mask, leave out a factor or cannot load the file gets a reason in place of a command.
Engines and versions as of `VERSIONS`.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from dflash_train.drafter.config import FULL, DrafterConfig
from dflash_train.release.serving_checks import unfaithful_engines

VERSIONS = {"vLLM": "0.32", "SGLang": "0.5.23", "llama.cpp": "b11434", "Transformers": "0.1.0"}
"""Versions that the commands were written for; under Transformers that of the package `dflash`."""
_NAMES_IN_CHECKS = {"Transformers": "z-lab"}
"""How the doctor calls an engine that a card calls by what it runs on."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the commands name."""

    target: str
    """Hub id or folder of the target, or a word that stands for it."""
    target_revision: str | None
    """Commit of the target on the Hub; None leaves the choice to the server."""
    drafter: str
    """Hub id of the drafter."""


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """One engine: how to start it, or why not to."""

    engine: str
    version: str
    command: str | None
    """Shell command, several lines perhaps; None where `remark` says why there is none."""
    remark: str
    """What to know, in full sentences; may be empty beside a command."""


def serve_commands(config: DrafterConfig, model: ServedModel) -> list[ServeCommand]:
    """Give one entry per engine, in the order of a model card."""
    return [_entry(engine, config, model) for engine in VERSIONS]


def _entry(engine: str, config: DrafterConfig, model: ServedModel) -> ServeCommand:
    reason = reason_against(engine, config)
    if reason is not None:
        return ServeCommand(engine=engine, version=VERSIONS[engine], command=None, remark=reason)
    command, remark = _WRITERS[engine](config, model)
    return ServeCommand(engine=engine, version=VERSIONS[engine], command=command, remark=remark)


def reason_against(engine: str, config: DrafterConfig) -> str | None:
    """Say why an engine would not serve the drafter as it was trained; None if it would."""
    if config.draft_vocab_size is not None:
        return (
            f"It does not read the reduced vocabulary of this drafter ({config.draft_vocab_size:,} "
            f"of {config.vocab_size:,} ids) in this layout."
        )
    variant = "DFlash 2" if config.is_dflash2 else "DSpark" if config.is_shifted else None
    readers = {None: tuple(VERSIONS), "DFlash 2": ("vLLM", "Transformers"), "DSpark": ("vLLM",)}
    if engine not in readers[variant]:
        return f"Version {VERSIONS[engine]} is not known to read {variant} drafters."
    unfaithful = unfaithful_engines(
        config.layer_types or [FULL] * config.num_hidden_layers,
        config.is_causal,
        window=config.sliding_window,
        block_size=config.block_size,
    )
    if _NAMES_IN_CHECKS.get(engine, engine) in unfaithful:
        return (
            "It would show the slots of a block other tokens than training did, since it reads the "
            "attention mask of this drafter otherwise. Drafts would be worse without any error."
        )
    if config.input_embedding_scale != 1.0 and engine in _ignores_scale(config):
        return (
            f"It does not apply the factor {config.input_embedding_scale:g} on the drafter's "
            "embeddings. Drafts would be worse without any error."
        )
    return None


def _ignores_scale(config: DrafterConfig) -> tuple[str, ...]:
    """Name the engines that do not read `input_embedding_scale` from the drafter."""
    return ("SGLang",) if config.is_dflash2 else ("vLLM", "SGLang")


def _vllm(config: DrafterConfig, model: ServedModel) -> tuple[str, str]:
    speculation = {
        "method": "dspark" if config.is_shifted else "dflash",
        "num_speculative_tokens": config.num_drafts,
        "model": model.drafter,
    }
    settings = orjson.dumps(speculation).decode()
    arguments = ["vllm", "serve", model.target, *_revision(model)]
    lines = [shlex.join(arguments), f"--speculative-config '{settings}'"]
    counted = f"`num_speculative_tokens` is the {config.num_drafts} drafts of a step"
    kind = "K" if config.is_shifted else "K - 1"
    remark = f"{counted}, {kind} for K = {config.block_size}; it has no default."
    mixes = config.layer_types is not None and len(set(config.layer_types)) > 1
    if config.is_dflash2 or config.is_shifted or mixes:
        remark += " Needs the V2 model runner (`VLLM_USE_V2_MODEL_RUNNER=1` where it is off)."
    return _continued(lines), remark


def _sglang(config: DrafterConfig, model: ServedModel) -> tuple[str, str]:
    lines = [
        f"python -m sglang.launch_server --model-path {shlex.quote(model.target)}",
        *([shlex.join(_revision(model))] if model.target_revision else []),
        f"--speculative-algorithm DFLASH --speculative-draft-model-path {model.drafter}",
        f"--speculative-num-draft-tokens {config.block_size}",
    ]
    remark = f"Here the number is the width of the block, K = {config.block_size}, not K - 1."
    return _continued(lines), remark


def _llama_cpp(config: DrafterConfig, model: ServedModel) -> tuple[str, str]:
    steps = [
        f"hf download {shlex.quote(model.target)} --local-dir target",
        f"hf download {model.drafter} --local-dir drafter",
        "python convert_hf_to_gguf.py target --outtype bf16 --outfile target.gguf",
        "python convert_hf_to_gguf.py drafter --target-model-dir target --outtype bf16 \\\n"
        "  --outfile drafter.gguf",
        "llama-server -m target.gguf -md drafter.gguf --spec-type draft-dflash \\\n"
        f"  --spec-draft-n-max {config.num_drafts} -fa on",
    ]
    remark = f"`--spec-draft-n-max` is K - 1 = {config.num_drafts}; its default is smaller."
    return "\n".join(steps), remark


def _transformers(config: DrafterConfig, model: ServedModel) -> tuple[str, str]:
    lines = [
        "pip install 'dflash[local]'\ndflash generate transformers",
        f"--model {shlex.quote(model.target)} --draft {model.drafter}",
        '"Name three noble gases."',
    ]
    return _continued(lines), (
        "The package `dflash` by z-lab, on CUDA; it lists the target families that it runs."
    )


def _revision(model: ServedModel) -> list[str]:
    return [] if model.target_revision is None else ["--revision", model.target_revision]


def _continued(lines: list[str]) -> str:
    return " \\\n  ".join(lines)


_WRITERS: dict[str, Callable[[DrafterConfig, ServedModel], tuple[str, str]]] = {
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
    "Transformers": _transformers,
}
