"""Did this target write this answer? If so it is kept, else `regenerate` writes another.

The tests run in a fixed order and the first that fails is the reason. They read the record alone:
no tokenizer, no network, the same time for any record.

What counts as equal sampling:

- Greedy is greedy: at temperature 0, or top_k 1, the likeliest token is taken whatever the other
  cuts say, so top_p, top_k and min_p are neither compared nor needed. Engines round temperatures
  below 1e-6 to 0, and so do we. Penalties move the likeliest token and always count.
- Off is off: top_k 0, -1 and 2**30 (SGLang's "all") are the same. Numbers agree to six digits.
- A key that the log does not show is unknown, not its default: servers put the target's
  `generation_config.json` in its place. `data.trust_unknown_sampling` takes it as equal.
- A log that names no model at all is that of the server `data.served_model` names, if any.
- max_tokens, seed and stop end or vary an answer, and leave each of its tokens the target's.

Speculative serving, other engines and quantised weights pass, if the alias says so.
"""

import functools
import math
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Any

from dflash_data.drops import DropReason
from dflash_train.config import DataConfig, Regenerate, ServingSampling, parse_moment
from dflash_train.records.conversation import Conversation

GREEDY_BELOW = 1e-6
"""Temperature under which vLLM and SGLang take the likeliest token."""
ALL_TOKENS = 1 << 30
"""A top_k that stands for the whole vocabulary, as 0 and -1 do."""
PENALTIES = frozenset(("presence_penalty", "frequency_penalty", "repetition_penalty"))
"""What moves a token of a greedy answer."""
SETTINGS = PENALTIES | {"temperature", "top_p", "top_k", "min_p"}
"""What moves a token of a sampled answer."""
THINKING = ("enable_thinking", "reasoning_effort")
FREE_TOOL_CHOICES = ("auto", "none")
LOGS_OF_ONE_SERVER = frozenset(("sglang", "vllm_log"))
"""Formats that a server of one model writes itself, with lines that need not name it."""


class PolicyReason(Enum):
    """Every value of `Conversation.on_policy_reason`."""

    match = "match"
    no_answer = "no_answer"
    other_model = "other_model"
    outside_deployment = "outside_deployment"
    other_sampling = "other_sampling"
    sampling_unknown = "sampling_unknown"
    other_thinking = "other_thinking"
    constrained = "constrained"
    edited = "edited"


def judge(record: Conversation, data: DataConfig) -> None:
    """Set `on_policy` and `on_policy_reason` of a logged or public record.

    Conversations of origin `public` never pass: nothing says who wrote them.
    """
    reason = _first_failure(record, data)
    record.on_policy = reason is PolicyReason.match
    record.on_policy_reason = reason.value


def names_no_model(record: Conversation) -> bool:
    """Say whether a call comes from a server's own log and only the recipe can tell the model.

    A gateway that leaves the name out may have asked any model: its calls are no such calls.
    """
    return record.source in LOGS_OF_ONE_SERVER and not (record.adapter or record.model)


def is_kept(record: Conversation, data: DataConfig) -> bool:
    """Say whether a judged record stays; see `drop_reason`."""
    return drop_reason(record, data) is None


def drop_reason(record: Conversation, data: DataConfig) -> DropReason | None:
    """Give why a judged record goes, or None where it stays.

    Further choices of a call go, whoever wrote them: regenerating one would answer the prompt of
    the first again. Off-policy records go if `data.regenerate` is `never`. The scrubber may turn a
    record off-policy (reason `edited`), so ask after it has run.
    """
    if _number(record.sampling.get("index", 0)) != 0:
        return DropReason.extra_choice
    if data.regenerate is Regenerate.never and not record.on_policy:
        return DropReason.off_policy
    return None


def _first_failure(record: Conversation, data: DataConfig) -> PolicyReason:
    if record.answer is None:
        return PolicyReason.no_answer
    for passes, reason in _TESTS:
        if not passes(record, data):
            return reason
    return PolicyReason.match


def _is_the_target(record: Conversation, data: DataConfig) -> bool:
    """Compare what was served, the adapter where there is one, with the aliases."""
    served = record.adapter or record.model
    if names_no_model(record):
        served = data.served_model
    if record.origin == "public" or not served:
        return False
    aliases = data.target_aliases
    return served in aliases or f"{served}@{record.model_revision}" in aliases


