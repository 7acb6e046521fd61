"""The whole evaluate stage on a tiny target and a drafter that was fitted to its answers."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.evaluate import evaluate, foreign_rows
from dflash_inference.live import choose_prompts
from dflash_inference.live_check import check_live, find_mismatch, read_checks
from dflash_inference.report import report, summary_lines
from dflash_inference.trace import DecodeTrace, StepTrace, TopTwo, read_traces
from dflash_train.config import RecipeConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.store import FeatureRow, FeatureStore, write_index, write_shard
from dflash_train.features.target import Target
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.testing import tiny_drafter, tiny_target

NUM_ROWS, BUDGET, BLOCK_SIZE = 12, 24, 4


def invent_prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return [1, *torch.randint(4, 260, (6 + number % 5,), generator=generator).tolist()]


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target(dtype=torch.float64)
    # A token that its answers do reach, so that some stop and some run into the budget.
    answers = target.generate_batch(
        [invent_prompt(number) for number in range(NUM_ROWS)], max_new_tokens=BUDGET
    )
    target.stop_token_ids = frozenset({2, answers[0].output_ids[13]})
    return target


@pytest.fixture(scope="module")
def rows(target: Target, answer_prompts) -> list[FeatureRow]:
    prompts = [invent_prompt(number) for number in range(NUM_ROWS)]
    return answer_prompts(target, prompts, budget=BUDGET)


@pytest.fixture(scope="module")
def drafter(target: Target, rows: list[FeatureRow], fit_drafter) -> Drafter:
    fresh = tiny_drafter(target, block_size=BLOCK_SIZE, dtype=torch.float64)
    return fit_drafter(target, fresh, rows, num_steps=40)


def write_store(folder: Path, rows: list[FeatureRow]) -> FeatureStore:
    """Store rows as the stage `collect` does, without loss of precision."""
    path = folder / "00000.safetensors"
    write_index(folder, write_shard(path, rows, dtype=torch.float64))
    Manifest(stage="collect", recipe_hash="sha256:0", outputs=[FileEntry.of(path, folder)]).write(
        folder
    )
    return FeatureStore.open(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> RecipeConfig:
    config = RecipeConfig(name="tiny", runs_dir=str(tmp_path))
    config.evaluate.resamples = 200
    config.evaluate.live_traffic = 4
    config.evaluate.live_per_set = 2
    config.evaluate.live_max_new_tokens = BUDGET
    config.evaluate.fast = False
    return config


def run_stage(
    config: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> Manifest:
    features = config.run_dir / "features"
    tasks = [replace(row, tenant=None, session=None) for row in rows[:5]]
    stores = {
        "test": write_store(features / "test", rows),
        "eval-humaneval": write_store(features / "eval-humaneval", tasks),
    }
    manifest = Manifest(stage="evaluate", recipe_hash="sha256:0", target=target.describe())
    return evaluate(config, target=target, drafter=drafter, stores=stores, manifest=manifest)


def test_speculative_tokens_equal_plain_tokens_for_a_fitted_drafter(
    target: Target, drafter: Drafter
) -> None:
    for number in range(NUM_ROWS + 6):
        prompt = invent_prompt(number)
        plain = AutoregressiveDecoder(target).generate(prompt, max_new_tokens=BUDGET)
        live = SpeculativeDecoder(target, drafter).generate(prompt, max_new_tokens=BUDGET)
        assert live.output_ids == plain.output_ids
        assert live.finish_reason == plain.finish_reason


def test_the_stage_writes_every_trace_and_a_report_can_be_made(
    recipe: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> None:
    manifest = run_stage(recipe, target, drafter, rows)
    folder = recipe.run_dir / "traces"
    assert sorted(entry.path for entry in manifest.outputs) == [
        "foreign-test.jsonl",
        "live-check.json",
        "live.jsonl",
        "live_lookup.jsonl",
        "lookup-eval-humaneval.jsonl",
        "lookup-test.jsonl",
        "plain.jsonl",
        "replay-eval-humaneval.jsonl",
        "replay-test.jsonl",
        "width1.jsonl",
    ]
    assert [trace.id for trace in read_traces(folder / "replay-test.jsonl")] == [r.id for r in rows]
    checks = read_checks(folder / "live-check.json")
    assert len(checks) == 6
    assert all(check.equals_replay and check.token_match_rate == 1 for check in checks)
    assert all(check.batch_match_rate == 1 for check in checks)  # float64: no near-tie turns
    plain, width_one = (read_traces(folder / name) for name in ("plain.jsonl", "width1.jsonl"))
    assert [trace.output_ids for trace in width_one] == [trace.output_ids for trace in plain]
    steps = [step for trace in width_one for step in trace.steps]
    assert {(step.width, step.committed, step.source) for step in steps} == {(1, 1, "none")}
    report(recipe, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    found = orjson.loads((recipe.run_dir / "report" / "report.json").read_bytes())
    assert found["token_match_rate"] == 1
    assert found["acceptance_length"]["num_requests"] == NUM_ROWS
    assert found["acceptance_length"]["pooled"] >= 1.5
    assert found["foreign_features"]["difference"]["value"] > 0.3
    assert found["training"] is None
    assert "6 of 6 prompts equal replay" in "\n".join(summary_lines(recipe))


def test_a_stage_cut_short_keeps_finished_files_and_ends_the_same(
    recipe: RecipeConfig, target: Target, drafter: Drafter, rows: list[FeatureRow]
) -> None:
    run_stage(recipe, target, drafter, rows)
    folder = recipe.run_dir / "traces"
    kept, redone = folder / "replay-test.jsonl", folder / "foreign-test.jsonl"
    before = redone.read_bytes()
    for name in ("manifest.json", "live-check.json", redone.name):
        (folder / name).unlink()
    stamp = kept.stat().st_mtime_ns
    run_stage(recipe, target, drafter, rows)
    assert kept.stat().st_mtime_ns == stamp
    assert redone.read_bytes() == before
    assert (folder / "live-check.json").exists()
    Manifest.read(folder)


def test_foreign_features_come_from_another_conversation(
    tmp_path: Path, rows: list[FeatureRow]
) -> None:
    store = write_store(tmp_path / "test", rows)
    sessions = {row.id: row.session for row in rows}
    foreign = list(foreign_rows(store))
    assert [row.id for row in foreign] == [row.id for row in rows]
    for row in foreign:
        donors = [other for other in rows if torch.equal(other.features[5], row.features[5])]
        assert len(donors) == 1
        assert sessions[donors[0].id] != row.session
        num_tokens, num_donated = len(row.input_ids), len(donors[0].input_ids) - 1
        assert row.features.shape[0] == num_tokens
        for position in range(num_tokens):
            wanted = donors[0].features[position % num_donated]
            assert torch.equal(row.features[position], wanted)


def test_one_conversation_alone_gives_no_foreign_features(
    tmp_path: Path, rows: list[FeatureRow]
) -> None:
    assert list(foreign_rows(write_store(tmp_path / "test", rows[:2]))) == []


def test_live_prompts_are_spread_over_tenants_and_fixed_by_the_seed(
    recipe: RecipeConfig, tmp_path: Path, rows: list[FeatureRow]
) -> None:
    stores = {"test": write_store(tmp_path / "test", rows)}
    recipe.evaluate.live_traffic = 6
    chosen = choose_prompts(recipe.evaluate, stores)
    assert sorted(prompt.row.tenant or "" for prompt in chosen) == [
        "h:0",
        "h:0",
        "h:1",
        "h:1",
        "h:2",
        "h:2",
    ]
    again = choose_prompts(recipe.evaluate, stores)
    assert [prompt.row.id for prompt in again] == [prompt.row.id for prompt in chosen]
    recipe.evaluate.seed = 1
    other = choose_prompts(recipe.evaluate, stores)
    assert [prompt.row.id for prompt in other] != [prompt.row.id for prompt in chosen]


def decoded(output_ids: list[int], logits: tuple[float, float]) -> DecodeTrace:
    return DecodeTrace(
        prompt_length=3,
        block_size=1,
        output_ids=output_ids,
        steps=[StepTrace(start=3, width=1, num_accepted=0, committed=1)],
        finish_reason="length",
        top_two=[TopTwo(ids=(token, 77), logits=logits) for token in output_ids],
    )


@pytest.mark.parametrize(
    ("logits", "other_token", "dtype", "is_near_tie"),
    [
        ((20.0, 19.9999), 77, torch.float32, True),
        ((20.0, 19.9), 77, torch.float32, False),
        ((20.0, 19.9), 77, torch.bfloat16, True),
        ((20.0, 19.9999), 78, torch.float32, False),
    ],
)
def test_a_mismatch_is_a_near_tie_only_between_the_two_best_at_rounding_level(
    logits: tuple[float, float], other_token: int, dtype: torch.dtype, is_near_tie: bool
) -> None:
    plain = decoded([5, 6, 7], logits)
    mismatch = find_mismatch(plain, decoded([5, other_token, 9], logits), dtype=dtype)
    assert mismatch is not None
    assert (mismatch.position, mismatch.plain_token) == (1, 6)
    assert mismatch.speculative_token == other_token
    assert mismatch.is_near_tie is is_near_tie


def test_a_step_that_differs_from_replay_is_counted_and_named() -> None:
    live = decoded([5, 6], (2.0, 1.0))
    other = replace(live, steps=[replace(live.steps[0], width=2)])
    check = check_live(
        live,
        plain=live,
        replayed=other,
        batch_ids=[7, 6],
        stored_ids=[5, 9, 9],
        dtype=torch.float32,
    )
    assert check.batch_match_rate == 0
    assert (check.equals_replay, check.num_steps_equal, check.num_steps) == (False, 0, 1)
    assert check.mismatch is None
    assert check.stored_match_rate == 0.5
