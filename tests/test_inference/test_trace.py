from dataclasses import replace
from pathlib import Path

import pytest

from dflash_inference.trace import (
    DecodeTrace,
    StepTrace,
    TopTwo,
    first_difference,
    read_traces,
    steps_of,
    token_match_rate,
    write_traces,
)

TRACE = DecodeTrace(
    id="r1",
    group="h:1",
    conversation="s1",
    weight=2,
    prompt_length=10,
    block_size=4,
    output_ids=[5, 6, 7, 8, 9, 2],
    steps=[
        StepTrace(start=10, width=4, num_accepted=2, committed=3, draft_s=0.1, verify_s=0.2),
        StepTrace(start=13, width=4, num_accepted=3, committed=2),
    ],
    prefill_s=0.5,
    finish_reason="stop",
    top_two=[TopTwo(ids=(5, 1), logits=(2.5, 2.0))],
)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [TRACE, replace(TRACE, id="r2", top_two=[])])
    assert read_traces(path) == [TRACE, replace(TRACE, id="r2", top_two=[])]


def test_a_damaged_line_is_refused_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"secret": "value"}\n')
    with pytest.raises(ValueError, match="no decode trace") as caught:
        read_traces(path)
    assert "value" not in str(caught.value)


def test_replayed_chain_is_clipped_at_the_last_token() -> None:
    steps = steps_of([10, 13], [2, 3], [4, 4], last_position=15)
    assert [step.committed for step in steps] == [3, 2]
    assert [step.num_accepted for step in steps] == [2, 3]


def test_equal_traces_have_no_difference() -> None:
    assert first_difference(TRACE, replace(TRACE, id="other", prefill_s=9.0)) is None


@pytest.mark.parametrize(
    "change", [{"start": 14}, {"width": 3}, {"committed": 1}, {"num_accepted": 0}]
)
def test_the_first_step_that_differs_is_found(change: dict[str, int]) -> None:
    other = replace(TRACE, steps=[TRACE.steps[0], replace(TRACE.steps[1], **change)])
    difference = first_difference(TRACE, other)
    assert difference is not None
    assert (difference.index, difference.second) == (1, other.steps[1])


def test_what_verify_saw_behind_the_last_token_is_no_difference() -> None:
    # Two tokens are stored after the anchor, so replay counts 2 where verify counted 3.
    other = replace(TRACE, steps=[TRACE.steps[0], replace(TRACE.steps[1], num_accepted=2)])
    assert first_difference(TRACE, other) is None


def test_a_tool_that_clips_its_counts_is_compared_by_tokens() -> None:
    other = replace(TRACE, steps=[TRACE.steps[0], replace(TRACE.steps[1], num_accepted=1)])
    assert first_difference(TRACE, other) is not None
    assert first_difference(TRACE, other, counts_are_clipped=True) is None


def test_a_missing_step_is_a_difference() -> None:
    difference = first_difference(TRACE, replace(TRACE, steps=TRACE.steps[:1]))
    assert difference is not None
    assert (difference.index, difference.second) == (1, None)


@pytest.mark.parametrize(
    ("first", "second", "rate"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([9], [1], 0.0),
    ],
)
def test_token_match_rate_stops_at_the_first_difference(
    first: list[int], second: list[int], rate: float
) -> None:
    assert token_match_rate(first, second) == rate
    assert token_match_rate(second, first) == rate