def _was_deployed(record: Conversation, data: DataConfig) -> bool:
    if data.target_valid_from is None and data.target_valid_until is None:
        return True
    if record.ts is None:
        return False
    moment = parse_moment(record.ts)
    is_early = data.target_valid_from is not None and moment < _bound(data.target_valid_from)
    is_late = data.target_valid_until is not None and moment >= _bound(data.target_valid_until)
    return not (is_early or is_late)


@functools.lru_cache(maxsize=8)
def _bound(text: str) -> datetime:
    return parse_moment(text)


def _has_serving_sampling(record: Conversation, data: DataConfig) -> bool:
    """Compare the keys that are there; those that are not are the next test's."""
    logged, serving = record.sampling, data.serving_sampling
    if serving.is_greedy and "temperature" in logged and not _is_greedy(logged):
        return False
    compared = _deciding(serving) & logged.keys()
    return all(_agrees(key, logged[key], getattr(serving, key)) for key in compared)


def _is_sampling_known(record: Conversation, data: DataConfig) -> bool:
    if data.trust_unknown_sampling:
        return True
    logged, serving = record.sampling, data.serving_sampling
    if serving.is_greedy and not _is_greedy(logged):
        return False
    has_thinking = all(key in logged for key in THINKING if getattr(serving, key) is not None)
    return has_thinking and logged.keys() >= _deciding(serving)


def _deciding(serving: ServingSampling) -> frozenset[str]:
    return PENALTIES if serving.is_greedy else SETTINGS


def _has_serving_thinking(record: Conversation, data: DataConfig) -> bool:
    """Compare switch and level, and see that the reasoning is there if the target reasons."""
    logged, serving = record.sampling, data.serving_sampling
    has_switch = serving.enable_thinking if serving.enable_thinking is not None else serving.thinks
    if logged.get("enable_thinking", has_switch) != has_switch:
        return False
    effort = serving.reasoning_effort or "none"
    if logged.get("reasoning_effort", effort) != effort:
        return False
    assert record.answer is not None
    has_reasoning = bool(record.answer.reasoning)
    is_stripped = not has_reasoning and record.usage.get("reasoning_tokens", 0) > 0
    return has_reasoning == serving.thinks and not is_stripped


def _is_free(record: Conversation, data: DataConfig) -> bool:
    """See that no grammar, bias or forced call had a say in the tokens."""
    logged = record.sampling
    form, choice = (_kind(logged.get(key)) for key in ("response_format", "tool_choice"))
    is_bound = form not in (None, "text") or choice not in (None, *FREE_TOOL_CHOICES)
    return not is_bound and not logged.get("logit_bias")


def _kind(setting: Any) -> Any:
    """Give what a setting asks for: itself, or the type of an object, "object" if it has none."""
    return setting.get("type", "object") if isinstance(setting, dict) else setting


def _is_unaltered(record: Conversation, data: DataConfig) -> bool:
    return not record.sampling.get("edited")


_TESTS: tuple[tuple[Callable[[Conversation, DataConfig], bool], PolicyReason], ...] = (
    (_is_the_target, PolicyReason.other_model),
    (_was_deployed, PolicyReason.outside_deployment),
    (_has_serving_sampling, PolicyReason.other_sampling),
    (_is_sampling_known, PolicyReason.sampling_unknown),
    (_has_serving_thinking, PolicyReason.other_thinking),
    (_is_free, PolicyReason.constrained),
    (_is_unaltered, PolicyReason.edited),
)


def _is_greedy(logged: dict[str, Any]) -> bool:
    temperature = _number(logged.get("temperature"))
    is_cold = temperature is not None and 0 <= temperature < GREEDY_BELOW
    return is_cold or _number(logged.get("top_k")) == 1


def _agrees(key: str, logged: Any, serving: float) -> bool:
    value = _number(logged)
    if value is None:
        return False
    if key == "top_k" and (value <= 0 or value >= ALL_TOKENS):
        value = 0.0
    return math.isclose(value, serving, rel_tol=1e-6, abs_tol=GREEDY_BELOW)


def _number(value: Any) -> float | None:
    """Read a logged number, which some formats hold as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
