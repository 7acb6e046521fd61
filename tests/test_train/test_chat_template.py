import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dflash_train.config import ServingSampling
from dflash_train.records.chat_template import (
    NoSupervisedTokenError,
    RenderedRow,
    UnstableBoundaryError,
    _touched_by_offsets,
    render_prompt,
    render_request,
    render_row,
)
from dflash_train.records.conversation import Conversation, Privacy, Turn
from dflash_train.testing import CHAT_TEMPLATE, SPECIAL_TOKENS, STOP_TOKEN_ID, tiny_tokenizer
from dflash_train.training.blocks import label_mask, select_anchors

STOP = frozenset({STOP_TOKEN_ID})
TRIMMED = CHAT_TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}")
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n"
    "{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""Thinks before the last answer, forgets what it thought before earlier ones."""
FORGETFUL = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""Opens the reasoning in the prompt, but prints none with an answer."""
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{{ m.tool_call_id }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(answer: str | None = "fine", **fields: Any) -> Conversation:
    messages = [Turn(role="system", content="be brief"), Turn(role="user", content="how are you?")]
    if answer is not None:
        messages.append(Turn(role="assistant", content=answer))
    defaults: dict[str, Any] = {"messages": messages, "finish_reason": "stop"}
    return Conversation(id="c", source="test", **(defaults | fields))


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Give the tiny tokenizer with merges that know no word boundaries."""
    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merged = [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def render(tokenizer: Any, record: Conversation) -> RenderedRow:
    return render_row(tokenizer, record, stop_token_ids=STOP)


def parts(tokenizer: Any, row: RenderedRow) -> tuple[str, str]:
    """Give the text before the first supervised token, and that of all supervised ones."""
    supervised = [i for i, wrote in zip(row.input_ids, row.loss_mask, strict=True) if wrote]
    return (
        tokenizer.decode(row.input_ids[: row.prompt_length]),
        tokenizer.decode(supervised),
    )


def test_a_row_is_the_prompt_then_the_answer_with_its_stop_token():
    tokenizer = tiny_tokenizer()
    row = render(tokenizer, conversation())
    prompt = render_prompt(tokenizer, conversation().prompt)
    assert row.input_ids[: len(prompt)] == prompt
    assert row.loss_mask == [False] * len(prompt) + [True] * (len(row.input_ids) - len(prompt))
    answer = row.input_ids[len(prompt) :]
    assert tokenizer.decode(answer) == "fine<|im_end|>"
    assert answer[-1] == STOP_TOKEN_ID, "what the template prints after it is cut"


def test_logged_token_ids_rule_over_the_text():
    logged = conversation(prompt_token_ids=[7, 8, 9], output_token_ids=[10, 2])
    row = render(tiny_tokenizer(), logged)
    assert row.input_ids == [7, 8, 9, 10, 2]
    assert row.loss_mask == [False, False, False, True, True]


def rendered(answer: str | None = "fine", *, prompt: str | None = None, **fields: Any):
    """Give the same call as `conversation`, its prompt as an engine's log holds it."""
    text = parts(tiny_tokenizer(), render(tiny_tokenizer(), conversation()))[0]
    messages = [Turn(role="user", content=text if prompt is None else prompt)]
    if answer is not None:
        messages.append(Turn(role="assistant", content=answer))
    return conversation(messages=messages, has_rendered_prompt=True, **fields)


@pytest.mark.parametrize("fields", [
    {}, {"finish_reason": "length"}, {"finish_reason": None}, {"sampling": {"stop": ["###"]}},
])  # fmt: skip
def test_a_rendered_prompt_gives_the_row_of_its_messages(fields: dict[str, Any]):
    tokenizer = tiny_tokenizer()
    want = render(tokenizer, conversation(**fields))
    assert render(tokenizer, rendered(**fields)) == want
    for record in (rendered(**fields), rendered(None, **fields)):
        assert render_request(tokenizer, record) == want.input_ids[: want.prompt_length]


def test_placeholders_behind_a_rendered_prompt_are_masked():
    spans = Privacy(spans=[(0, 2, 9, "EMAIL"), (1, 4, 11, "EMAIL")])
    record = rendered("ask EMAIL_1 soon", privacy=spans)
    tokenizer = tiny_tokenizer()
    row = render(tokenizer, record)
    assert parts(tokenizer, row)[1] == "ask  soon<|im_end|>"
    assert row.loss_mask[row.prompt_length :].count(False) == len("EMAIL_1")


def test_an_answer_behind_a_prompt_of_no_chat_gets_no_end_token():
    tokenizer = tiny_tokenizer()
    row = render(tokenizer, rendered(" free.", prompt="Bay 4 is"))
    assert tokenizer.decode(row.input_ids) == "Bay 4 is free."
    assert parts(tokenizer, row) == ("Bay 4 is", " free.")


def test_logged_ids_of_a_rendered_prompt_go_to_the_target_if_they_spell_it():
    tokenizer = tiny_tokenizer()
    prompt = "Say <|mask|>"
    spelt = [i for char in prompt for i in tokenizer(char, add_special_tokens=False).input_ids]
    plain = render_request(tokenizer, rendered(None, prompt=prompt))
    assert plain != spelt
    for ids, want in ((spelt, spelt), (spelt[1:], plain), ([9_999], plain), ([-1], plain)):
        record = rendered(None, prompt=prompt, prompt_token_ids=ids)
        assert render_request(tokenizer, record) == want


def test_a_rendered_prompt_begins_with_one_token_of_the_texts_beginning():
    tokenizer = tiny_tokenizer()
    begin = tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    for prompt in ("Bay 4 is", begin + "Bay 4 is"):
        record = rendered(" free.", prompt=prompt)
        assert tokenizer.decode(render_request(tokenizer, record)) == begin + "Bay 4 is"
        row = render(tokenizer, record)
        assert parts(tokenizer, row) == (begin + "Bay 4 is", " free.")


def test_what_cannot_be_put_behind_a_rendered_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    thought = Turn(role="assistant", content="fine", reasoning="hm")
    called = Turn(role="assistant", tool_calls=[{"id": None, "name": "f", "arguments": "{}"}])
    for answer in (thought, called, Turn(role="assistant", content="a<|im_end|>b")):
        record = rendered(None)
        record.messages.append(answer)
        with pytest.raises(UnstableBoundaryError):
            render(tokenizer, record)
    with pytest.raises(UnstableBoundaryError, match="not an empty one"):
        render_request(tokenizer, rendered(None, prompt=""))


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"finish_reason": "stop"}, "fine<|im_end|>"),
        ({"finish_reason": "tool_calls"}, "fine<|im_end|>"),
        ({"finish_reason": "length"}, "fine"),
        ({"finish_reason": None}, "fine"),
        ({"sampling": {"stop": ["\n\n"]}}, "fine"),
        ({"sampling": {"stop": "###"}}, "fine"),
        ({"sampling": {"stop": ["<|im_end|>"]}}, "fine<|im_end|>"),
        ({"sampling": {"stop": []}}, "fine<|im_end|>"),
        ({"sampling": {"stop": [{"a": 1}]}}, "fine"),
    ],
)
def test_an_end_token_is_supervised_only_where_the_target_wrote_one(
    fields: dict[str, Any], want: str
):
    tokenizer = tiny_tokenizer()
    assert parts(tokenizer, render(tokenizer, conversation(**fields)))[1] == want


