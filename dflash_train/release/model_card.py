"""The model card: what the drafter is for, how to serve it, what was measured, where it comes from.

    dflash-train push repo_id=OWNER/NAME license=apache-2.0 dry_run=true

The text is a template filled from the checkpoint, the run's manifests and its report; the header
for the Hub's machinery is data here and becomes YAML in `hub.py`.
"""

import importlib.resources
import re
import shlex
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from dflash_train.config import require
from dflash_train.drafter.config import SLIDING, DrafterConfig
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.release.evaluation_results import AcceptanceRow, Evaluation
from dflash_train.release.resolve import is_hub_id
from dflash_train.release.run_record import RunRecord
from dflash_train.release.serve_commands import ServedModel, serve_commands

TAGS = ("dflash", "speculative-decoding", "draft-model")
TARGET_WORD = "TARGET"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of."""

    repo_id: str
    license_id: str
    base_model: str | None
    """Hub id of the target; None if it has none."""
    config: DrafterConfig
    num_parameters: int
    dtype: str
    metadata: CheckpointMetadata | None
    record: RunRecord
    evaluation: Evaluation | None
    """None for a drafter that is published without a report."""
    weights_hash: str
    has_data_card: bool


@dataclass(frozen=True, kw_only=True)
class CardHeader:
    """What the Hub reads of a card."""

    model_name: str
    license_id: str
    base_model: str | None
    tags: tuple[str, ...]
    results: list[AcceptanceRow]


def check_license(license_id: str) -> None:
    """Raise ValueError unless a text can be the licence of a card."""
    require(
        _LICENSE.fullmatch(license_id) is not None,
        f"license (={license_id or 'unset'}) must be a licence as the Hub names it, in small "
        "letters. Add license=apache-2.0, or license=other for weights that only you may use.",
    )


def card_header(facts: CardFacts) -> CardHeader:
    """Give the header of a card."""
    return CardHeader(
        model_name=facts.repo_id.split("/")[-1],
        license_id=facts.license_id,
        base_model=facts.base_model,
        tags=(*TAGS, *(["dflash2"] if facts.config.is_dflash2 else [])),
        results=[] if facts.evaluation is None else facts.evaluation.rows,
    )


def card_text(facts: CardFacts) -> str:
    """Give the Markdown of a card, without its header."""
    environment = Environment(
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "mean": _show_mean, "interval": _show_interval, "share": _show_share,
        "count": _show_count,
    }  # fmt: skip
    source = importlib.resources.files("dflash_train.release") / "model_card.md.j2"
    text = environment.from_string(source.read_text("utf-8")).render(**_words(facts))
    return re.sub(r"\n{3,}", "\n\n", text)


def _words(facts: CardFacts) -> dict[str, Any]:
    """Give what the template names."""
    model = ServedModel(
        target=facts.base_model or TARGET_WORD,
        target_revision=_served_revision(facts),
        drafter=facts.repo_id,
    )
    commands = serve_commands(facts.config, model)
    return {
        "name": facts.repo_id.split("/")[-1],
        "repo_id": facts.repo_id,
        "variant": _variant(facts.config),
        "config": facts.config,
        "target_text": _target_text(facts),
        "target_is_placeholder": facts.base_model is None,
        "own_command": _own_command(facts),
        "summary": _summary(facts),
        "commands": commands,
        "refused": [each for each in commands if each.command is None],
        "evaluation": facts.evaluation,
        "is_simulated": facts.record.is_simulated,
        "live_sentence": _live_sentence(facts.evaluation),
        "record": facts.record,
        "limits": _limits(facts),
        "license": facts.license_id,
        "provenance": _provenance(facts),
        "has_data_card": facts.has_data_card,
    }


def _own_command(facts: CardFacts) -> str:
    """Give the command that tries the drafter with this toolkit, on the target as trained."""
    shown = shown_target(facts.record.target)
    is_wheel = shown.startswith("wheel:")  # its equals signs need hydra's own quotes
    place = f"'{shown}'" if is_wheel else facts.base_model or TARGET_WORD
    setting = f"target.name_or_path={place}"
    quoted = f'"{setting}"' if is_wheel else shlex.quote(setting)
    return f"dflash-train generate checkpoint={facts.repo_id} \\\n  {quoted}"


def _served_revision(facts: CardFacts) -> str | None:
    """Give the target's commit, if it is one of the Hub repository that the commands name."""
    target = facts.record.target or {}
    revision = str(target.get("revision"))
    same = facts.base_model is not None and target.get("name") == facts.base_model
    return revision if same and _COMMIT.fullmatch(revision) else None


