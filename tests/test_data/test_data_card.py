from collections import Counter

import pytest

from dflash_data.drops import DropReason, all_reasons
from dflash_data.ingest.data_card import as_markdown, data_card
from dflash_train.config import DataConfig
from dflash_train.records.manifest import Counts

TOTALS = Counter(
    {
        "source/openai": 9,
        "policy/match": 4,
        "ids/kept": 2,
        "ids/stripped": 1,
        "without_model": 6,
        "redacted/EMAIL/user": 3,
        "records_touched": 2,
        "contaminated/humaneval": 1,
        "sessions": 5,
        "sessions_not_time_based": 2,
    }
)
DROPS = {DropReason.excluded_tenant: 2, DropReason.expired: 1, DropReason.cluster_cap: 4}
SPLITS = {
    name: {"rows": 1, "sessions": 1, "tenants": 1, "first": None, "last": None}
    for name in ("train", "validation", "test")
}


def card() -> dict[str, object]:
    counts = Counts(read=10, kept=3, dropped=all_reasons(DROPS))
    data = DataConfig(excluded_tenants=["a customer that nobody may read of"])
    return data_card(TOTALS, counts, SPLITS, data, ["humaneval"])


def test_every_count_stands_under_its_heading():
    made = card()
    assert made["sources"] == {"openai": 9}
    assert made["answers"] == {"match": 4}
    assert made["privacy"]["redactions"] == {"EMAIL/user": 3}  # type: ignore[index]
    assert made["privacy"]["opted_out"] == 2  # type: ignore[index]
    assert made["privacy"]["expired"] == 1  # type: ignore[index]
    assert made["repeats"]["removed_by_cap"] == 4  # type: ignore[index]
    assert made["contaminated"] == {"humaneval": 1}
    assert made["is_time_based"] is False
    assert list(made["dropped"]) == [reason.value for reason in DropReason]  # type: ignore[call-overload]


def test_the_card_says_how_many_tenants_are_left_out_and_never_which():
    assert card()["privacy"]["num_excluded_tenants"] == 1  # type: ignore[index]
    assert "nobody may read" not in str(card()) + as_markdown(card())


@pytest.mark.parametrize(
    ("served_model", "sentence"),
    [
        ("small", "were taken for those of data.served_model (=small)"),
        (None, "count as another model's"),
    ],
)
def test_the_card_counts_calls_without_a_model_and_what_became_of_them(
    served_model: str | None, sentence: str
):
    counts = Counts(read=10, kept=3, dropped=all_reasons(DROPS))
    made = data_card(TOTALS, counts, SPLITS, DataConfig(served_model=served_model), [])
    assert (made["without_model"], made["served_model"]) == (6, served_model)
    assert f"6 calls stand in logs of a server that name no model. Their answers {sentence}" in (
        as_markdown(made)
    )
    named = data_card(TOTALS - Counter(without_model=6), counts, SPLITS, DataConfig(), [])
    assert "name no model" not in as_markdown(named)


def test_the_card_counts_what_became_of_token_ids():
    made = card()
    assert made["token_ids"] == {"kept": 2, "stripped": 1}
    assert "| stripped | 1 |" in as_markdown(made).splitlines()


def test_markdown_tables_hold_the_same_counts():
    text = as_markdown(card())
    for line in ("| openai | 9 |", "| EMAIL/user | 3 |", "| humaneval | 1 |", "| expired | 1 |"):
        assert line in text.splitlines()
    assert "2 of 5 sessions have no usable time" in text
    assert "unparsable" not in text
