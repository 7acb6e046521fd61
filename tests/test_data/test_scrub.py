import base64
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_data.detectors import find_private
from dflash_data.drops import DropReason
from dflash_data.pseudonyms import Pseudonyms
from dflash_data.scrub import Placeholders, scrub, scrub_text
from dflash_train.records.conversation import Conversation, Turn

PSEUDONYMS = Pseudonyms(b"a key of the tests, 32 bytes long")


def letters(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Keys are made at run time, so that no scanner takes this file for a leak."""
    return "".join(random.Random(f"{length}{alphabet}").choices(alphabet, k=length))


def jwt() -> str:
    parts = [b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"1234567890"}', letters(32).encode()]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def pem() -> str:
    return f"-----BEGIN RSA {'PRIVATE'} KEY-----\n{letters(64)}\n-----END RSA {'PRIVATE'} KEY-----"


PRIVATE = [
    ("EMAIL", "ana.maria+shop@mail.example.org"),
    ("PHONE", "+49 30 901820"),
    ("PHONE", "+1 202-555-0143"),
    ("PHONE", "(202) 555-0143"),
    ("PHONE", "415-555-2671"),
    ("IPV4", "192.0.2.17"),
    ("IPV6", "2001:db8::8a2e:370:7334"),
    ("IPV6", "fe80::1"),
    ("IBAN", "DE89 3704 0044 0532 0130 00"),
    ("IBAN", "GB82WEST12345698765432"),
    ("CARD", "4111 1111 1111 1111"),
    ("CARD", "378282246310005"),
    ("SSN", "219-09-9999"),
    ("JWT", jwt()),
    ("AWS_KEY", "AKIA" + letters(16, string.ascii_uppercase + string.digits)),
    ("GCP_KEY", "AIza" + letters(35)),
    ("GITHUB_KEY", "ghp_" + letters(36)),
    ("OPENAI_KEY", "sk-proj-" + letters(40)),
    ("HF_KEY", "hf_" + letters(34)),
    ("PEM", pem()),
    ("URL_CREDENTIALS", "admin:hunter2"),
    ("HIGH_ENTROPY", letters(40)),
    ("HIGH_ENTROPY", letters(40, "0123456789abcdef")),
]
SENTENCES = ("Please use {} for this.", "{}", "value={}, and {} again.", '{{"field": "{}"}}')


def in_sentence(kind: str, value: str, sentence: str) -> str:
    shown = f"https://{value}@db.internal/x" if kind == "URL_CREDENTIALS" else value
    return sentence.format(shown, shown)


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize(("kind", "value"), PRIVATE)
def test_private_value_becomes_its_typed_placeholder(kind: str, value: str, sentence: str):
    scrubbed, spans = scrub_text(in_sentence(kind, value, sentence), Placeholders())
    assert value not in scrubbed
    assert scrubbed == in_sentence(kind, f"{kind}_1", sentence)
    assert {scrubbed[start:end] for start, end, _ in spans} == {f"{kind}_1"}
    assert {span_kind for _, _, span_kind in spans} == {kind}


@pytest.mark.parametrize(
    "text",
    [
        "torch 2.13.0 and firmware 5.3.30.1, version 10.0.19.4, v1.2.3.4",
        "order ORD-2026-05439, parcel P62-411, invoice 4100-2231-9981",
        "card-like but wrong: 4111 1111 1111 1112, 1234567890123456",
        "IBAN-like but wrong: DE89 3704 0044 0532 0130 01",
        "000-12-3456 and 912-34-5678 are no social security numbers",
        "at 12:30:45 on 2026-10-14, 2026-10-14T08:40:00Z, MAC 00:1a:2b:3c:4d:5e",
        "values[::2], std::vector, localhost 127.0.0.1 and 0.0.0.0, octets 300.1.2.3",
        "@property, a @ b, user@host, f(x)@g",
        "148 + 26 * 11 = 434, 1250 1300 1400, 3 +4567890 dollars, 1,000,000 coins",
        "id 123e4567-e89b-12d3-a456-426614174000",
        "getHttpResponseCodeFromServerFactory2 and test_that_this_name_is_long_but_readable_1",
        "/usr/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py",
        "the phone shop sold 12 phones for 340 dollars",
        "https://docs.python.org/3/library/urllib.parse.html#module-urllib.parse",
        "----------------------------------------------------------------------",
    ],
)
def test_look_alike_stays(text: str):
    assert [
        (finding.kind, text[finding.start : finding.end]) for finding in find_private(text)
    ] == []


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
    scrub([other, second, first], PSEUDONYMS)
    assert first.messages[0].content == "I am EMAIL_1"
    assert second.messages[0].content == "EMAIL_2 or EMAIL_1?"
    assert other.messages[0].content == "I am EMAIL_1"


def test_spans_point_at_the_placeholders_of_each_message():
    call = record("Mail a@example.org from 192.0.2.1", "Wrote to a@example.org.")
    scrub([call], PSEUDONYMS)
    shown = [
        (index, kind, (call.messages[index].content or "")[start:end])
        for index, start, end, kind in call.privacy.spans
    ]
    assert shown == [(0, "EMAIL", "EMAIL_1"), (0, "IPV4", "IPV4_1"), (1, "EMAIL", "EMAIL_1")]
    assert call.privacy.redactions == {"EMAIL": 2, "IPV4": 1}
    assert call.privacy.scrubbed


def test_secret_in_an_answer_drops_the_record_but_in_a_prompt_only_hides_it():
    key = "hf_" + letters(34)
    sifted = scrub([record(f"My key is {key}", "Keep it."), record("Key?", key)], PSEUDONYMS)
    assert [call.messages[0].content for call in sifted.kept] == ["My key is HF_KEY_1"]
    assert sifted.dropped == {DropReason.secret_in_answer: 1}
    assert sifted.facts["HF_KEY/user"] == sifted.facts["HF_KEY/answer"] == 1


def test_every_part_of_a_record_is_scrubbed():
    mail = "a@example.org"
    call = record("Ask", "x", "y")
    call.messages[1] = Turn(
        role="assistant", content=None, reasoning=f"to {mail}",
        tool_calls=[{"id": "1", "name": "send", "arguments": f'{{"to":"{mail}"}}'}],
    )  # fmt: skip
    call.messages[2].name = mail
    call.tools = [{"function": {"description": f"mails {mail}", mail: 1}}]
    call.sampling = {"stop": [mail]}
    call.prompt_token_ids, call.output_token_ids = [1], [2]
    scrub([call], PSEUDONYMS)
    assert mail.encode() not in call.to_json()
    assert call.privacy.redactions == {"EMAIL": 6}
    assert call.prompt_token_ids is call.output_token_ids is None


def test_provider_ids_become_keyed_hashes():
    first, second = record("a"), record("b", session="t")
    other = record("a")
    scrub([first, second], PSEUDONYMS)
    scrub([other], Pseudonyms(b"another key, just as long as that"))
    assert first.tenant == second.tenant != other.tenant
    assert first.session != second.session
    for value in (first.tenant, first.session, first.source_ref):
        assert value is not None
        assert value.startswith("h:")
    assert "key of the tests" not in repr(PSEUDONYMS)


PIECES = st.sampled_from([value for _, value in PRIVATE]) | st.text(max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=6), st.sampled_from([" ", ", ", "\n", ""]))
def test_spans_always_hold_placeholders_and_the_rest_is_untouched(pieces: list[str], gap: str):
    text = gap.join(pieces)
    scrubbed, spans = scrub_text(text, Placeholders())
    findings = find_private(text)
    assert len(spans) == len(findings)
    kept = kept_before = 0
    for (start, end, kind), finding in zip(spans, findings, strict=True):
        assert scrubbed[start:end].startswith(f"{kind}_")
        assert scrubbed[kept:start] == text[kept_before : finding.start]
        kept, kept_before = end, finding.end
    assert scrubbed[kept:] == text[kept_before:]
