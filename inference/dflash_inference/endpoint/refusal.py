"""How a request is refused: OpenAI's error object, with field, value and remedy in its message."""

from typing import Any

import orjson

_MOST_SHOWN = 60
"""Characters of a value that a message repeats."""


class RefusedError(Exception):
    """A request that gets an error object instead of an answer."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            message: Field, value and remedy.
            param: The field, as the client wrote it.
            status: Of the reply.
            kind: OpenAI's `type`.
            code: OpenAI's `code`.
        """
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: Any) -> str:
    """Give a value as a message repeats it to the client who sent it."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
