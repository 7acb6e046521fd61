from typing import Any

import pytest
from msgspec.structs import replace

from dflash_data.drops import DropReason
from dflash_data.ingest.on_policy import (
    PolicyReason,
    drop_reason,
    is_kept,
    judge,
    names_no_model,
)
from dflash_train.config import DataConfig, Regenerate, ServingSampling
from dflash_train.records.conversation import Conversation, Turn

NO_PENALTY = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1}
GREEDY = {"temperature": 0, **NO_PENALTY}
SAMPLED = {"temperature": 0.2, "top_p": 0.9, "top_k": -1, "min_p": 0, **NO_PENALTY}
SERVING = ServingSampling(temperature=0.2, top_p=0.9)


def call(**fields: Any) -> Conversation:
    """Give a call of the target that passes every test under `recipe()`."""
    answer = fields.pop("answer", Turn(role="assistant", content="Bay 4 is free."))
    asked = Turn(role="user", content="Is bay 4 free?")
    defaults: dict[str, Any] = {
        "id": "c", "source": "test", "model": "support-small", "ts": "2026-10-14T08:40:00Z",
        "sampling": dict(GREEDY), "messages": [asked, *([answer] if answer else [])],
    }  # fmt: skip
    return Conversation(**(defaults | fields))


def recipe(**fields: Any) -> DataConfig:
    settings: dict[str, Any] = {"target_aliases": ["support-small"]} | fields
    return DataConfig(**settings)


def reason(record: Conversation, data: DataConfig | None = None) -> str | None:
    judge(record, data or recipe())
    assert record.on_policy == (record.on_policy_reason == "match")
    return record.on_policy_reason


def sampled(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (SAMPLED | changes).items() if value is not None}


def test_an_answer_that_passes_every_test_is_the_targets_own():
    assert reason(call()) == "match"
    assert reason(call(sampling=SAMPLED), recipe(serving_sampling=SERVING)) == "match"


def test_without_aliases_no_logged_answer_is_the_targets():
    assert reason(call(), DataConfig()) == "other_model"


@pytest.mark.parametrize(
    ("served", "aliases", "want"),
    [
        ({"model": "support-small-v2"}, ["support-small"], "other_model"),
        ({"model": "support"}, ["support-small"], "other_model"),
        ({"model": "Support-Small"}, ["support-small"], "other_model"),
        ({"model": None}, ["support-small"], "other_model"),
        ({"model_revision": "r7"}, ["support-small"], "match"),
        ({"model_revision": "r7"}, ["support-small@r7"], "match"),
        ({"model_revision": "r8"}, ["support-small@r7"], "other_model"),
        ({"model_revision": None}, ["support-small@r7"], "other_model"),
        ({"adapter": "polite"}, ["support-small"], "other_model"),
        ({"adapter": "polite"}, ["polite"], "match"),
        ({"adapter": "polite-2"}, ["polite"], "other_model"),
        ({"adapter": None}, ["polite"], "other_model"),
    ],
)
def test_only_the_full_name_of_the_weights_counts(
    served: dict[str, Any], aliases: list[str], want: str
):
    assert reason(call(**served), recipe(target_aliases=aliases)) == want


@pytest.mark.parametrize(
    ("served", "served_model", "want"),
    [
        ({"source": "sglang"}, None, "other_model"),
        ({"source": "sglang"}, "support-small", "match"),
        ({"source": "sglang"}, "support-large", "other_model"),
        ({"source": "vllm_log"}, "support-small", "match"),
        ({"source": "vllm_log", "model": "support-large"}, "support-small", "other_model"),
        ({"source": "sglang", "adapter": "polite"}, "support-small", "other_model"),
        ({"source": "litellm"}, "support-small", "other_model"),
        ({"source": "sharegpt", "origin": "public"}, "support-small", "other_model"),
    ],
)
def test_the_recipe_names_the_model_only_where_a_servers_own_log_names_none(
    served: dict[str, Any], served_model: str | None, want: str
):
    record = call(**({"model": None} | served))
    assert reason(record, recipe(served_model=served_model)) == want
    assert record.model == served.get("model"), "what was logged stays as it was"
    is_unnamed = served in ({"source": "sglang"}, {"source": "vllm_log"})
    assert names_no_model(record) == is_unnamed


@pytest.mark.parametrize(
    ("ts", "want"),
    [
        ("2026-10-14T07:59:59.999999Z", "outside_deployment"),
        ("2026-10-14T08:00:00Z", "match"),
        ("2026-10-14T08:00:00.500000Z", "match"),
        ("2026-10-14T23:59:59.999999Z", "match"),
        ("2026-10-15T00:00:00Z", "outside_deployment"),
        (None, "outside_deployment"),
    ],
)
def test_a_name_counts_only_while_these_weights_stood_behind_it(ts: str | None, want: str):
    window = recipe(target_valid_from="2026-10-14T10:00:00+02:00", target_valid_until="2026-10-15")
    assert reason(call(ts=ts), window) == want