def test_a_template_without_an_end_token_gets_none():
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert parts(tokenizer, render(tokenizer, conversation()))[1] == "fine"


def test_a_default_system_prompt_is_part_of_the_prompt():
    tokenizer = with_template(WITH_DEFAULT_SYSTEM)
    asked = [Turn(role="user", content="hi"), Turn(role="assistant", content="fine")]
    prompt, answer = parts(tokenizer, render(tokenizer, conversation(messages=asked)))
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi")
    assert answer == "fine<|im_end|>"


def test_a_template_that_trims_answers_takes_those_without_space_around_them():
    tokenizer = with_template(TRIMMED)
    assert parts(tokenizer, render(tokenizer, conversation()))[1] == "fine<|im_end|>"
    for altered in (" fine", "\nfine", "fine\n", "fine ", " "):
        with pytest.raises(UnstableBoundaryError, match="alters the answer"):
            render(tokenizer, conversation(answer=altered))
        assert render(tiny_tokenizer(), conversation(answer=altered)).loss_mask[-1]


def test_a_template_that_rewrites_the_answer_is_refused():
    tokenizer = with_template(TRIMMED.replace("| trim", "| upper"))
    with pytest.raises(UnstableBoundaryError, match="alters the answer"):
        render(tokenizer, conversation())


