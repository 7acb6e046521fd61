import hmac
import pickle

import pytest

from dflash_data.privacy.pseudonyms import MarkedText, Pseudonyms
from dflash_data.privacy.scrub import scrub_call
from dflash_data.privacy.text_cache import ENTRY_CHARACTERS, TextCache
from dflash_train.records.conversation import Conversation, Turn

KEY = b"a key of the tests, 32 bytes long"


def test_marks_depend_on_key_kind_and_value_alone():
    first, other_key = Pseudonyms(KEY), Pseudonyms(KEY[::-1])
    mark = first.mark("EMAIL", "a@example.org")
    assert len(mark) == 16
    assert int(mark, 16) >= 0
    assert mark == Pseudonyms(KEY).mark("EMAIL", "a@example.org")
    others = [
        first.mark("EMAIL", "b@example.org"),
        first.mark("PHONE", "a@example.org"),
        other_key.mark("EMAIL", "a@example.org"),
        first.hide("mark", "EMAIL", "a@example.org").removeprefix("h:"),
    ]
    assert mark not in others[:3]
    assert len(set(others)) == 4


@pytest.mark.parametrize("length", [16, 64, 65, 200])
def test_a_mark_is_the_standard_hmac_whatever_the_length_of_the_key(length: int):
    key = bytes(range(length))
    want = hmac.digest(key, "mark\x1fEMAIL\x1f\u00e9".encode(), "sha256").hex()[:16]
    assert Pseudonyms(key).mark("EMAIL", "\u00e9") == want


def test_a_pickled_copy_keeps_the_key_and_none_of_the_texts():
    pseudonyms = Pseudonyms(KEY)
    call = Conversation(
        id="1", source="openai", messages=[Turn(role="user", content="I am ana@example.org")]
    )
    scrub_call(call, pseudonyms)
    assert pseudonyms.marked.num_characters > 0
    pickled = pickle.dumps(pseudonyms)
    assert b"ana@" not in pickled
    copy = pickle.loads(pickled)
    assert copy.marked.num_characters == 0
    assert copy.mark("EMAIL", "x") == pseudonyms.mark("EMAIL", "x")


def test_the_cache_forgets_the_longest_unused_text_and_never_holds_more_than_its_bound():
    cache: TextCache[MarkedText] = TextCache(3 * (ENTRY_CHARACTERS + 10))
    for letter in "abc":
        cache.put("", letter * 10, MarkedText(letter, ()))
    assert cache.get("", "a" * 10) == MarkedText("a", ())
    cache.put("", "d" * 10, MarkedText("d", ()))
    assert cache.get("", "b" * 10) is None
    assert cache.get("", "a" * 10) is not None
    assert cache.get("other use", "a" * 10) is None
    cache.put("", "e" * 5000, MarkedText("e", ()))
    assert cache.num_characters <= cache.max_characters