def test_a_deployment_may_be_open_at_either_end():
    assert reason(call(ts=None)) == "match"
    assert reason(call(), recipe(target_valid_from="2026-10-15")) == "outside_deployment"
    assert reason(call(), recipe(target_valid_until="2026-10-14")) == "outside_deployment"


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (GREEDY, "match"),
        (GREEDY | {"temperature": 1e-7}, "match"),
        (GREEDY | {"temperature": "0.0"}, "match"),
        (GREEDY | {"top_p": 0.5, "top_k": 40, "min_p": 0.1}, "match"),
        (GREEDY | {"temperature": 0.7, "top_k": 1}, "match"),
        (GREEDY | {"temperature": 0.7}, "other_sampling"),
        (GREEDY | {"temperature": "warm"}, "other_sampling"),
        (GREEDY | {"repetition_penalty": 1.05}, "other_sampling"),
        (GREEDY | {"presence_penalty": 0.5}, "other_sampling"),
        (GREEDY | {"max_tokens": 5, "seed": 3, "stop": ["x"], "n": 2, "index": 0}, "match"),
        (NO_PENALTY, "sampling_unknown"),
        ({"temperature": 0}, "sampling_unknown"),
        ({}, "sampling_unknown"),
        ({"temperature": 0.7}, "other_sampling"),
    ],
)
def test_greedy_serving_needs_a_greedy_log(sampling: dict[str, Any], want: str):
    assert reason(call(sampling=sampling)) == want


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (sampled(top_k=0), "match"),
        (sampled(top_k=1 << 30), "match"),
        (sampled(temperature=0.2000000001), "match"),
        (sampled(temperature=0.21), "other_sampling"),
        (sampled(temperature=0), "other_sampling"),
        (sampled(top_k=1), "other_sampling"),
        (sampled(top_p=1), "other_sampling"),
        (sampled(min_p=0.05), "other_sampling"),
        (sampled(frequency_penalty=0.1), "other_sampling"),
        *((sampled(**{key: None}), "sampling_unknown") for key in SAMPLED),
    ],
)
def test_sampled_serving_compares_every_setting(sampling: dict[str, Any], want: str):
    assert reason(call(sampling=sampling), recipe(serving_sampling=SERVING)) == want


def test_trust_takes_what_is_not_logged_but_not_what_is_logged_otherwise():
    trusting = recipe(trust_unknown_sampling=True, serving_sampling=SERVING)
    assert reason(call(sampling={}), trusting) == "match"
    assert reason(call(sampling={"top_p": 0.9}), trusting) == "match"
    assert reason(call(sampling={"top_p": 0.8}), trusting) == "other_sampling"
    trusting = recipe(trust_unknown_sampling=True)
    assert reason(call(sampling={"top_p": 0.8}), trusting) == "match"
    assert reason(call(sampling={"presence_penalty": 1}), trusting) == "other_sampling"


def thinking(sampling: dict[str, Any], reasoning: str | None, **usage: int) -> Conversation:
    answer = Turn(role="assistant", content="Yes.", reasoning=reasoning)
    return call(answer=answer, sampling=GREEDY | sampling, usage=usage)