def test_what_stands_between_answer_and_end_token_belongs_to_the_end_token():
    tokenizer = with_template(CHAT_TEMPLATE.replace("<|im_end|>\n", "\n<|im_end|>\n"))
    assert parts(tokenizer, render(tokenizer, conversation()))[1] == "fine\n<|im_end|>"
    cut = conversation(finish_reason="length")
    assert parts(tokenizer, render(tokenizer, cut))[1] == "fine"


def test_trimming_an_earlier_answer_is_what_the_server_did_too():
    history = [
        Turn(role="user", content="a"), Turn(role="assistant", content=" b "),
        Turn(role="user", content="c"), Turn(role="assistant", content="d"),
    ]  # fmt: skip
    tokenizer = with_template(TRIMMED)
    prompt, answer = parts(tokenizer, render(tokenizer, conversation(messages=history)))
    assert "assistant\nb<|im_end|>" in prompt
    assert answer == "d<|im_end|>"


def thinking_messages(content: str, reasoning: str | None) -> list[Turn]:
    return [
        Turn(role="user", content="2+2?"),
        Turn(role="assistant", content="4", reasoning="old thought"),
        Turn(role="user", content="3+3?"),
        Turn(role="assistant", content=content, reasoning=reasoning),
    ]


@pytest.mark.parametrize(
    ("content", "reasoning"), [("6", "three twice"), ("\n\n6", "\nthree twice\n")]
)
def test_reasoning_of_the_answer_is_supervised_and_that_of_earlier_turns_as_served(
    content: str, reasoning: str
):
    tokenizer = with_template(THINKING)
    record = conversation(messages=thinking_messages(content, reasoning))
    prompt, answer = parts(tokenizer, render(tokenizer, record))
    assert answer == "<think>\nthree twice\n</think>\n\n6<|im_end|>"
    assert prompt.endswith("4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n")
    assert "old thought" not in prompt


def test_an_answer_cut_while_thinking_ends_with_its_last_thought():
    tokenizer = with_template(THINKING)
    record = conversation(messages=thinking_messages("", "three tw\n"), finish_reason="length")
    assert parts(tokenizer, render(tokenizer, record))[1] == "<think>\nthree tw"


def test_thinking_switched_off_stands_in_the_prompt_as_it_was_served():
    tokenizer = with_template(THINKING)
    messages = thinking_messages("6", None)
    record = conversation(messages=messages, sampling={"enable_thinking": False})
    row = render(tokenizer, record)
    prompt, answer = parts(tokenizer, row)
    assert answer == "6<|im_end|>"
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert render_request(tokenizer, record) == row.input_ids[: row.prompt_length]
    assert render_prompt(tokenizer, record.prompt) != row.input_ids[: row.prompt_length]


def test_a_server_that_switches_thinking_off_decides_for_requests_that_say_nothing():
    tokenizer = with_template(THINKING)
    record = conversation(messages=thinking_messages("6", None))
    off = ServingSampling(enable_thinking=False)
    row = render_row(tokenizer, record, stop_token_ids=STOP, serving=off)
    prompt, answer = parts(tokenizer, row)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert answer == "6<|im_end|>"
    assert render_request(tokenizer, record, serving=off) == row.input_ids[: row.prompt_length]
    record.sampling["enable_thinking"] = True
    assert render_row(tokenizer, record, stop_token_ids=STOP, serving=off) == row


