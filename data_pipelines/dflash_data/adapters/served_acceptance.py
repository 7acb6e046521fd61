"""How well a logged answer was drafted for, where the response says so.

vLLM with `--per-request-spec-decode-metrics` and our own `serve` put it beside the choices:

    "metrics": {"speculative_decoding": {"num_spec_steps": 20, "num_accepted_draft_tokens": 31}}
"""

from typing import Any

from dflash_data.adapters.fields import read_count

NAMES = ("num_accepted_draft_tokens", "num_spec_steps")


def read_served_acceptance(response: dict[str, Any]) -> float | None:
    """Give the acceptance length of a response in OpenAI's shape, bonus token included.

    None if the server does not tell, or took no step with drafts.
    """
    metrics = response.get("metrics")
    told = metrics.get("speculative_decoding") if type(metrics) is dict else None
    if type(told) is not dict:
        return None
    accepted, steps = (read_count(told.get(name)) for name in NAMES)
    return 1 + accepted / steps if steps and accepted is not None else None
