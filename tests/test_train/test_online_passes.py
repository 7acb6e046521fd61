from dflash_train.features.online_passes import PADDED, plan_passes
from dflash_train.features.store import IndexLine


def line(row: int, num_tokens: int) -> IndexLine:
    return IndexLine(
        id=f"{row}-{num_tokens}", tenant=None, session=None, shard="a", row=row,
        num_tokens=num_tokens, prompt_length=1, max_length=99, finish_reason="stop", weight=1,
    )  # fmt: skip


def test_passes_hold_each_call_once_and_pad_little() -> None:
    lines = [line(number, 10 + 7 * (number * 5 % 13)) for number in range(13)]
    lines += [line(3, 4), line(3, 6)]
    passes = plan_passes(lines, range(15), batch_size=6)
    assert sorted(call for each in passes for row in each for call in row) == list(range(15))
    assert next(row for each in passes for row in each if 3 in row) == (3, 14, 13)
    for each in passes:
        lengths = [lines[row[0]].num_tokens for row in each]
        assert len(lengths) <= 6
        assert max(lengths) * len(lengths) <= PADDED * sum(lengths)
    assert len(passes) < 6
    assert plan_passes(lines, [*range(14, -1, -1), 2], batch_size=6) == passes