def test_reasoning_that_the_template_does_not_print_is_refused():
    record = conversation(messages=thinking_messages("6", "three twice"))
    with pytest.raises(UnstableBoundaryError, match="reasoning"):
        render(tiny_tokenizer(), record)
    with pytest.raises(UnstableBoundaryError, match="prompt differently"):
        render(with_template(FORGETFUL), record)


def tool_messages() -> list[Turn]:
    call = {"id": "call-1", "name": "bay", "arguments": '{"number": 4, "at": "noon"}'}
    return [
        Turn(role="user", content="Is bay 4 free?"),
        Turn(role="assistant", tool_calls=[call]),
        Turn(role="tool", content="free", tool_call_id="call-1"),
        Turn(role="assistant", content="It is."),
    ]


def test_tool_schemas_calls_and_results_are_rendered_and_calls_are_supervised():
    tokenizer = with_template(TOOLS)
    schema = {"type": "function", "function": {"name": "bay", "parameters": {"b": 1, "a": 2}}}
    called = '<tool_call>\n{"name": "bay", "arguments": {"number": 4, "at": "noon"}}\n</tool_call>'
    asks = conversation(messages=tool_messages()[:2], tools=[schema], finish_reason="tool_calls")
    prompt, answer = parts(tokenizer, render(tokenizer, asks))
    assert answer == called + "<|im_end|>"
    assert '"parameters": {"b": 1, "a": 2}' in prompt, "key order is the sender's"
    prompt, answer = parts(tokenizer, render(tokenizer, conversation(messages=tool_messages())))
    assert answer == "It is.<|im_end|>"
    assert called in prompt
    assert "<|im_start|>tool\nfreecall-1<|im_end|>" in prompt
    cut = conversation(messages=tool_messages()[:2], finish_reason="length")
    assert parts(tokenizer, render(tokenizer, cut))[1] == called


def test_arguments_that_are_no_object_are_printed_as_they_stand():
    messages = tool_messages()[:2]
    messages[1].tool_calls = [{"id": None, "name": "bay", "arguments": "{broken"}]
    tokenizer = with_template(TOOLS)
    assert (
        '"arguments": "{broken"'
        in parts(tokenizer, render(tokenizer, conversation(messages=messages)))[1]
    )


def test_a_template_that_leaves_calls_out_is_refused():
    with pytest.raises(UnstableBoundaryError, match="tool calls"):
        render(tiny_tokenizer(), conversation(messages=tool_messages()[:2]))


def test_a_template_that_prints_the_date_is_told_the_day_of_the_request():
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE)
    record = conversation(ts="2026-10-14T23:40:00Z")
    dated = "14 Oct 2026\n<|im_start|>system"
    assert parts(tokenizer, render(tokenizer, record))[0].startswith(dated)
    assert str(tokenizer.decode(render_request(tokenizer, record))).startswith(dated)
    undated = str(tokenizer.decode(render_prompt(tokenizer, record.prompt)))
    assert undated.startswith("01 Jan 2026\n"), "no row depends on the day of its rendering"


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = with_template(
        "{% if messages[-1]['role'] == 'assistant' %}answered {% else %}open {% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(UnstableBoundaryError):
        render(tokenizer, conversation())


def test_a_merge_across_the_boundary_is_refused():
    tokenizer = merging_tokenizer([("Ċ", "Ċ"), ("n", "e")])
    assert parts(tokenizer, render(tokenizer, conversation()))[1] == "fine<|im_end|>"
    with pytest.raises(UnstableBoundaryError, match="boundary"):
        render(tokenizer, conversation(answer="\nfine"))


def test_a_merge_behind_the_answer_does_not_reach_into_a_cut_one():
    tokenizer = merging_tokenizer([("e", "<")])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "</turn>")
    row = render(tokenizer, conversation(finish_reason="length"))
    assert parts(tokenizer, row)[1] == "fine"


