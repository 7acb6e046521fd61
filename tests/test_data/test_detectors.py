import random
import subprocess
import sys

import pytest

from dflash_data.privacy.detectors import KINDS, SECRETS, find_private
from tests.test_data.privacy_corpus import Score, make_corpus, score
from tests.test_data.privacy_plants import ALNUM, LOCALES, MAKES, text_of

ALWAYS_CAUGHT = SECRETS - {"HIGH_ENTROPY"} | {"CARD", "IBAN"}


@pytest.fixture(scope="module")
def total() -> Score:
    return score(make_corpus(1600, seed=20261122))


def test_the_corpus_has_every_kind_of_at_least_fourteen_and_eight_locales(total: Score):
    assert set(total.planted) == set(KINDS) == set(MAKES)
    assert len(KINDS) >= 14
    assert len(LOCALES) == 8


def test_keys_cards_and_ibans_are_always_caught(total: Score):
    assert {kind: total.recall(kind) for kind in ALWAYS_CAUGHT} == dict.fromkeys(ALWAYS_CAUGHT, 1.0)


def test_other_kinds_are_caught_and_look_alikes_stay(total: Score):
    for kind in KINDS:
        assert total.recall(kind) >= 0.99, (kind, total.missed)
        assert total.precision(kind) >= 0.97, (kind, total.wrong)
    assert total.right.total() / total.found.total() >= 0.98


def test_a_corpus_is_a_function_of_its_seed():
    first, again, other = (list(make_corpus(40, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def kinds_in(text: str) -> list[tuple[str, str]]:
    return [(finding.kind, text[finding.start : finding.end]) for finding in find_private(text)]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("card 4111 1111 1111 1111 12/27 for Ana", "CARD", "4111 1111 1111 1111"),
        ("4111-1111-1111-\n1111 is mine", "CARD", "4111-1111-1111-\n1111"),
        ("4111\u00a01111\u00a01111\u00a01111", "CARD", "4111\u00a01111\u00a01111\u00a01111"),
        ("\uff14111111111111111", "CARD", "\uff14111111111111111"),
        ('"line one\\n4111111111111111"', "CARD", "4111111111111111"),
        ("Maestro 6304 0000 0000", "CARD", "6304 0000 0000"),
        ("DE89 3704 0044 0532 0130 00 Ana", "IBAN", "DE89 3704 0044 0532 0130 00"),
        ("iban de89370400440532013000.", "IBAN", "de89370400440532013000"),
        ('{"a": "one\\nana@example.org"}', "EMAIL", "ana@example.org"),
        ("?email=ana%40example.org&x=1", "EMAIL", "ana%40example.org"),
        ("'o.brien@example.ie'", "EMAIL", "o.brien@example.ie"),
        ("\u30e1\u30fc\u30eb\u306ftaro@example.jp\u3067\u3059", "EMAIL", "taro@example.jp"),
        ("redis://:pass1@host", "URL_CREDENTIALS", ":pass1"),
        ("https:\\/\\/ana:p@ss@host\\/x", "URL_CREDENTIALS", "ana:p@ss"),
        ("phone: 4155552671", "PHONE", "4155552671"),
        ("Call +1 415 555 2671 x12 now", "PHONE", "+1 415 555 2671 x12"),
        ("my order is late, call me: 4155552671", "PHONE", "4155552671"),
        ("social security number 219 09 9999", "SSN", "219 09 9999"),
        ("down: 2001:db8::1: no route", "IPV6", "2001:db8::1"),
        ("http://192.0.2.17:80/x", "IPV4", "192.0.2.17"),
        ("api_key=" + "0123456789abcdef" * 2, "HIGH_ENTROPY", "0123456789abcdef" * 2),
    ],
)
def test_a_value_is_found_whole_and_alone(text: str, kind: str, value: str):
    assert kinds_in(text) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "torch 2.13.0 and firmware 5.3.30.1, version 10.0.19.4, v1.2.3.4, pkg==1.2.3.4",
        "Chrome/120.0.99.71 and tool-1.2.3.4.tar.gz, netmask 255.255.255.0",
        "order ORD-2026-05439, parcel P62-411, invoice 4100-2231-9981",
        "please phone about order 4155552671",
        "item no. 044-6908363, article 0412-3345-12",
        "card-like but wrong: 4111 1111 1111 1112, 1234567890123456",
        "IBAN-like but wrong: DE89 3704 0044 0532 0130 01",
        "000-12-3456 and 912-34-5678 are no social security numbers",
        "at 12:30:45 on 2026-10-14, 2026-10-14T08:40:00Z, MAC 00:1a:2b:3c:4d:5e",
        "values[::2], x[100::200], std::vector, dead::beef, localhost 127.0.0.1 and 0.0.0.0",
        "@property, a @ b, user@host, f(x)@g, icon@2x.png, git@github.com:a/b.git",
        "148 + 26 * 11 = 434, 1250 1300 1400, 3 +4567890 dollars, 1,000,000 coins",
        "id 123e4567-e89b-12d3-a456-426614174000, req-e0663d4d-0508-4999-9129-b115d2711b81",
        "commit 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b of sha256:" + "0a1b2c3d" * 8,
        "getHttpResponseCodeFromServerFactory2 and test_that_this_name_is_long_but_readable_1",
        "/usr/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py",
        "https://docs.python.org/3/library/urllib.parse.html#module-urllib.parse",
        "sk-circle-fade-dot-animation, ISBN 0306406152, (1988) 1617-1622, +48.856614",
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4",
        "----------------------------------------------------------------------",
    ],
)
def test_look_alike_stays(text: str):
    assert kinds_in(text) == []


def test_a_block_without_an_end_takes_its_base64_and_not_the_prose_behind_it():

    body = text_of(random.Random(1), ALNUM, 64)
    text = f"key:\n-----BEGIN {'PRIVATE'} KEY-----\n{body}\n\nThat is all of it."
    ((kind, value),) = kinds_in(text)
    assert kind == "PEM"
    assert body in value
    assert "That" not in value


def test_findings_are_in_order_and_never_overlap():
    for sample in make_corpus(64, seed=3):
        text = f"{sample.text} {sample.text}\n{sample.text}"
        findings = find_private(text)
        ends = [0, *(finding.end for finding in findings)]
        assert all(end <= f.start < f.end for end, f in zip(ends, findings, strict=False))


HOSTILE = (
    "1", "a", "@", "a@", "a@b.", "eyJ", "-eyJ", ".eyJaaaaaaaa", "sk-", "-sk-a", "-----BEGIN A-----",
    "1 ", "1.", "4111 ", "1 1\\n", "+1", "(1", "01 ", "a://a:", "DE11 1111 ", "::", "abcd:", "Ab3",
    "call 1 ", "\\\\n", "\\u65e5",
)  # fmt: skip


def test_hostile_text_takes_no_more_than_linear_time():
    """Quadratic work on 300,000 characters would take hours; linear work takes seconds."""
    code = f"""
from dflash_data.privacy.detectors import find_private
for piece in {HOSTILE!r}:
    find_private((piece * 300_000)[:300_000])
    find_private((piece * 300_000)[:300_000] + "@")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)
