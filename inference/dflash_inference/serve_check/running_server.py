"""A server that runs already, at an address: vLLM's OpenAI API or SGLang's own.

vLLM is asked for completions of token ids at `/v1/completions`. Its counts come from the reply
where it was started with `--per-request-spec-decode-metrics detailed`, which tells every step, else
as the difference of `/metrics` before and after: so nobody else may use the server meanwhile.
SGLang is asked at `/generate`, whose reply counts verify passes. Replies may quote the prompt, so
nothing of them enters a message.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx2
import orjson

from dflash_inference.serve_check.comparison import DraftCounts, ServedAnswer
from dflash_inference.serve_check.prompts import Prompt
from dflash_train.config import UnavailableError

TIMEOUT_S = 600.0
"""Patience with one request, in seconds: a large target on a CPU is slow."""
_COUNTER = re.compile(
    r"^vllm:spec_decode_(?P<name>\w+?)(?:_total)?(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$",
    re.MULTILINE,
)
_POSITION = re.compile(r'position="(\d+)"')


class Api(Enum):
    """Which server it is."""

    vllm = "vllm"
    sglang = "sglang"


@dataclass(kw_only=True)
class RunningServer:
    """A server and how to ask it."""

    url: str
    """Its root, such as http://127.0.0.1:8000."""
    api: Api = Api.vllm
    model: str | None = None
    """Name that vLLM serves the target by; None takes the first that it lists."""
    max_new_tokens: int
    stop_token_ids: list[int]

    def answer(self, prompts: list[Prompt]) -> list[ServedAnswer]:
        """Ask for all prompts, one at a time.

        Raises:
            UnavailableError: The server does not answer, or not in the form of its API.
        """
        root = self.url.rstrip("/").removesuffix("/v1")
        with httpx2.Client(base_url=root, timeout=TIMEOUT_S) as client:
            try:
                if self.api is Api.sglang:
                    return [self._ask_sglang(client, prompt) for prompt in prompts]
                model = self.model or _get(client, "/v1/models")["data"][0]["id"]
                return [self._ask_vllm(client, prompt, model) for prompt in prompts]
            except httpx2.HTTPStatusError as error:
                raise UnavailableError(
                    f"url (={self.url}) answers {error.request.url.path} with HTTP status "
                    f"{error.response.status_code}. Is it {self.api.value}? api= says so."
                ) from None  # the reply may quote the prompt
            except httpx2.HTTPError as error:
                raise UnavailableError(
                    f"url (={self.url}) cannot be reached ({type(error).__name__}). Start the "
                    "server first."
                ) from error
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UnavailableError(
                    f"url (={self.url}) gives a reply that is not of {self.api.value}'s form "
                    f"({type(error).__name__}). A vLLM must know return_token_ids (0.10 or newer)."
                ) from None

    def _ask_vllm(self, client: httpx2.Client, prompt: Prompt, model: str) -> ServedAnswer:
        before = _counters(client)
        reply = _post(client, "/v1/completions", {
            "model": model,
            "prompt": prompt.token_ids,
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0,
            "stop_token_ids": self.stop_token_ids,
            "return_token_ids": True,
        })  # fmt: skip
        after, choice = _counters(client), reply["choices"][0]
        steps = ((reply.get("metrics") or {}).get("speculative_decoding")) or {}
        return ServedAnswer(
            id=prompt.id,
            output_ids=list(choice["token_ids"]),
            finish_reason=choice["finish_reason"],
            accepted=steps.get("per_step_accepted"),
            counts=_difference(after, before) if after else None,
        )

    def _ask_sglang(self, client: httpx2.Client, prompt: Prompt) -> ServedAnswer:
        reply = _post(client, "/generate", {
            "input_ids": prompt.token_ids,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": self.max_new_tokens,
                "stop_token_ids": self.stop_token_ids,
            },
        })  # fmt: skip
        told = reply["meta_info"]
        num_drafts = told.get("spec_verify_ct")
        return ServedAnswer(
            id=prompt.id,
            output_ids=list(reply["output_ids"]),
            finish_reason=told["finish_reason"]["type"],
            # Prefill writes one token, each verify pass one more than the drafts that it keeps.
            counts=None if num_drafts is None else DraftCounts(
                num_drafts=num_drafts,
                num_accepted=told["completion_tokens"] - 1 - num_drafts,
            ),
        )  # fmt: skip


def _get(client: httpx2.Client, path: str) -> dict[str, Any]:
    return orjson.loads(client.get(path).raise_for_status().content)


def _post(client: httpx2.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return orjson.loads(client.post(path, json=body).raise_for_status().content)


def _counters(client: httpx2.Client) -> dict[str, dict[int, int]]:
    """Read the counters of speculation by name and position, 0 where a counter has none.

    Those of several engines of one server are summed. Empty where nothing is counted.
    """
    text = client.get("/metrics").raise_for_status().text
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for match in _COUNTER.finditer(text):
        if match["name"].endswith("_created"):
            continue  # when the counter was made, in seconds since 1970
        position = _POSITION.search(match["labels"] or "")
        found[match["name"]][int(position[1]) if position else 0] += int(float(match["value"]))
    return found


def _difference(after: dict[str, dict[int, int]], before: dict[str, dict[int, int]]) -> DraftCounts:
    def grown(name: str, position: int = 0) -> int:
        return after[name].get(position, 0) - before[name].get(position, 0)

    by_position = "num_accepted_tokens_per_pos"
    num_positions = max(after[by_position], default=-1) + 1
    return DraftCounts(
        num_drafts=grown("num_drafts"),
        num_accepted=grown("num_accepted_tokens"),
        accepted_at=[grown(by_position, place) for place in range(num_positions)],
    )