@pytest.mark.parametrize(
    ("record", "serving", "want"),
    [
        (thinking({}, "Let me see."), {}, "other_thinking"),
        (thinking({"enable_thinking": True}, None), {}, "other_thinking"),
        (thinking({"enable_thinking": False}, None), {}, "match"),
        (thinking({"reasoning_effort": "high"}, None), {}, "other_thinking"),
        (thinking({}, None, reasoning_tokens=9), {}, "other_thinking"),
        (thinking({}, None, reasoning_tokens=0), {}, "match"),
        (thinking({"enable_thinking": True}, "Hm."), {"enable_thinking": True}, "match"),
        (thinking({"enable_thinking": True}, None), {"enable_thinking": True}, "other_thinking"),
        (thinking({"enable_thinking": False}, "Hm."), {"enable_thinking": True}, "other_thinking"),
        (thinking({}, "Hm."), {"enable_thinking": True}, "sampling_unknown"),
        (thinking({"enable_thinking": True}, None), {"enable_thinking": False}, "other_thinking"),
        (thinking({"enable_thinking": False}, None), {"enable_thinking": False}, "match"),
        (thinking({"reasoning_effort": "low"}, "Hm."), {"reasoning_effort": "low"}, "match"),
        (thinking({"reasoning_effort": "low"}, None), {"reasoning_effort": "low"},
         "other_thinking"),
        (thinking({"reasoning_effort": "high"}, "Hm."), {"reasoning_effort": "low"},
         "other_thinking"),
    ],
)  # fmt: skip
def test_thinking_is_as_served_and_its_reasoning_is_in_the_log(
    record: Conversation, serving: dict[str, Any], want: str
):
    assert reason(record, recipe(serving_sampling=ServingSampling(**serving))) == want


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        ({"response_format": {"type": "text"}}, "match"),
        ({"response_format": {"type": "json_object"}}, "constrained"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "constrained"),
        ({"response_format": {"schema": {}}}, "constrained"),
        ({"response_format": "json_object"}, "constrained"),
        ({"logit_bias": {}}, "match"),
        ({"logit_bias": {"42": -100}}, "constrained"),
        ({"tool_choice": "auto"}, "match"),
        ({"tool_choice": "none"}, "match"),
        ({"tool_choice": {"type": "auto"}}, "match"),
        ({"tool_choice": "required"}, "constrained"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "constrained"),
        ({"edited": False}, "match"),
        ({"edited": True}, "edited"),
    ],
)
def test_the_target_chose_every_token_and_nobody_changed_one(sampling: dict[str, Any], want: str):
    assert reason(call(sampling=GREEDY | sampling)) == want


def test_a_call_without_an_answer_and_public_text_are_never_the_targets():
    assert reason(call(answer=None)) == "no_answer"
    assert reason(call(origin="public")) == "other_model"


def test_the_first_failure_is_the_reason():
    """Repair the failures of one record one by one: each uncovers the next of the list."""
    data = recipe(
        target_valid_from="2026-10-14", serving_sampling=ServingSampling(enable_thinking=True)
    )
    record = call(answer=None, model="other", ts=None, sampling={
        "temperature": 1, "logit_bias": {"1": 1}, "edited": True
    })  # fmt: skip
    repairs: list[tuple[str, dict[str, Any]]] = [
        ("no_answer", {"messages": call().messages}),
        ("other_model", {"model": "support-small"}),
        ("outside_deployment", {"ts": "2026-10-14T00:00:00Z"}),
        ("other_sampling", {"temperature": 0}),
        ("sampling_unknown", NO_PENALTY | {"enable_thinking": False}),
        ("other_thinking", {"enable_thinking": True}),
        ("other_thinking", {
            "messages": [
                call().messages[0], Turn(role="assistant", content="Yes.", reasoning="Hm.")
            ],
        }),
        ("constrained", {"logit_bias": {}}),
        ("edited", {"edited": False}),
    ]  # fmt: skip
    for want, repair in repairs:
        assert reason(record, data) == want
        fields = {key: value for key, value in repair.items() if key in ("messages", "model", "ts")}
        settings = {key: value for key, value in repair.items() if key not in fields}
        record = replace(record, **fields, sampling=record.sampling | settings)
    assert reason(record, data) == "match"
    assert {want for want, _ in repairs} | {"match"} == {each.value for each in PolicyReason}


def test_off_policy_calls_stay_unless_nothing_is_regenerated():
    answered, stranger, asked = call(), call(model="other"), call(answer=None)
    never = recipe(regenerate=Regenerate.never)
    for record in (answered, stranger, asked):
        judge(record, never)
        assert is_kept(record, recipe())
    assert is_kept(answered, never)
    assert drop_reason(stranger, never) is DropReason.off_policy
    assert drop_reason(asked, never) is DropReason.off_policy


def test_a_further_choice_is_dropped_and_never_regenerated():
    for index, want in ((0, None), (1, DropReason.extra_choice)):
        record = call(sampling=GREEDY | {"n": 2, "index": index})
        judge(record, recipe())
        assert drop_reason(record, recipe()) is want


def test_settings_that_cannot_be_meant_name_their_field():
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("data.target_valid_from", {"target_valid_from": "yesterday"}),
        ("data.target_valid_until", {
            "target_valid_from": "2026-10-02", "target_valid_until": "2026-10-01"
        }),
        ("data.served_model", {"served_model": ""}),
        ("data.regenerate", {"target_aliases": [], "regenerate": Regenerate.never}),
    ]  # fmt: skip
    for field, settings in wrong:
        with pytest.raises(ValueError, match=field):
            recipe(**settings)
    with pytest.raises(ValueError, match=r"data\.serving_sampling\.top_p \(=0\)"):
        ServingSampling(top_p=0)
