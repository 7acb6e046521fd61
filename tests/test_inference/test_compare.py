from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from dflash_inference.compare import compare_places, compare_rows, find_differences
from dflash_inference.report import report
from dflash_inference.request_rows import from_columns, rows_of, to_columns
from dflash_inference.statistics import RequestSums, paired_difference, pooled_mean
from dflash_inference.trace import DecodeTrace, StepTrace, read_traces, write_traces
from dflash_train.cli import main
from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import Manifest

NUM_DRAFTS = 7
Invent = Callable[..., list[DecodeTrace]]


def trace_of(name: str, kept: list[int], *, group: str = "h:1") -> DecodeTrace:
    starts = 10 + np.cumsum([0, *(n + 1 for n in kept)])
    steps = [
        StepTrace(start=int(start), width=NUM_DRAFTS + 1, num_accepted=n, committed=n + 1)
        for start, n in zip(starts, kept, strict=False)
    ]
    return DecodeTrace(
        id=name,
        group=group,
        conversation=f"s-{name}",
        prompt_length=10,
        block_size=NUM_DRAFTS + 1,
        output_ids=list(range(1 + sum(step.committed for step in steps))),
        steps=steps,
        finish_reason="length",
    )


def invent(number: int, *, rate: float, seed: int = 0, group: str = "h:1") -> list[DecodeTrace]:
    """Requests whose drafts are kept at a rate; two calls draw alike as far as the rate lets."""
    generator = np.random.default_rng(seed)
    traces = []
    for index in range(number):
        luck = generator.random((12, NUM_DRAFTS))
        kept = (luck < rate).cumprod(1).sum(1).tolist()
        traces.append(trace_of(f"{group}-{index}", kept, group=group))
    return traces


def write(path: Path, traces: list[DecodeTrace]) -> str:
    write_traces(path, traces)
    return str(path)


def test_a_better_drafter_is_called_better_and_the_other_worse(tmp_path: Path) -> None:
    strong = write(tmp_path / "a.jsonl", invent(60, rate=0.6))
    weak = write(tmp_path / "b.jsonl", invent(60, rate=0.5))
    (forward,) = compare_places(strong, weak, resamples=500).slices
    (backward,) = compare_places(weak, strong, resamples=500).slices
    assert (forward.difference.verdict, backward.difference.verdict) == ("better", "worse")
    assert forward.sentence.startswith("A is better than B (+")
    assert backward.sentence.startswith("A is worse than B (-")
    assert forward.difference.value == pytest.approx(-backward.difference.value)