def _variant(config: DrafterConfig) -> str:
    if config.is_dflash2:
        return "DFlash 2"
    return "DSpark" if config.is_shifted else "DFlash"


def _target_text(facts: CardFacts) -> str:
    if facts.base_model is not None:
        return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    return f"`{shown_target(facts.record.target)}`"


def shown_target(target: dict[str, Any] | None) -> str:
    """Name a target without the folder that it was loaded from."""
    if target is None:
        return TARGET_WORD
    name = str(target["name"])
    is_place = not is_hub_id(name) and not name.startswith("wheel:")
    return name.rstrip("/").split("/")[-1] if is_place else name


def _target_as_trained(target: dict[str, Any]) -> str:
    """Name what the drafter saw, as far as the block tells: one of another dialect tells less."""
    parts = [f"`{shown_target(target)}`"]
    if target.get("revision") is not None:
        parts.append(f"revision `{target['revision']}`")
    if target.get("dtype") is not None:
        parts.append(str(target["dtype"]))
    return ", ".join(parts)


def _summary(facts: CardFacts) -> list[tuple[str, str]]:
    config, target = facts.config, facts.record.target
    rows = [("Target", _target_text(facts))]
    if target is not None:
        rows.append(("Target as trained", _target_as_trained(target)))
    sliding = (config.layer_types or []).count(SLIDING)
    layers = f"{config.num_hidden_layers} layers"
    if sliding:
        layers += f", {sliding} of them with a window of {config.sliding_window:,} tokens"
    rows += [
        ("Drafter", f"{facts.num_parameters / 1e6:,.1f} M parameters, {layers}, {facts.dtype}"),
        ("Block", f"K = {config.block_size}: {config.num_drafts} drafts a step"),
        ("Tap layers", f"{', '.join(map(str, config.target_layer_ids))} of "
         f"{config.num_target_layers}, 0-based"),
        ("Mask token", f"id {config.mask_token_id}"),
    ]  # fmt: skip
    if facts.evaluation is not None and facts.evaluation.rows:
        first = facts.evaluation.rows[0]
        length = f"**{_show_mean(first.pooled)}** ({_show_interval(first.interval)})"
        rows.append(("Acceptance length", f"{length} on {first.label.lower()}"))
    return rows


def _live_sentence(evaluation: Evaluation | None) -> str:
    if evaluation is None or not evaluation.num_live:
        return ""
    compared = (
        f"{evaluation.num_identical} of {evaluation.num_live} answers decoded live equal plain "
        f"greedy decoding (token match {evaluation.token_match_rate:.1%})."
    )
    if evaluation.speed_up is None:
        return compared
    return (
        f"{compared} On {evaluation.machine}, one request at a time, this toolkit's decoder runs "
        f"at {evaluation.speed_up:.2f} times the speed of plain decoding; other engines differ."
    )


def _limits(facts: CardFacts) -> list[str]:
    config = facts.config
    target = shown_target(facts.record.target) if facts.record.target else facts.base_model
    limits = [
        f"Trained on the hidden states of {target or 'its target'} as it was. A fine-tuned, "
        "quantised or otherwise changed target accepts fewer drafts; its output stays right.",
        f"Trained for blocks of {config.block_size}. Drafting fewer tokens a step narrows the "
        "block to one that it has not seen; more than "
        f"{config.num_drafts} drafts are untrained.",
        f"Positions up to {config.max_position_embeddings:,} tokens.",
        "Acceptance depends on the traffic: expect less on text unlike that of training, and "
        "measure on your own.",
    ]
    thinking = facts.metadata.thinking if facts.metadata is not None else None
    if thinking is not None:
        mode = "with" if thinking else "without"
        limits.append(f"Trained on answers {mode} thinking; the other mode accepts fewer drafts.")
    if config.output_multiplier != 1.0 or config.final_logit_softcapping is not None:
        limits.append(
            "Scales or caps its logits, which vLLM leaves out: greedy drafts stay the same, "
            "sampled ones differ."
        )
    return limits


def _provenance(facts: CardFacts) -> list[tuple[str, str]]:
    target = facts.record.target
    rows = [("Weights", f"`{facts.weights_hash}`")]
    if target is not None:
        rows.append(("Target as trained", _target_as_trained(target)))
        hashes = (("Tokenizer", "tokenizer"), ("Chat template", "chat_template"))
        rows += [(label, f"`{target[key]}`") for label, key in hashes if target.get(key)]
    return [*rows, *facts.record.provenance.items()]


def _show_mean(value: float) -> str:
    return f"{value:.2f}"


def _show_interval(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _show_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _show_count(value: int) -> str:
    return f"{value:,}"
