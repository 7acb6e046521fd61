from pathlib import Path

import pytest

from tests.test_data.log_mutations import ALL_FORMATS, mutated_log, num_dropped, read_and_scrub

NUM_LINES = 500


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_broken_lines_never_stop_reading_or_scrubbing_and_the_books_balance(
    name: str, tmp_path: Path
):
    lines = mutated_log(name, NUM_LINES // len(ALL_FORMATS) + 1, seed=0)
    counts = read_and_scrub(tmp_path / "broken.jsonl", name, lines)
    assert counts["read"] == counts["kept"] + num_dropped(counts)
    assert counts["read"] > 0 < counts["kept"]
    assert num_dropped(counts) > 0
