from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_inference.serving_costs import (
    CONCURRENCY_FORMAT,
    COSTS_FORMAT,
    predict_speed,
    read_concurrency,
    read_cost_table,
    summarize_concurrency,
)


def point(concurrency: int, plain: float, speculative: float) -> dict[str, Any]:
    return {
        "concurrency": concurrency,
        "plain_tokens_per_s": plain,
        "speculative_tokens_per_s": speculative,
        "tokens_per_step": 3.0,
    }


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_bytes(orjson.dumps(content))
    return path


def concurrency_file(path: Path, *points: dict[str, Any]) -> Path:
    head = {"format": CONCURRENCY_FORMAT, "format_version": 1, "setting": "invented"}
    return write(path, head | {"points": list(points)})


def cost_file(path: Path, *rows: dict[str, Any]) -> Path:
    head = {"format": COSTS_FORMAT, "format_version": 1, "hardware": "invented"}
    return write(path, head | {"rows": list(rows)})


def test_break_even_lies_where_the_speed_up_crosses_one(tmp_path: Path) -> None:
    path = concurrency_file(
        tmp_path / "c.json", point(16, 100, 75), point(1, 10, 20), point(4, 40, 50)
    )
    found = summarize_concurrency(read_concurrency(path))
    assert [each["concurrency"] for each in found["points"]] == [1, 4, 16]
    assert [each["speed_up"] for each in found["points"]] == pytest.approx([2, 1.25, 0.75])
    assert [each["step_cost"] for each in found["points"]] == pytest.approx([1.5, 2.4, 4.0])
    assert (found["pays_up_to"], found["loses_from"]) == (4, 16)
    assert found["break_even_concurrency"] == pytest.approx(8.0)  # half of the way in log(4..16)


def test_always_and_never_paying_have_no_break_even(tmp_path: Path) -> None:
    always = read_concurrency(concurrency_file(tmp_path / "a.json", point(1, 1, 2), point(2, 1, 1)))
    never = read_concurrency(concurrency_file(tmp_path / "n.json", point(1, 2, 1)))
    found = summarize_concurrency(always)
    assert (found["pays_up_to"], found["loses_from"]) == (2, None)
    assert found["break_even_concurrency"] is None
    found = summarize_concurrency(never)
    assert (found["pays_up_to"], found["loses_from"]) == (None, 1)


def test_predicted_speed_up_is_length_over_step_cost(tmp_path: Path) -> None:
    path = cost_file(
        tmp_path / "t.json",
        {"batch": 1, "width": 1, "verify_s": 0.010},
        {"batch": 1, "width": 8, "verify_s": 0.012, "draft_s": 0.002, "other_s": 0.001},
        {"batch": 8, "width": 1, "verify_s": 0.010},
        {"batch": 8, "width": 8, "verify_s": 0.024},
    )
    table = read_cost_table(path)
    one, eight = predict_speed(table, pooled=3.0, interval=[2.7, 3.3], width=8)
    assert one["step_cost"] == pytest.approx(1.5)
    assert one["speed_up"] == pytest.approx(2.0)
    assert one["speed_up_interval"] == pytest.approx([1.8, 2.2])
    assert one["tokens_per_second"] == pytest.approx(3.0 / 0.015)
    assert eight["tokens_per_second"] == pytest.approx(8 * 3.0 / 0.024)
    (narrow, _) = predict_speed(table, pooled=3.0, interval=[2.7, 3.3], width=4)
    assert narrow["step_cost"] == pytest.approx((0.010 + 0.002 * 3 / 7 + 0.003) / 0.010)
    assert predict_speed(table, pooled=3.0, interval=[2.7, 3.3], width=9) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "else"}, "must be 'dflash-train/concurrency' 1"),
        ({"format_version": 2}, "must be 'dflash-train/concurrency' 1"),
        ({"points": [point(1, 0, 1)]}, "must be above 0"),
        ({"points": [{"concurrency": 1}]}, "is no such file"),
        ({"colour": "red"}, "is no such file"),
    ],
)
def test_a_foreign_measurement_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    head = {"format": CONCURRENCY_FORMAT, "format_version": 1, "setting": "invented", "points": []}
    with pytest.raises(ValueError, match=words):
        read_concurrency(write(tmp_path / "c.json", head | change))


def test_a_cost_table_needs_plain_decoding_at_every_batch(tmp_path: Path) -> None:
    wide = {"batch": 2, "width": 8, "verify_s": 0.02}
    plain = {"batch": 1, "width": 1, "verify_s": 0.01}
    for rows in ([wide], [plain, wide], []):
        with pytest.raises(ValueError, match="must hold a row of width 1"):
            read_cost_table(cost_file(tmp_path / "t.json", *rows))
    with pytest.raises(ValueError, match="cannot be read"):
        read_cost_table(tmp_path / "none.json")
