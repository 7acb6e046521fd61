from pathlib import Path

import pytest

from tests.test_data.log_mutations import ALL_FORMATS, fuzz, num_dropped

NUM_LINES = 100
"""Of each format; `make soak` takes 10,000."""


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_broken_lines_never_stop_reading_or_scrubbing_and_the_books_balance(
    name: str, tmp_path: Path
):
    counts = fuzz(name, tmp_path / "broken.jsonl", NUM_LINES)
    assert counts["lines"] >= NUM_LINES
    # The long run shows that some are kept, too: so few lines of a batch may lose every pair.
    assert counts["read"] > 0 < num_dropped(counts)
