"""Calls whose prompt was logged as the engine was fed it, from the log to the rows of `collect`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_data.collect.feature_rows import answer_row
from dflash_data.ingest.stage import ingest
from dflash_data.regenerate.plan import plan_shards
from dflash_data.regenerate.stage import regenerate
from dflash_train.config import EndpointApi, EndpointsConfig, RecipeConfig, TargetConfig
from dflash_train.features.target import Target
from dflash_train.records.chat_template import RenderedRow, render_prompt, render_request
from dflash_train.records.conversation import SPLITS, Conversation, Turn, read_split
from dflash_train.records.manifest import Manifest

EMAIL = "ana.lima@example.org"
NUM_CALLS = 30
GREEDY = {
    "temperature": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
}  # fmt: skip


def question(number: int) -> str:
    return f"Is bay {number} free?" if number % 5 else f"Write to {EMAIL} about bay {number}"


def rendered(asked: str) -> str:
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def log_line(number: int, target: Target, *, has_ids: bool) -> bytes:
    """Give a line of SGLang's log with the prompt's text, and with all ids or none."""
    encode = target.tokenizer
    prompt, answer = rendered(question(number)), f"Bay {number} is."
    event = {
        "timestamp": f"2026-10-{number % 20 + 1:02d}T08:43:20",
        "event": "request.finished",
        "rid": f"q-{number}",
        "obj": {
            "text": prompt,
            "input_ids": encode(prompt).input_ids if has_ids else None,
            "sampling_params": GREEDY,
        },
        "out": {
            "text": answer,
            "output_ids": encode(answer + "<|im_end|>").input_ids if has_ids else None,
            "meta_info": {"finish_reason": {"type": "stop"}},
        },
    }
    return orjson.dumps(event)


@pytest.fixture
def logged(config: RecipeConfig, target: Target, tmp_path: Path) -> RecipeConfig:
    """A recipe whose log is there, every other line with ids, and whose tokenizer is at hand."""
    folder = tmp_path / "tokenizer"
    target.tokenizer.save_pretrained(folder)
    lines = [log_line(n, target, has_ids=n % 2 == 0) for n in range(NUM_CALLS)]
    (tmp_path / "sglang.jsonl").write_bytes(b"\n".join(lines))
    data = replace(config.data, test_share=0.2, validation_share=0.2, target_aliases=["small"])
    return replace(config, target=TargetConfig(name_or_path=str(folder)), data=data)


def run_ingest(config: RecipeConfig) -> tuple[dict[str, Any], list[Conversation]]:
    """Give the data card and all records."""
    log = Path(config.runs_dir) / "sglang.jsonl"
    manifest = Manifest(stage="ingest", recipe_hash="sha256:0")
    ingest(config, log, evaluation={}, manifest=manifest)
    folder = config.run_dir / "conversations"
    card = orjson.loads((folder / "data_card.json").read_bytes())
    return card, [record for split in SPLITS for record in read_split(folder, split)]


def asked_in(record: Conversation) -> list[Turn]:
    """Read the messages of one rendered question back."""
    text = record.messages[0].content or ""
    first, last = rendered("\0").split("\0")
    assert text.startswith(first)
    return [Turn(role="user", content=text.removeprefix(first).removesuffix(last))]


def test_answers_of_the_served_model_are_rows_of_their_ids_or_their_text(
    logged: RecipeConfig, target: Target
):
    data = replace(logged.data, served_model="small", trust_unknown_sampling=True)
    card, records = run_ingest(replace(logged, data=data))
    assert (card["without_model"], card["served_model"]) == (NUM_CALLS, "small")
    assert card["answers"] == {"match": NUM_CALLS}
    assert card["token_ids"] == {"kept": 12, "redacted": 3}
    assert card["read"] == card["kept"] == NUM_CALLS
    for record in records:
        assert (record.prompt_token_ids is None) == (record.output_token_ids is None)
        row = answer_row(record, target, serving=data.serving_sampling)
        assert isinstance(row, RenderedRow)
        # One rendering of the messages, not a rendering of the rendered text.
        assert row.input_ids[: row.prompt_length] == render_prompt(
            target.tokenizer, asked_in(record)
        )
        answer = target.tokenizer.decode(row.input_ids[row.prompt_length :])
        assert answer == f"{record.messages[-1].content}<|im_end|>"


def test_the_target_is_asked_the_logged_prompt_and_no_template_around_it(
    logged: RecipeConfig, target: Target
):
    card, records = run_ingest(logged)
    assert card["answers"] == {"other_model": NUM_CALLS}
    assert card["kept"] == NUM_CALLS
    by_id = {record.id: record for record in records}
    regenerate(logged, target=target, manifest=Manifest(stage="regenerate", recipe_hash="r"))
    answered = [r for s in SPLITS for r in read_split(logged.run_dir / "regenerated", s)]
    assert len(answered) == NUM_CALLS
    for record in answered:
        assert render_request(target.tokenizer, by_id[record.id]) == record.prompt_token_ids
        assert record.prompt_token_ids == render_prompt(target.tokenizer, asked_in(record))
        assert (record.origin, record.has_rendered_prompt) == ("regenerated", True)
        row = answer_row(record, target, serving=logged.data.serving_sampling)
        assert isinstance(row, RenderedRow)


def test_a_server_that_applies_the_template_itself_is_never_asked(
    logged: RecipeConfig, target: Target, tmp_path: Path
):
    _, records = run_ingest(logged)
    for api, dropped in ((EndpointApi.completions, 0), (EndpointApi.chat, NUM_CALLS)):
        endpoints = EndpointsConfig(urls=["http://localhost:1/v1"], api=api)
        plans = plan_shards(
            tmp_path / api.value,
            logged.run_dir / "conversations",
            target=target,
            data=replace(logged.data, endpoints=endpoints),
        )
        reasons = [reason for plan in plans for reason in plan.dropped.values()]
        assert reasons == ["unstable_boundary"] * dropped
        assert sum(plan.num_asked for plan in plans) + dropped == len(records)
