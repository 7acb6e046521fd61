import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_data.privacy import marks
from dflash_data.privacy.detectors import Finding, find_private
from dflash_data.privacy.detectors.detector import Family
from dflash_data.privacy.pseudonyms import Pseudonyms
from dflash_data.privacy.scrub import (
    has_secret_in_answer,
    name_placeholders,
    rescrub_answer,
    scrub_call,
)
from dflash_train.records.conversation import Conversation, Turn
from tests.test_data.privacy_corpus import Sample, make_corpus
from tests.test_data.privacy_plants import MAKES, make_plant, seeded_fakes

PSEUDONYMS = Pseudonyms(b"a key of the tests, 32 bytes long")
KEY = make_plant("HF_KEY", random.Random(0), seeded_fakes(0))
MAIL = "a@example.org"


def scrubbed(*records: Conversation) -> Counter[str]:
    """Scrub the records of one session and give the counts of the last."""
    by_role: Counter[str] = Counter()
    for each in records:
        by_role = scrub_call(each, PSEUDONYMS)
    name_placeholders(list(records))
    return by_role


def record(*contents: str | None, session: str = "s", turn_id: str = "1") -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    turns = [
        Turn(role=role, content=content) for role, content in zip(roles, contents, strict=False)
    ]
    return Conversation(
        id=f"sha256:{turn_id}", source="openai", messages=turns, session=session, tenant="acme",
        ts=f"2026-10-14T08:40:0{turn_id}Z", source_ref="req",
    )  # fmt: skip


def test_same_value_keeps_its_placeholder_within_a_session_and_only_there():
    first = record("I am a@example.org", turn_id="1")
    second = record("b@example.org or a@example.org?", turn_id="2")
    other = record("I am b@example.org", session="t", turn_id="3")
    scrubbed(first, second)
    scrubbed(other)
    assert first.messages[0].content == "I am EMAIL_1"
    assert second.messages[0].content == "EMAIL_2 or EMAIL_1?"
    assert other.messages[0].content == "I am EMAIL_1"


def test_spans_point_at_the_placeholders_of_each_message():
    call = record("Mail a@example.org from 192.0.2.1", "Wrote to a@example.org.")
    scrubbed(call)
    shown = [
        (index, kind, (call.messages[index].content or "")[start:end])
        for index, start, end, kind in call.privacy.spans
    ]
    assert shown == [(0, "EMAIL", "EMAIL_1"), (0, "IPV4", "IPV4_1"), (1, "EMAIL", "EMAIL_1")]
    assert call.privacy.redactions == {"EMAIL": 2, "IPV4": 1}
    assert call.privacy.scrubbed


def test_a_secret_counts_by_where_it_stands():
    prompt, answer, history = record(KEY, "Keep it."), record("Key?", KEY), record("x", KEY, "y")
    by_roles = [scrubbed(call) for call in (prompt, answer, history)]
    assert by_roles == [{"HF_KEY/user": 1}, {"HF_KEY/answer": 1}, {"HF_KEY/assistant": 1}]
    assert [has_secret_in_answer(by_role) for by_role in by_roles] == [False, True, False]
    assert not has_secret_in_answer(scrubbed(record("Mail?", MAIL)))
    assert prompt.messages[0].content == "HF_KEY_1"


def test_every_part_of_a_record_is_scrubbed():
    call = record("Ask", "x", "y")
    call.messages[1] = Turn(
        role="assistant", content=None, reasoning=f"to {MAIL}",
        tool_calls=[{"id": MAIL, "name": "send", "arguments": f'{{"to":"{MAIL}"}}'}],
    )  # fmt: skip
    call.messages[2] = Turn(role="tool", content="sent", name=MAIL, tool_call_id=MAIL)
    call.tools = [{"function": {"description": f"mails {MAIL}", MAIL: 1}}]
    call.sampling = {"stop": [MAIL], "temperature": 0.5}
    call.prompt_token_ids, call.output_token_ids = [1], [2]
    scrubbed(call)
    assert MAIL.encode() not in call.to_json()
    assert call.privacy.redactions == {"EMAIL": 8}
    assert call.prompt_token_ids is call.output_token_ids is None
    assert call.messages[1].tool_calls is not None
    assert call.messages[1].tool_calls[0]["id"] == call.messages[2].tool_call_id == "EMAIL_1"
    assert call.sampling == {"stop": ["EMAIL_1"], "temperature": 0.5}


def test_provider_ids_become_keyed_hashes():
    first, second = record("a"), record("b", session="t")
    other = record("a")
    scrubbed(first, second)
    scrub_call(other, Pseudonyms(b"another key, just as long as that"))
    assert first.tenant == second.tenant != other.tenant
    assert first.session != second.session
    for value in (first.tenant, first.session, first.source_ref):
        assert value is not None
        assert value.startswith("h:")
    assert "key of the tests" not in repr(PSEUDONYMS)


