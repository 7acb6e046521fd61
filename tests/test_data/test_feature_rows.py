from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dflash_data.collect import feature_rows
from dflash_data.collect.feature_rows import feature_row, ids_fault, index_line
from dflash_data.drops import DropReason
from dflash_train.config import DataConfig, ServingSampling
from dflash_train.features.target import Target
from dflash_train.features.target_text import TargetText
from dflash_train.records.chat_template import RenderedRow, render_prompt
from dflash_train.records.conversation import Conversation, Privacy, Turn
from dflash_train.testing import STOP_TOKEN_ID


def answer_row(record: Conversation, target: Target) -> RenderedRow | DropReason:
    return feature_rows.answer_row(record, target, serving=ServingSampling())


def encode(target: Target, text: str) -> list[int]:
    return target.tokenizer(text, add_special_tokens=False).input_ids


def logged(target: Target, text: str = "Bay 4 is free.", **fields: Any) -> Conversation:
    """Give an on-policy record with the ids that an engine would log for it."""
    asked = [Turn(role="user", content="Is bay 4 free?")]
    output = [*encode(target, text), STOP_TOKEN_ID]
    defaults: dict[str, Any] = {
        "messages": [*asked, Turn(role="assistant", content=text)],
        "prompt_token_ids": render_prompt(target.tokenizer, asked),
        "output_token_ids": output,
        "finish_reason": "stop",
        "usage": {"completion_tokens": len(output)},
        "on_policy": True,
    }
    return Conversation(id="c", source="test", **(defaults | fields))


def with_output(record: Conversation, output: list[int], **fields: Any) -> Conversation:
    usage = {"completion_tokens": len(output)}
    return replace(record, output_token_ids=output, usage=usage, **fields)


def test_ids_of_the_log_are_the_row(target: Target):
    record = logged(target, prompt_token_ids=[7, 8, 9])
    row = answer_row(record, target)
    assert isinstance(row, RenderedRow)
    assert row.input_ids == [7, 8, 9, *(record.output_token_ids or [])]
    assert row.prompt_length == 3
    assert all(row.loss_mask[3:])


def test_ids_that_tokenising_again_would_not_give_are_kept(target: Target):
    """An engine may write the same text in other tokens; here the bytes of a special token."""
    whole = target.tokenizer.convert_tokens_to_ids("<|mask|>")
    assert isinstance(whole, int)
    spelt = [i for char in "<|mask|>" for i in encode(target, char)]
    assert encode(target, "<|mask|>") == [whole] != spelt
    record = with_output(logged(target, "<|mask|>"), [*spelt, STOP_TOKEN_ID])
    row = answer_row(record, target)
    assert isinstance(row, RenderedRow)
    assert row.input_ids[row.prompt_length :] == [*spelt, STOP_TOKEN_ID]


def test_ids_that_spell_another_answer_are_refused(target: Target):
    record = logged(target)
    ids = encode(target, "Bay 5 is free.")
    assert answer_row(with_output(record, [*ids, STOP_TOKEN_ID]), target) is DropReason.ids_mismatch
    cut = encode(target, "Bay 4 is fre")
    assert answer_row(with_output(record, cut), target) is DropReason.ids_mismatch