def test_an_answer_that_spells_the_stop_token_is_refused():
    with pytest.raises(UnstableBoundaryError, match="stop token"):
        render(tiny_tokenizer(), conversation(answer="write <|im_end|> to end"))


def test_an_answer_without_tokens_is_refused():
    tokenizer = with_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(NoSupervisedTokenError):
        render(tokenizer, conversation(answer=""))
    with pytest.raises(NoSupervisedTokenError):
        render(tiny_tokenizer(), conversation(answer="", finish_reason="length"))
    with pytest.raises(NoSupervisedTokenError):
        render(tiny_tokenizer(), conversation(prompt_token_ids=[7], output_token_ids=[]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{{ messages[-1]['content'] }}",
        "{{ raise_exception('no ' + messages[-1]['content']) }}",
        "{{ messages[-1]['content'] + 1 }}",
    ],
)
def test_errors_do_not_repeat_the_log(template: str):
    with pytest.raises(UnstableBoundaryError) as caught:
        render(with_template(template), conversation(answer="secret"))
    assert "secret" not in str(caught.value)
    assert "brief" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def redacted(answer: str, *placeholders: str, **fields: Any) -> Conversation:
    spans = [(2, answer.index(p), answer.index(p) + len(p), "EMAIL") for p in placeholders]
    return conversation(answer, privacy=Privacy(scrubbed=True, spans=spans), **fields)


def byte_range_mask(tokenizer: Any, row: RenderedRow, record: Conversation) -> list[bool]:
    """Say by bytes alone which tokens lie in the answer and off its spans."""
    pieces = [_token_bytes(tokenizer, token_id) for token_id in row.input_ids]
    whole = b"".join(pieces)
    assert record.answer is not None
    content = record.answer.content or ""
    start = whole.rindex(content.encode())
    spans = [
        (start + len(content[:first].encode()), start + len(content[:end].encode()))
        for index, first, end, _ in record.privacy.spans
        if index == len(record.messages) - 1
    ]
    mask, place = [], 0
    for piece in pieces:
        end = place + len(piece)
        mask.append(place >= start and not any(place < b and end > a for a, b in spans))
        place = end
    return mask


def _token_bytes(tokenizer: Any, token_id: int) -> bytes:
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token in SPECIAL_TOKENS:
        return token.encode()
    to_byte = {char: byte for byte, char in _byte_alphabet().items()}
    return bytes(to_byte[char] for char in token)


