"""SIGINT and SIGTERM as a wish: finish the step, save the train state, then stop."""

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes SIGINT and SIGTERM during a `with` block.

    Only a second Ctrl-C acts as usual. A scheduler and the launcher below it both send SIGTERM, so
    the same wish comes twice and must not cut the saving short; so does SIGINT under a launcher,
    which hands on what the terminal has sent to all processes already.

    Works in the main thread only, as all signal handlers do.
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.is_made = False

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number in _SIGNALS:
            self._restore(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.is_made = True
        is_launched = "LOCAL_RANK" in os.environ
        if number == signal.SIGINT and not is_launched:
            self._restore(signal.SIGINT)

    def _restore(self, number: signal.Signals) -> None:
        signal.signal(number, self._previous[number])