ARGUMENTS = [
    ('{"card": 4111111111111111, "note":"x"}', '{"card": "CARD_1", "note":"x"}'),
    ('{"phone":4155552671,"n":4155552671}', '{"phone":"PHONE_1","n":4155552671}'),
    ('["one\\na@example.org", 1.50]', '["one\\nEMAIL_1", 1.50]'),
    ('{"a@example.org" : {"x": "\\ud83d a@example.org"}}',
     '{"EMAIL_1" : {"x": "\\ud83d EMAIL_1"}}'),
    ('{"u":"https:\\/\\/ana:pw1@h\\/x"}', '{"u":"https://URL_CREDENTIALS_1@h/x"}'),
    ('{"clean" : "\\u00e9\\/", "big": 1e400}', '{"clean" : "\\u00e9\\/", "big": 1e400}'),
    ("to=a@example.org {", "to=EMAIL_1 {"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), ARGUMENTS)
def test_tool_arguments_keep_their_form_and_still_parse(before: str, after: str):
    call = record("Ask", None)
    call.messages[1].tool_calls = [{"id": "1", "function": {"name": "f", "arguments": before}}]
    scrubbed(call)
    assert call.messages[1].tool_calls == [
        {"id": "1", "function": {"name": "f", "arguments": after}}
    ]


def test_the_random_id_of_a_tool_call_is_no_secret():
    call = record("Ask", None)
    call_id = "call_" + make_plant("HIGH_ENTROPY", random.Random(5), seeded_fakes(5))[:24]
    call.messages[1].tool_calls = [{"id": call_id, "name": "f", "arguments": "{}"}]
    assert not scrubbed(call)


def test_an_answer_altered_outside_its_content_is_off_policy():
    masked, edited, history = record("Ask", MAIL), record("Ask", "Yes"), record("Ask", "x", "y")
    edited.messages[1].reasoning = f"They are {MAIL}"
    history.messages = [*edited.messages[:1], Turn(role="assistant", reasoning=MAIL), Turn(
        role="user", content="And?"), Turn(role="assistant", content="No")]  # fmt: skip
    for call in (masked, edited, history):
        call.on_policy, call.on_policy_reason = True, "match"
        scrubbed(call)
    assert masked.on_policy
    assert history.on_policy
    assert (edited.on_policy, edited.on_policy_reason) == (False, "edited")


def test_a_history_that_every_call_repeats_is_searched_once(monkeypatch: pytest.MonkeyPatch):
    searched: list[str] = []

    def find(text: str, *, families: tuple[Family, ...]) -> list[Finding]:
        searched.append(text)
        return find_private(text, families=families)

    monkeypatch.setattr(marks, "find_private", find)
    tools = [{"function": {"name": "f", "description": "Sends mail"}}]
    turns = ["I am a@example.org", "Hello", "Bye", "Good bye", "What?", "Nothing"]
    calls = [record(*turns[:length], turn_id=str(length)) for length in (2, 4, 6)]
    pseudonyms = Pseudonyms(b"another key, just as long as that")
    for call in calls:
        call.tools = tools
        scrub_call(call, pseudonyms)
    assert Counter(text for text in searched if text in turns) == Counter(turns)
    assert len(searched) == len(set(searched))


def test_records_may_share_their_messages():
    first = record("I am a@example.org", "Hello a@example.org")
    scrub_call(first, PSEUDONYMS)
    second = record("x", turn_id="2")
    second.messages = [*first.messages, Turn(role="user", content="Bye")]
    second.privacy.scrubbed = True
    name_placeholders([first, second])
    assert first.privacy.spans == second.privacy.spans == [(0, 5, 12, "EMAIL"), (1, 6, 13, "EMAIL")]
    assert first.messages == second.messages[:2]
    assert second.messages[1].content == "Hello EMAIL_1"


def test_one_value_has_one_placeholder_however_it_is_written():
    call = record("4111 1111 1111 1111 or 4111-1111-1111-1111, A@example.org or a@example.org")
    scrubbed(call)
    assert call.messages[0].content == "CARD_1 or CARD_1, EMAIL_1 or EMAIL_1"


