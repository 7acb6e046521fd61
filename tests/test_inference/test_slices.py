from pathlib import Path

import pytest

from dflash_inference.slices import (
    POSITION_EDGES,
    PROMPT_EDGES,
    bucket_label,
    bucket_labels,
    find_cuts,
    read_temperatures,
)
from dflash_inference.statistics import draft_use, position_acceptance
from dflash_inference.trace import DecodeTrace, StepTrace
from dflash_train.config import EvaluateConfig
from dflash_train.records.conversation import Conversation, Turn, write_shard

CONFIG = EvaluateConfig(resamples=50)
BLOCK = {"block_size": 4, "num_drafts": 3, "ceiling": 4}


def trace_of(
    name: str, kept: list[int], *, prompt_length: int = 10, finish_reason: str = "stop"
) -> DecodeTrace:
    steps: list[StepTrace] = []
    start = prompt_length
    for n in kept:
        steps.append(StepTrace(start=start, width=4, num_accepted=n, committed=n + 1))
        start += n + 1
    return DecodeTrace(
        id=name,
        prompt_length=prompt_length,
        block_size=4,
        output_ids=[1] * (start - prompt_length + 1),
        steps=steps,
        finish_reason=finish_reason,
    )


def pooled(cuts: dict, cut: str) -> dict[str, float]:
    return {each["label"]: each["acceptance_length"]["pooled"] for each in cuts[cut]}


def test_a_value_falls_into_the_bucket_that_its_label_names() -> None:
    assert bucket_labels((0, 16, 64)) == ["0 to 15", "16 to 63", "64 and more"]
    places = {value: bucket_label(value, (0, 16, 64)) for value in (0, 15, 16, 63, 64, 9999)}
    assert list(places.values()) == [
        "0 to 15", "0 to 15", "16 to 63", "16 to 63", "64 and more", "64 and more",
    ]  # fmt: skip
    assert PROMPT_EDGES[0] == POSITION_EDGES[0] == 0


def test_requests_are_cut_by_prompt_finish_and_sampling() -> None:
    traces = [
        trace_of("a", [3, 3], prompt_length=127),
        trace_of("b", [1], prompt_length=128, finish_reason="length"),
        trace_of("c", [0, 0], prompt_length=9000),
    ]
    cuts = find_cuts(traces, traces[:1], {"a": 0.0, "b": 0.7, "c": None}, CONFIG, BLOCK)
    assert pooled(cuts, "prompt_length") == {"0 to 127": 4, "128 to 511": 2, "8192 and more": 1}
    assert pooled(cuts, "finish_reason") == {"stop": pytest.approx(10 / 4), "length": 2}
    assert pooled(cuts, "sampling") == {"greedy": 4, "sampled": 2, "unknown": 1}
    lookup = {each["label"]: each["prompt_lookup"] for each in cuts["prompt_length"]}
    assert lookup["0 to 127"]["pooled"] == 4
    assert lookup["128 to 511"] is None


def test_steps_are_cut_by_where_in_the_answer_they_begin() -> None:
    # Anchors stand at output positions 0, 4, 8, 12 and then, one token a step, 16 and 17.
    trace = trace_of("a", [3, 3, 3, 3, 0, 0])
    cuts = find_cuts([trace, trace_of("b", [])], [], {}, CONFIG, BLOCK)
    assert pooled(cuts, "position") == {"0 to 15": 4, "16 to 63": 1}
    assert [each["acceptance_length"]["num_steps"] for each in cuts["position"]] == [4, 2]
    assert trace.steps[4].start == 26  # the trace itself is left whole
    assert len(trace.steps) == 6


def test_the_temperature_of_a_regenerated_answer_is_that_of_its_record(tmp_path: Path) -> None:
    def record(name: str, sampling: dict[str, float]) -> Conversation:
        return Conversation(
            id=name, source="set", messages=[Turn(role="user", content="Hi")], sampling=sampling
        )

    logged = [record("a", {"temperature": 0.7}), record("b", {}), record("c", {"temperature": 1})]
    write_shard(tmp_path / "conversations" / "test-00000.jsonl.gz", logged)
    written = [record("a", {"temperature": 0.0})]
    write_shard(tmp_path / "regenerated" / "test-00000.jsonl.gz", written)
    assert read_temperatures(tmp_path, "test") == {"a": 0.0, "b": None, "c": 1.0}


def test_draft_use_counts_drafts_and_the_rows_that_verify_read() -> None:
    traces = [trace_of("a", [3, 0]), trace_of("b", [1])]
    traces[1].weight = 2
    use = draft_use(traces)
    assert (use["drafted"], use["accepted"]) == (12, 5)
    assert use["efficiency"] == pytest.approx(5 / 12)
    assert use["wasted_verify_rows"] == pytest.approx(1 - (4 + 1 + 2 * 2) / 16)
    assert draft_use([])["efficiency"] is None


def test_a_tree_offers_as_many_positions_as_it_is_deep() -> None:
    trace = trace_of("a", [2])
    trace.steps[0].width, trace.steps[0].tree_depth = 9, 2
    assert position_acceptance([trace], num_drafts=3).offered == [1, 1, 0]
