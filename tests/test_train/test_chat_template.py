import pytest

from dflash_train.records.chat_template import (
    NoSupervisedTokenError,
    UnstableBoundaryError,
    render_prompt,
    render_row,
)
from dflash_train.records.conversation import Conversation, Turn
from dflash_train.testing import STOP_TOKEN_ID, tiny_tokenizer

STOP = frozenset({STOP_TOKEN_ID})


def conversation(answer: str | None = "fine", **fields) -> Conversation:
    messages = [Turn(role="system", content="be brief"), Turn(role="user", content="how are you?")]
    if answer is not None:
        messages.append(Turn(role="assistant", content=answer))
    return Conversation(id="c", source="test", messages=messages, **fields)


def test_a_row_is_the_prompt_then_the_answer_with_its_stop_token():
    tokenizer = tiny_tokenizer()
    row = render_row(tokenizer, conversation(), stop_token_ids=STOP)
    prompt = render_prompt(tokenizer, conversation().prompt)
    assert row.input_ids[: len(prompt)] == prompt
    assert row.loss_mask == [False] * len(prompt) + [True] * (len(row.input_ids) - len(prompt))
    answer = row.input_ids[len(prompt) :]
    assert tokenizer.decode(answer) == "fine<|im_end|>"
    assert answer[-1] == STOP_TOKEN_ID, "what the template prints after it is cut"


def test_logged_token_ids_rule_over_the_text():
    logged = conversation(prompt_token_ids=[7, 8, 9], output_token_ids=[10, 2])
    row = render_row(tiny_tokenizer(), logged, stop_token_ids=STOP)
    assert row.input_ids == [7, 8, 9, 10, 2]
    assert row.loss_mask == [False, False, False, True, True]


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[-1]['role'] == 'assistant' %}answered {% else %}open {% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(UnstableBoundaryError):
        render_row(tokenizer, conversation(), stop_token_ids=STOP)


def test_an_answer_without_tokens_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(NoSupervisedTokenError):
        render_row(tokenizer, conversation(answer=""), stop_token_ids=STOP)


def test_errors_do_not_repeat_the_log():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(UnstableBoundaryError) as caught:
        render_row(tokenizer, conversation(answer="secret"), stop_token_ids=STOP)
    assert "secret" not in str(caught.value)
    assert "brief" not in str(caught.value)