def test_equal_drafters_and_few_requests_stay_undecided(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", invent(60, rate=0.5))
    other = write(tmp_path / "b.jsonl", invent(60, rate=0.5, seed=1))
    few = write(tmp_path / "c.jsonl", invent(49, rate=0.7))
    (found,) = compare_places(one, other, resamples=500).slices
    assert found.difference.verdict == "undecided"
    assert "the interval includes 0" in found.sentence
    comparison = compare_places(few, one, resamples=500)
    (found,) = comparison.slices
    assert found.difference.interval.low > 0
    assert found.difference.verdict == "undecided"
    assert "fewer than 50 requests make no claim" in found.sentence
    assert "0 requests that only A has, 11 that only B has" in comparison.remarks[0]


def test_pairs_are_made_by_id_whatever_the_order(tmp_path: Path) -> None:
    first, second = invent(60, rate=0.6), invent(60, rate=0.5)
    straight = paired_difference(
        RequestSums.of(first), RequestSums.of(second), resamples=300, seed=4
    )
    shuffled = compare_places(
        write(tmp_path / "a.jsonl", first),
        write(tmp_path / "b.jsonl", second[::-1]),
        resamples=300,
        seed=4,
    )
    (found,) = shuffled.slices
    assert found.difference == straight
    assert found.first.pooled == pytest.approx(pooled_mean(RequestSums.of(first)))


def test_every_tenant_has_its_own_line_behind_all(tmp_path: Path) -> None:
    small, large = invent(5, rate=0.6, group="h:2"), invent(60, rate=0.6)
    path = write(tmp_path / "a.jsonl", small + large)
    found = compare_places(path, path, resamples=100)
    assert [each.name for each in found.slices] == ["all", "all/h:1", "all/h:2"]
    assert [each.difference.num_requests for each in found.slices] == [65, 60, 5]


def test_run_folder_and_its_report_give_the_same_figures(invented_run: RecipeConfig) -> None:
    report(invented_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    run = str(invented_run.run_dir)
    against_itself = compare_places(run, f"{run}/report", resamples=200)
    assert against_itself.slices[0].name == "test"
    assert "eval-humaneval" in [each.name for each in against_itself.slices]
    assert all(each.difference.value == 0 for each in against_itself.slices)
    assert against_itself.remarks == []
    by_lookup = compare_places(run, f"{run}/traces/lookup-test.jsonl", resamples=200)
    found = orjson.loads((invented_run.run_dir / "report" / "report.json").read_bytes())
    expected = found["prompt_lookup"]["difference"]
    assert by_lookup.slices[0].difference.value == pytest.approx(expected["value"])
    assert by_lookup.slices[0].difference.verdict == expected["verdict"]


def test_rows_of_a_report_come_back_whole() -> None:
    rows = rows_of([*invent(4, rate=0.5), trace_of("empty", [])])
    assert len(rows) == 4
    assert from_columns(to_columns(rows)) == rows
    assert compare_rows(rows, [], resamples=10, seed=0) is None


def test_different_ceilings_and_answers_are_said(tmp_path: Path) -> None:
    first = invent(3, rate=0.5)
    second = [
        replace(
            trace,
            output_ids=[*trace.output_ids[:-1], 999],
            steps=[replace(step, width=16) for step in trace.steps],
        )
        for trace in first
    ]
    remarks = compare_places(
        write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second), resamples=10
    ).remarks
    assert remarks == [
        "the ceilings differ: a step of A commits at most 8 tokens, one of B 16",
        "3 of 3 requests have different answers on the sides",
    ]


def test_the_first_step_that_differs_is_found_with_both_sides(tmp_path: Path) -> None:
    first = [trace_of("a", [2, 1, 0]), trace_of("b", [3, 3])]
    changed = trace_of("b", [3, 2, 0])
    places = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", [first[0], changed])
    found = find_differences(*places)
    (parted,) = found.unequal
    assert parted.id == "b"
    assert parted.step is not None
    assert parted.step.first is not None
    assert parted.step.second is not None
    assert parted.step.index == 1
    assert (parted.step.first.num_accepted, parted.step.second.num_accepted) == (3, 2)
    assert parted.output_position is None
    assert found.lines()[0] == "1 of 2 requests are equal at every step"
    assert "b: step 1 of 2: A start 14 width 8 accepted 3" in found.lines()[1]


def test_a_token_that_differs_is_found_though_all_steps_agree(tmp_path: Path) -> None:
    first = trace_of("a", [2, 1])
    second = replace(first, output_ids=[*first.output_ids[:3], 77, *first.output_ids[4:]])
    found = find_differences(
        write(tmp_path / "a.jsonl", [first]), write(tmp_path / "b.jsonl", [second])
    )
    assert found.requests[0].step is None
    assert found.requests[0].output_position == 3
    assert "output token 3 differs" in found.lines()[1]


def test_counts_after_clipping_are_compared_by_committed_tokens(tmp_path: Path) -> None:
    first = trace_of("a", [2, 3])
    first.output_ids = first.output_ids[:-2]
    first.steps[-1].committed = 2
    second = replace(first, steps=[first.steps[0], replace(first.steps[1], num_accepted=1)])
    places = write(tmp_path / "a.jsonl", [first]), write(tmp_path / "b.jsonl", [second])
    assert find_differences(*places).unequal
    assert not find_differences(*places, counts_are_clipped=True).unequal


def test_the_verb_prints_lines_or_json_and_tells_by_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "a.jsonl", invent(60, rate=0.6))
    other = write(tmp_path / "b.jsonl", invent(60, rate=0.5))
    assert main(["compare", one, other, "resamples=200"]) == 0
    assert "60 requests: A is better than B" in capsys.readouterr().out
    assert main(["compare", one, other, "resamples=200", "json=true"]) == 0
    found = orjson.loads(capsys.readouterr().out)
    assert found["slices"][0]["verdict"] == "better"
    assert found["slices"][0]["difference"]["interval"]["low"] > 0
    assert main(["compare", one, one, "first_difference=true"]) == 0
    assert "60 of 60 requests are equal" in capsys.readouterr().out
    assert main(["compare", one, other, "first_difference=true", "json=true"]) == 1
    found = orjson.loads(capsys.readouterr().out)
    assert found["num_requests"] - found["num_equal"] == len(found["differences"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A"], "1 places were given, two are compared"),
        (["A", "B", "colour=red"], "colour=red is not understood"),
        (["A", "B", "kind=fast"], "kind (=fast) must be one of replay"),
        (["A", "nowhere"], "nowhere holds no replay traces"),
        (["A", "other"], "share no request"),
        (["A", "unnamed"], "holds a request without id"),
        (["A", "twice"], "1 requests whose id another one has"),
        (["A", "B", "clipped=true"], "goes with first_difference=true"),
        (["A", "B", "json=yes"], "json (=yes) must be true or false"),
    ],
)
def test_what_cannot_be_compared_is_said_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    traces = invent(3, rate=0.5)
    files = {
        "A": traces,
        "B": traces,
        "other": [replace(trace, id=f"x{trace.id}") for trace in traces],
        "unnamed": [replace(traces[0], id="")],
        "twice": [traces[0], traces[0]],
    }
    for name, content in files.items():
        write(tmp_path / name, content)
    places = [str(tmp_path / each) if "=" not in each else each for each in arguments]
    assert main(["compare", *places]) == 2
    assert words in capsys.readouterr().err


def test_a_report_has_no_steps_to_compare(
    invented_run: RecipeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report(invented_run, manifest=Manifest(stage="report", recipe_hash="sha256:0"))
    run = str(invented_run.run_dir)
    assert main(["compare", run, f"{run}/report", "first_difference=true"]) == 2
    assert "holds sums of requests, not their steps" in capsys.readouterr().err
    replayed = read_traces(invented_run.run_dir / "traces" / "replay-test.jsonl")
    assert len(find_differences(run, run).requests) >= len(replayed)
