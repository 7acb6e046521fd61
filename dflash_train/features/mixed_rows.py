"""Rows of several stores as one split: those of a new log, and some of earlier runs among them.

A drafter that is tuned on one tenant's traffic alone forgets the others. So a share of its training
rows are rows that an earlier run has stored: text and features of the same target, so that the
drafter itself needs not be asked what it knew. The choice is a function of the seed and of the
rows' ids, and one choice serves the whole run, so batches, anchors and resuming stay what they are
for any other split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dflash_train.features.row_source import RowSource
from dflash_train.features.store import FeatureRow, IndexLine
from dflash_train.records.manifest import content_hash

Place = tuple[RowSource, int]
"""A row: where it is read, and its position there."""


class ChosenRows:
    """Rows of any sources in a given order; a `RowSource`."""

    def __init__(self, folder: Path, places: Sequence[Place]) -> None:
        """Take rows as they are; nothing is read.

        Args:
            folder: What messages name.
            places: The rows, in order.
        """
        self._folder = folder
        self._places = list(places)
        self._lines = [source.lines[position] for source, position in self._places]

    @property
    def folder(self) -> Path:
        """What messages name."""
        return self._folder

    @property
    def lines(self) -> list[IndexLine]:
        """What is known of every row without reading it."""
        return self._lines

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._places)

    def __getitem__(self, position: int) -> FeatureRow:
        """Read one row."""
        source, place = self._places[position]
        return source[place]

    def read(self, positions: Sequence[int]) -> list[FeatureRow]:
        """Read several rows, in the order of their positions."""
        return [self[position] for position in positions]

    def read_tokens(self, position: int) -> tuple[Tensor, Tensor]:
        """Read a row's `input_ids` and `loss_mask` alone."""
        source, place = self._places[position]
        return source.read_tokens(place)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Requests and conversations that a row of another run must not repeat."""

    ids: frozenset[str]
    sessions: frozenset[str] = frozenset()

    @classmethod
    def of(cls, *, rows: Sequence[RowSource], conversations: Sequence[RowSource] = ()) -> "Seen":
        """Name what some splits hold.

        Args:
            rows: No row of them comes again.
            conversations: Nor does any turn of their conversations.
        """
        ids = {line.id for source in (*rows, *conversations) for line in source.lines}
        lines = [line for source in conversations for line in source.lines]
        sessions = {line.session for line in lines if line.session is not None}
        return cls(ids=frozenset(ids), sessions=frozenset(sessions))

    def holds(self, line: IndexLine) -> bool:
        """Tell whether a row is among them."""
        return line.id in self.ids or line.session in self.sessions


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Own rows and replayed ones, and what became of the wish."""

    rows: ChosenRows
    """Own rows first, in their order."""
    num_own: int
    num_replayed: int
    share: float
    """Of the replayed rows, by answer tokens; below the wanted one if there were too few."""
    num_left_out: int
    """Older rows that could not be taken, since this run holds or measures them too."""


def unseen_places(sources: Sequence[RowSource], seen: Seen) -> list[Place]:
    """List the rows of some sources that are not among those seen; one of several equal ids."""
    places: dict[str, Place] = {}
    for source in sources:
        for position, line in enumerate(source.lines):
            if not seen.holds(line):
                places.setdefault(line.id, (source, position))
    return list(places.values())


def mix_rows(
    own: RowSource, older: Sequence[RowSource], *, share: float, seen: Seen, seed: int
) -> Mixture:
    """Put rows of earlier runs behind the own ones until they hold their share of answer tokens.

    They are drawn without regard to tenant or run, so each comes in proportion to its rows there.

    Args:
        own: The training split of the run.
        older: Training splits of earlier runs.
        share: 0 up to below 1; 0 replays none.
        seen: Rows that must not come: those of this run, whatever their split.
        seed: Seed of the draw.
    """
    places = unseen_places(older, seen)
    wanted = share / (1 - share) * sum(map(_answer_tokens, own.lines))
    chosen: list[Place] = []
    num_tokens = 0
    for place in sorted(places, key=lambda each: _lot(each, seed)):
        if num_tokens >= wanted:
            break
        chosen.append(place)
        num_tokens += _answer_tokens(_line(place))
    own_tokens = sum(map(_answer_tokens, own.lines))
    return Mixture(
        rows=ChosenRows(own.folder, [*((own, row) for row in range(len(own))), *chosen]),
        num_own=len(own),
        num_replayed=len(chosen),
        share=num_tokens / max(1, num_tokens + own_tokens),
        num_left_out=sum(len(source) for source in older) - len(places),
    )


def _line(place: Place) -> IndexLine:
    source, position = place
    return source.lines[position]


def _answer_tokens(line: IndexLine) -> int:
    return line.num_tokens - line.prompt_length


def _lot(place: Place, seed: int) -> str:
    """Give a row's number in the draw; the same on every machine and in any order of runs."""
    return content_hash(["replayed row", seed, _line(place).id])
