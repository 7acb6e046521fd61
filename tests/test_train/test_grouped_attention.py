from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dflash_train.config import Attention, TargetConfig
from dflash_train.features.grouped_attention import NAME
from dflash_train.features.target import Target, load_target
from dflash_train.testing import save_tiny_target, tiny_config, tiny_tokenizer

PROMPTS = [[1, 40, 50, 60, 70, 80, 90], [1, 70, 71], [5]]
ROWS = [[7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19, 20, 21]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_target(tmp_path / "target")


def plain_target(folder: Path) -> Target:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return Target(model, tiny_tokenizer(), [1, 3], name="plain", revision="")


def test_answers_and_features_are_those_of_repeated_keys_to_the_bit(folder: Path) -> None:
    grouped, plain = (
        load_target(TargetConfig(name_or_path=str(folder)), [1, 3]),
        plain_target(folder),
    )
    assert grouped.model.config._attn_implementation == NAME
    got, want = (each.generate_batch(PROMPTS, max_new_tokens=9) for each in (grouped, plain))
    assert [row.output_ids for row in got] == [row.output_ids for row in want]
    assert all(torch.equal(a.features, b.features) for a, b in zip(got, want, strict=True))
    read, wanted = (each.features_of(ROWS) for each in (grouped, plain))
    assert all(torch.equal(a, b) for a, b in zip(read, wanted, strict=True))


def test_keys_are_not_repeated_where_rows_are_padded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = load_target(TargetConfig(name_or_path=str(folder)), [1, 3])
    num_heads: set[int] = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(
        query: torch.Tensor, key: torch.Tensor, *others: object, **settings: object
    ) -> object:
        num_heads.add(key.shape[1])
        return attend(query, key, *others, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    grouped.generate_batch(PROMPTS, max_new_tokens=3)
    assert num_heads == {tiny_config().num_key_value_heads}


def test_another_attention_is_left_alone(folder: Path) -> None:
    config = TargetConfig(name_or_path=str(folder), attention=Attention.eager)
    assert load_target(config, [1]).model.config._attn_implementation == "eager"