def _byte_alphabet() -> dict[int, str]:
    """Give GPT-2's printable stand-in of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def test_tokens_that_touch_a_placeholder_are_not_supervised():
    tokenizer = merging_tokenizer([("Ġ", "E"), ("1", ","), ("y", "Ġ")])
    record = redacted("try EMAIL_1, please", "EMAIL_1")
    row = render(tokenizer, record)
    assert row.loss_mask == byte_range_mask(tokenizer, row, record)
    # " E" and "1," merged over the border of the span, so the space and the comma go with it
    assert parts(tokenizer, row)[1] == "try please<|im_end|>"


def test_masks_agree_with_byte_ranges_for_any_text_and_merges():
    """Random merges of bytes, so that tokens begin and end inside characters and spans."""
    draw = random.Random(0)
    alphabet = "ab \u00e9\u20ac\U0001f600\u4e2d"
    stand_in = _byte_alphabet()
    bytes_used = sorted({stand_in[b] for b in alphabet.encode()})
    for _ in range(40):
        merges = list({(draw.choice(bytes_used), draw.choice(bytes_used)) for _ in range(12)})
        tokenizer = merging_tokenizer(sorted(merges))
        content = "x" + "".join(draw.choices(alphabet, k=24)) + "x"
        start = draw.randrange(1, 20)
        span = (2, start, start + draw.randrange(1, 5), "NAME")
        record = conversation(content, privacy=Privacy(scrubbed=True, spans=[span]))
        row = render(tokenizer, record)
        want = byte_range_mask(tokenizer, row, record)
        assert row.loss_mask[: row.prompt_length] == want[: row.prompt_length]
        wrongly_kept = [
            place
            for place, (kept, may) in enumerate(zip(row.loss_mask, want, strict=True))
            if kept and not may
        ]
        assert wrongly_kept == []
        num_lost = sum(want) - sum(row.loss_mask)
        assert num_lost <= 4, "at most the other bytes of the characters at both borders"


@pytest.mark.parametrize(
    ("offsets", "span", "want"),
    [
        ([(0, 3), (4, 8), (8, 9)], (3, 4), [1]),  # the space before a word is left out of its token
        ([(0, 3), (4, 8), (8, 9)], (4, 8), [1]),
        ([(0, 1), (0, 1), (1, 2)], (0, 1), [0, 1]),  # both pieces of a character claim it
        ([(0, 1), (1, 1), (1, 2)], (0, 1), [0, 1]),  # the second piece claims nothing
        ([(0, 1), (1, 1), (1, 2)], (1, 2), [1, 2]),
        ([(0, 2), (2, 4), (4, 6)], (3, 5), [1, 2]),
    ],
)
def test_offsets_with_gaps_or_without_width_touch_what_they_may_hold(
    offsets: list[tuple[int, int]], span: tuple[int, int], want: list[int]
):
    assert _touched_by_offsets(offsets, *span) == want


def test_a_tokenizer_without_offsets_masks_the_same_tokens():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = redacted("\u20ac to EMAIL_1 or \u00c9MILE_2!", "EMAIL_1", "\u00c9MILE_2")
    row = render_row(tokenizer, record, stop_token_ids=frozenset({1}))
    assert parts(tokenizer, row)[1] == "\u20ac to  or !</s>"
    masked = sum(not kept for kept in row.loss_mask[row.prompt_length :])
    assert masked == len("EMAIL_1") + len("\u00c9MILE_2".encode())


def test_placeholders_outside_the_answer_mask_nothing():
    record = conversation(privacy=Privacy(scrubbed=True, spans=[(1, 0, 3, "NAME")]))
    tokenizer = tiny_tokenizer()
    assert render(tokenizer, record) == render(tokenizer, conversation())


def test_an_answer_that_is_one_placeholder_teaches_nothing():
    record = redacted("EMAIL_1", "EMAIL_1", finish_reason="length")
    with pytest.raises(NoSupervisedTokenError):
        render(tiny_tokenizer(), record)


def test_a_placeholder_at_the_start_belongs_to_the_prompt():
    tokenizer = tiny_tokenizer()
    prompt, answer = parts(tokenizer, render(tokenizer, redacted("NAME_1 can", "NAME_1")))
    assert prompt.endswith("assistant\nNAME_1")
    assert answer == " can<|im_end|>"


def test_no_block_starts_inside_a_placeholder_or_reaches_past_one():
    row = render(tiny_tokenizer(), redacted("ask EMAIL_1 today", "EMAIL_1"))
    loss_mask = torch.tensor(row.loss_mask)
    hole = [p for p, kept in enumerate(row.loss_mask) if not kept and p > row.prompt_length]
    assert len(hole) == len("EMAIL_1")
    anchors = select_anchors(loss_mask, 1000, generator=torch.Generator().manual_seed(0))
    supervised = loss_mask.nonzero().squeeze(1).tolist()
    assert anchors.tolist() == [p for p in supervised if p + 1 in supervised]
    for first_slot in (0, 1):
        mask_AK = label_mask(loss_mask, anchors, 16, first_slot=first_slot)
        for anchor, mask_K in zip(anchors.tolist(), mask_AK.tolist(), strict=True):
            reached = [anchor + k + 1 - first_slot for k, kept in enumerate(mask_K) if kept]
            end = hole[0] if anchor < hole[0] else len(loss_mask)
            assert reached == [*range(anchor + 1, min(end, anchor + 17 - first_slot))]