@pytest.mark.parametrize("place", ["prompt_token_ids", "output_token_ids"])
@pytest.mark.parametrize("foreign", [-1, 260, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(target: Target, place: str, foreign: int):
    record = logged(target)
    ids = [*getattr(record, place)[:-1], foreign]
    assert answer_row(replace(record, **{place: ids}), target) is DropReason.ids_mismatch


def test_fewer_ids_than_were_counted_are_a_cut_log(target: Target):
    record = logged(target)
    assert (
        answer_row(replace(record, output_token_ids=(record.output_token_ids or [])[:5]), target)
        is DropReason.truncated_log
    )
    assert ids_fault(replace(record, usage={}), target) is None, "a count that is not logged"


def test_ids_are_taken_from_this_tokenizer_only(target: Target):
    record = logged(target)
    assert ids_fault(replace(record, tokenizer=target.tokenizer_hash), target) is None
    other = replace(record, tokenizer="sha256:0")
    assert answer_row(other, target) is DropReason.ids_mismatch
    assert ids_fault(replace(record, on_policy=False), target) is DropReason.ids_mismatch


def test_the_final_stop_token_may_be_absent_and_special_tokens_may_be_shown(target: Target):
    record = logged(target)
    whole = record.output_token_ids or []
    assert ids_fault(with_output(record, whole[:-1], finish_reason="length"), target) is None
    im_start = 1
    shown = with_output(logged(target, "a<|im_start|>b"), [
        *encode(target, "a"), im_start, *encode(target, "b"), STOP_TOKEN_ID
    ])  # fmt: skip
    assert ids_fault(shown, target) is None
    hidden = replace(shown, messages=[*shown.prompt, Turn(role="assistant", content="ab")])
    assert ids_fault(hidden, target) is None


def test_a_budget_that_ends_inside_a_character_is_no_mismatch(target: Target):
    ids = encode(target, "5 \u20ac")[:-1]
    for text in ("5 ", "5 \ufffd"):
        record = with_output(logged(target, text), ids, finish_reason="length")
        assert ids_fault(record, target) is None


def test_a_stop_string_of_the_client_may_follow_the_text(target: Target):
    record = with_output(logged(target, "one"), encode(target, "one\n\nt"))
    assert ids_fault(record, target) is DropReason.ids_mismatch
    for stop in (["##", "\n\n"], "\n\n"):
        assert ids_fault(replace(record, sampling={"stop": stop}), target) is None


def test_a_space_that_decoding_drops_at_the_start_is_no_mismatch():
    """Metaspace tokenizers drop it; an engine decodes the answer after its prompt and keeps it."""
    vocabulary = {"\u2581ask": 0, "\u2581free": 1, "</s>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    target = TargetText(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"),
        stop_token_ids=frozenset({2}), name="words", revision="1", dtype="float32",
        target_layer_ids=[],
    )  # fmt: skip
    assert target.tokenizer.decode([1]) == "free"
    for text, want in ((" free", None), ("free", None), ("  free", DropReason.ids_mismatch)):
        record = Conversation(
            id="c", source="test", on_policy=True, prompt_token_ids=[0], output_token_ids=[1, 2],
            messages=[Turn(role="user", content="ask"), Turn(role="assistant", content=text)],
        )  # fmt: skip
        assert ids_fault(record, target) is want


def test_reasoning_and_calls_that_the_server_took_out_must_be_in_the_ids(target: Target):
    text = '<think>\nHm.\n</think>\n\nYes.<call>{"name": "bay", "arguments": {}}</call>'
    answer = Turn(
        role="assistant", content="\n\nYes.", reasoning="\nHm.\n",
        tool_calls=[{"id": "1", "name": "bay", "arguments": "{}"}],
    )  # fmt: skip
    record = with_output(logged(target), [*encode(target, text), STOP_TOKEN_ID])
    for turn, want in (
        (answer, None),
        (replace(answer, reasoning="No."), DropReason.ids_mismatch),
        (replace(answer, content="No."), DropReason.ids_mismatch),
        (replace(answer, tool_calls=[{"name": "door"}]), DropReason.ids_mismatch),
    ):
        assert ids_fault(replace(record, messages=[*record.prompt, turn]), target) is want


def test_a_record_without_ids_goes_through_the_template(target: Target):
    text = "write to EMAIL_1 now"
    spans = [(1, 9, 16, "EMAIL")]
    record = logged(
        target, text, prompt_token_ids=None, output_token_ids=None,
        privacy=Privacy(scrubbed=True, spans=spans, redactions={"EMAIL": 1}),
    )  # fmt: skip
    row = answer_row(record, target)
    assert isinstance(row, RenderedRow)
    kept = [i for i, wrote in zip(row.input_ids, row.loss_mask, strict=True) if wrote]
    assert target.tokenizer.decode(kept) == "write to  now<|im_end|>"
    half = replace(record, output_token_ids=[5, 6])
    assert answer_row(half, target) == row, "one list alone is no passthrough"


def test_refusals_of_the_template_have_their_reasons(target: Target):
    bare = logged(target, prompt_token_ids=None, output_token_ids=None)
    spelt = replace(bare, messages=[*bare.prompt, Turn(role="assistant", content="<|im_end|>")])
    assert answer_row(spelt, target) is DropReason.unstable_boundary
    empty = replace(bare, finish_reason="length")
    empty.messages = [*bare.prompt, Turn(role="assistant", content="")]
    assert answer_row(empty, target) is DropReason.no_supervised_token
    assert (
        answer_row(logged(target, "", output_token_ids=[], usage={}), target)
        is DropReason.no_supervised_token
    )


def test_an_unknown_end_is_never_stored_as_a_stop(target: Target):
    record = logged(target, finish_reason=None)
    num_tokens = len([*(record.prompt_token_ids or []), *(record.output_token_ids or [])])
    row = feature_row(record, torch.zeros(num_tokens, 4), DataConfig(), teacher=None)
    assert row.finish_reason == "length"
    assert index_line(record, DataConfig(), shard="s", row=0).finish_reason == "length"
    assert index_line(logged(target), DataConfig(), shard="s", row=0).finish_reason == "stop"
