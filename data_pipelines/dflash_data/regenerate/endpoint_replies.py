"""What a server with OpenAI's API says: which model it serves, whether a request went well.

Replies may quote the prompt, so nothing of them ever enters a message but names of our own fields.
"""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import orjson

from dflash_train.config import EndpointsConfig, require

BUSY = 429
_TIMED_OUT, _NO_KEY, _NOT_FOUND = 408, (401, 403), 404
_BLAME = re.compile(r"""['"](?:loc|param)['"]: *[\[("']+(?:body['"], *['"])?(\w+)""")
"""Where servers name the field of a request that they do not like; the rest may quote it."""


class GarbledReplyError(Exception):
    """A reply has not the form that the API promises."""


class RefusedError(Exception):
    """A server will not answer this request, however often it is asked."""

    def __init__(self, url: str, status: int, named: list[str]) -> None:
        names = f"; its reply names {', '.join(named)}" if named else ""
        super().__init__(f"{url} refuses a request with HTTP status {status}{names}")


@dataclass(kw_only=True)
class ServedModel:
    """What the servers say of the model they serve."""

    name: str
    max_tokens: int | None = None
    """Longest prompt and answer together; None where no server tells."""


def served_model(response: httpx2.Response, url: str, config: EndpointsConfig) -> ServedModel:
    """Read the reply to `GET /models`; a server without that page serves what it is asked for.

    Raises:
        ValueError: It wants a key, or does not serve the model of the recipe.
        GarbledReplyError: It is not the API's list.
    """
    require(
        response.status_code not in _NO_KEY,
        f"data.endpoints.api_key_env (={config.api_key_env}): {url} wants a key (HTTP status "
        f"{response.status_code}). Name the environment variable that holds it.",
    )
    if response.status_code == _NOT_FOUND:
        return _choose_model([], config.model, url)
    check_status(response, url, {})
    listed = json_object(response).get("data")
    if not isinstance(listed, list) or not all(isinstance(m, dict) and "id" in m for m in listed):
        raise GarbledReplyError
    return _choose_model(listed, config.model, url)


def common_model(models: list[ServedModel]) -> ServedModel:
    """Give the one model of several servers, with the tightest limit of them.

    Raises:
        ValueError: They serve different ones.
    """
    names = sorted({model.name for model in models})
    require(
        len(names) == 1,
        f"data.endpoints.urls serve different models: {', '.join(names)}. Name the target in "
        "data.endpoints.model, and servers that all know it.",
    )
    limits = [model.max_tokens for model in models if model.max_tokens is not None]
    return ServedModel(name=names[0], max_tokens=min(limits, default=None))


def check_status(response: httpx2.Response, url: str, request: dict[str, Any]) -> None:
    """Raise for anything but success: RefusedError where repeating is no use."""
    status = response.status_code
    if status in (BUSY, _TIMED_OUT) or response.is_server_error:
        response.raise_for_status()
    if not response.is_success:
        blamed = " ".join(_BLAME.findall(response.text))
        raise RefusedError(url, status, [name for name in request if name in blamed.split()])


def json_object(response: httpx2.Response) -> dict[str, Any]:
    """Parse a reply, or raise GarbledReplyError."""
    try:
        content = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        raise GarbledReplyError from None  # the cause would quote the reply
    if not isinstance(content, dict):
        raise GarbledReplyError
    return content


def retry_after_s(response: httpx2.Response) -> float | None:
    """Read `Retry-After`, in seconds or as a date; None without a readable one."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def authorization(config: EndpointsConfig) -> dict[str, str]:
    """Give the header that carries the key, if the recipe names one.

    Raises:
        ValueError: The environment variable is not set.
    """
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env, "")
    require(
        bool(key),
        f"data.endpoints.api_key_env (={config.api_key_env}) is not set. Put the key into that "
        "environment variable.",
    )
    return {"Authorization": f"Bearer {key}"}


def _choose_model(listed: list[dict[str, Any]], asked: str | None, url: str) -> ServedModel:
    """Find the target among the models of a server; an empty list is a server that lists none."""
    names = [str(model["id"]) for model in listed]
    if asked is None:
        require(
            len(names) == 1,
            f"data.endpoints.model (=null) must name the target, since {url} serves "
            f"{', '.join(names) or 'unknown models'}.",
        )
    require(
        asked is None or not names or asked in names,
        f"data.endpoints.model (={asked}) is not served by {url}, which serves "
        f"{', '.join(names)}. Name one of those, or another server.",
    )
    for model in listed:
        if asked in (None, model["id"]):
            limit = model.get("max_model_len")  # vLLM and SGLang tell it
            return ServedModel(
                name=str(model["id"]), max_tokens=limit if isinstance(limit, int) else None
            )
    assert asked is not None
    return ServedModel(name=asked)