def test_a_fresh_answer_goes_on_where_the_placeholders_of_its_record_end():
    call = record("I am a@example.org, not b@example.org", "old c@example.org")
    scrubbed(call)
    call.messages[1] = Turn(role="assistant", content="EMAIL_1, write to d@example.org \ue000!")
    call.prompt_token_ids, call.output_token_ids = [1], [2]
    by_role = rescrub_answer(call, PSEUDONYMS)
    assert by_role == {"EMAIL/answer": 1}
    assert call.messages[1].content == "EMAIL_1, write to EMAIL_3 \ue000!"
    assert call.privacy.spans == [(0, 5, 12, "EMAIL"), (0, 18, 25, "EMAIL"), (1, 18, 25, "EMAIL")]
    assert call.output_token_ids is None


def test_a_clean_fresh_answer_keeps_its_ids_and_a_secret_one_is_reported():
    call = record("I am a@example.org", "Hello")
    scrubbed(call)
    call.prompt_token_ids, call.output_token_ids = [1], [2]
    assert not rescrub_answer(call, PSEUDONYMS)
    assert call.output_token_ids == [2]
    call.messages[1].content = f"It is {KEY}"
    by_role = rescrub_answer(call, PSEUDONYMS)
    assert has_secret_in_answer(by_role)
    assert KEY not in call.to_json().decode()


def test_no_planted_value_is_left_in_any_written_byte_except_those_that_are_missed():
    samples = [sample for sample in make_corpus(960, seed=77) if sample.is_private]
    samples += [missed_by_design(value) for value in ("ana at example dot org", "4155552671")]
    calls = [with_sample(sample, place) for place, sample in enumerate(samples)]
    scrubbed(*calls)
    written = b"\n".join(call.to_json() for call in calls)
    left = {sample.value for sample in samples if any(f in written for f in forms(sample.value))}
    missed = {sample.value for sample in samples if not is_covered(sample)}
    assert left == missed
    assert len(missed) <= 5
    assert {"ana at example dot org", "4155552671"} <= missed


def missed_by_design(value: str) -> Sample:
    return Sample(f"see {value}", 4, 4 + len(value), "none", is_private=True)


def is_covered(sample: Sample) -> bool:
    return any(f.start <= sample.start and f.end >= sample.end for f in find_private(sample.text))


def forms(value: str) -> list[bytes]:
    """Give a value as it is and as JSON text holds it, once and twice."""
    once = json.dumps(value, ensure_ascii=False)[1:-1]
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    ascii_only = json.dumps(value)[1:-1]
    return [text.encode() for text in (value, once, twice, ascii_only)]


def with_sample(sample: Sample, place: int) -> Conversation:
    """Put a text into one of the parts of a call."""
    call = record("Ask", "Yes", "And?", "No", turn_id=str(place))
    turn = call.messages[place // 2 % 4]
    match place % 6:
        case 0 | 1:
            turn.content = sample.text
        case 2:
            turn.reasoning = sample.text
        case 3:
            turn.tool_calls = [{"name": "f", "arguments": json.dumps({"x": [sample.text]})}]
        case 4:
            call.tools = [{"function": {"description": sample.text}}]
        case _:
            call.messages[2] = Turn(role="tool", content=sample.text, tool_call_id="1")
    return call


def own_values() -> list[str]:
    dice, fakes = random.Random(1), seeded_fakes(1)
    return [make_plant(kind, dice, fakes) for kind in MAKES]


PIECES = st.sampled_from(own_values()) | st.text(max_size=12) | st.sampled_from(
    ["\ue000", "\ue001", "\ue000EMAIL:0123456789abcdef\ue001", "EMAIL_1", "\\n", '"']
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=6), st.sampled_from([" ", ", ", "\n", ""]))
def test_text_without_its_spans_is_the_original_without_its_values(pieces: list[str], gap: str):
    text = gap.join(pieces)
    call = record("Hello", "x", text)
    scrubbed(call)
    after = call.messages[2].content or ""
    findings = find_private(text)
    assert [kind for _, _, _, kind in call.privacy.spans] == [f.kind for f in findings]
    named = [(start, end) for _, start, end, _ in call.privacy.spans]
    assert without(after, named) == without(text, [(f.start, f.end) for f in findings])
    for (start, end), finding in zip(named, findings, strict=True):
        assert after[start:end].rpartition("_")[0] == finding.kind


def without(text: str, spans: list[tuple[int, int]]) -> str:
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return "".join(text[end:start] for end, start in zip(ends, starts, strict=True))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PIECES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PIECES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON_VALUES, st.booleans())
def test_arguments_that_parsed_parse_after_scrubbing(value: object, ensure_ascii: bool):
    call = record("Ask", None)
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    call.messages[1].tool_calls = [{"name": "f", "arguments": text}]
    by_role = scrubbed(call)
    arguments = call.messages[1].tool_calls[0]["arguments"]
    after = json.loads(arguments)
    call.to_json()
    assert by_role or after == value
