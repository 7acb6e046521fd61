"""The log of served calls, in the format `openai` of `ingest`, with exact token ids.

One JSON line for each accepted request, written when it has ended, in one piece; a request that did
not end by itself says so in `status`. How well it was drafted for stands in the response under
vLLM's names, for `dflash-train drift`; steps without drafts are not counted, as there. The file is
readable by its owner only: it holds what people wrote.
"""

import os
from pathlib import Path
from typing import Any

import orjson

from dflash_inference.endpoint.answers import Answer
from dflash_inference.trace import StepTrace

COMPLETED = ("stop", "length")
"""Finish reasons of answers that the target has ended."""


class RequestLog:
    """Appends one line per call."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending; it is made if it does not exist.

        A line that a crash cut off is ended, so that it spoils no other.

        Raises:
            OSError: It cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(
        self,
        answer: Answer,
        steps: list[StepTrace],
        *,
        revision: str,
        began: float,
        ended: float,
        session: str | None,
    ) -> None:
        """Append a call.

        Args:
            answer: The finished answer; its ask holds the request.
            steps: That led to it.
            revision: Which weights answered.
            began: Arrival of the request, seconds since 1970.
            ended: End of the answer, seconds since 1970.
            session: Conversation that the client says it belongs to.
        """
        line: dict[str, Any] = {
            "id": answer.id,
            "created": began,
            "ended": ended,
            "model_revision": revision,
            "request": answer.ask.logged,
            "response": answer.whole(with_token_ids=True)
            | {"metrics": {"speculative_decoding": _acceptance(steps)}},
        }
        if session is not None:
            line["session_id"] = session
        if answer.finish_reason not in COMPLETED:
            line["status"] = answer.finish_reason
        os.write(self._file, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Close the file; every line is there already."""
        os.close(self._file)


def _acceptance(steps: list[StepTrace]) -> dict[str, int]:
    drafted = [step for step in steps if step.width > 1]
    return {
        "num_spec_steps": len(drafted),
        "num_draft_tokens": sum(step.width - 1 for step in drafted),
        "num_accepted_draft_tokens": sum(step.num_accepted for step in drafted),
    }
