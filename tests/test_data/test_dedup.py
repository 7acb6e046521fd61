import itertools
import random
import re

import numpy as np

from dflash_data.ingest.dedup import (
    NUM_BANDS,
    ExactKeys,
    band_hashes,
    cluster,
    near_text,
    normalised,
)
from dflash_train.records.conversation import Conversation, Turn


def call(user: str, answer: str | None = None, *, system: str = "Be brief.") -> Conversation:
    turns = [Turn(role="system", content=system), Turn(role="user", content=user)]
    if answer is not None:
        turns.append(Turn(role="assistant", content=answer))
    return Conversation(id=user, source="openai", messages=turns, on_policy=answer is not None)


def clusters_of(texts: list[str]) -> list[int]:
    otherwise = np.arange(1, len(texts) + 1, dtype=np.uint64)
    return cluster(band_hashes(texts, otherwise), len(texts)).tolist()


def shingles(text: str) -> set[tuple[str, ...]]:
    """Written again, word by word, as the reference."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def variations(num_texts: int) -> list[str]:
    """Invent texts, some of them copies with a few words changed."""
    random.seed(7)
    words = [f"word{number}" for number in range(3000)]
    texts: list[str] = []
    for number in range(num_texts):
        text = random.choices(words, k=random.randint(20, 200))
        if number % 3 == 2:
            text = random.choice(texts).split()
            for _ in range(random.randint(0, 3)):
                text[random.randrange(len(text))] = random.choice(words)
        texts.append(" ".join(text))
    return texts


def test_every_pair_at_jaccard_90_shares_a_cluster():
    texts = variations(450)
    sets = [shingles(text) for text in texts]
    roots = clusters_of(texts)
    pairs = list(itertools.combinations(range(len(texts)), 2))
    near = [pair for pair in pairs if jaccard(sets[pair[0]], sets[pair[1]]) >= 0.9]
    assert len(near) > 50
    assert all(roots[one] == roots[other] for one, other in near)


def test_texts_with_little_in_common_stay_apart():
    texts = variations(450)
    sets = [shingles(text) for text in texts]
    bands = band_hashes(texts, np.ones(len(texts), dtype=np.uint64))
    meet = [
        pair
        for pair in itertools.combinations(range(len(texts)), 2)
        if (bands[:, pair[0]] == bands[:, pair[1]]).any()
    ]
    assert all(jaccard(sets[one], sets[other]) > 0.3 for one, other in meet)


def test_share_of_bands_that_meet_follows_the_similarity():
    random.seed(11)
    met, similarity = [], []
    for _ in range(200):
        text = [f"w{random.randrange(10**6)}" for _ in range(200)]
        other = text.copy()
        other[random.randrange(200)] = "changed"
        bands = band_hashes([" ".join(text), " ".join(other)], np.ones(2, dtype=np.uint64))
        met.append((bands[:, 0] == bands[:, 1]).mean())
        similarity.append(jaccard(shingles(" ".join(text)), shingles(" ".join(other))))
    assert abs(np.mean(met) - np.mean(np.array(similarity) ** 8)) < 0.03


def test_tenant_that_calculates_keeps_its_variety():
    random.seed(2)
    pairs = [(random.randrange(1000), random.randrange(1000)) for _ in range(300)]
    texts = [f"What is {one} plus {other}?\n{one + other}" for one, other in pairs]
    assert len(set(clusters_of(texts))) == len(set(texts))


def test_templated_tenant_is_one_cluster():
    template = (
        "Dear support team, I would like to know when the order that I placed last week in your "
        "shop will finally be delivered, since nobody of your company has told me anything about "
        "it so far and the parcel service does not know either. My order number is {}. Thank you "
        "very much for a quick answer and for all the work that you do. Greetings from a customer"
    )
    assert len(set(clusters_of([template.format(number) for number in range(40)]))) == 1


def test_texts_without_words_are_told_apart_by_their_context():
    assert len(set(clusters_of(["???", "!!", "", "..."]))) == 4


def test_clusters_join_across_bands_and_do_not_depend_on_their_order():
    bands = np.array([[1, 1, 2, 3, 4, 9], [5, 6, 6, 7, 8, 8]], dtype=np.uint64)
    assert cluster(bands, 6).tolist() == cluster(bands[::-1], 6).tolist() == [0, 0, 0, 3, 4, 4]
    assert cluster(np.zeros((NUM_BANDS, 0), dtype=np.uint64), 0).tolist() == []


def test_a_long_chain_of_pairs_is_one_cluster():
    size = 1001
    bands = np.stack([(np.arange(size) + shift) // 2 for shift in (0, 1)]).astype(np.uint64)
    assert set(cluster(bands, size).tolist()) == {0}


def test_exact_keys_forgive_case_space_and_compatible_characters_only():
    keys = ExactKeys()
    one = keys.context(call("Is  Bay 4 free?"))
    assert one == keys.context(call("is bay 4\nFREE?"))
    assert one == keys.context(call("\N{FULLWIDTH LATIN CAPITAL LETTER I}s bay 4 free?"))
    for other in (
        call("Is bay 5 free?"),
        call("Is bay 4 free"),
        call("Is  Bay 4 free?", system=""),
    ):
        assert keys.context(other) != one
    assert keys.answer(call("Q", "Yes.")) == keys.answer(call("Q", "yes. ")) != 0
    assert keys.answer(call("Q")) == 0


def test_message_boundaries_count():
    keys = ExactKeys()
    joined = [Turn(role="user", content="a b")]
    apart = [Turn(role="user", content="a"), Turn(role="user", content="b")]
    contexts = {
        keys.context(Conversation(id="x", source="s", messages=turns))
        for turns in (joined, apart, [Turn(role="assistant", content=None), *joined])
    }
    assert len(contexts) == 3


def test_near_text_is_the_last_user_turn_and_the_answer():
    record = call("first", "answer")
    record.messages[2:2] = [Turn(role="assistant", content="A"), Turn(role="user", content="last")]
    assert near_text(record) == "last\nanswer"
    assert normalised("Stra\N{LATIN SMALL LETTER SHARP S}e\t 1") == "strasse 1"
