"""SGLang's request log as JSON (`--log-requests-format json`, level 3 for the content).

    {"timestamp": ..., "event": "request.finished", "rid": ...,
     "obj": {"text": ..., "input_ids": [...], "sampling_params": {...}},
     "out": {"text": ..., "output_ids": [...], "meta_info": {"finish_reason": {...}, ...}}}

Only finished requests are calls; the server's other output in the same file is passed over.
The log has no message list: the prompt stands as one raw user message, empty if only its ids
were logged, and the ids rule; it is marked as rendered, so that no template is put around it. Nor
does the log name a model: see `data.served_model`. Level 2 cuts long values in the middle, levels
0 and 1 leave them out.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from dflash_data.adapters.completion import read_finish_reason, read_usage
from dflash_data.adapters.fields import find, find_object, find_text, record_id, utc_timestamp
from dflash_data.adapters.log_format import Line, LogFormat, per_line
from dflash_data.adapters.messages import read_sampling
from dflash_data.adapters.token_ids import read_token_ids
from dflash_data.drops import Call, DropReason, UnusableError
from dflash_train.records.conversation import Conversation, Turn

SOURCE = "sglang"
FINISHED = "request.finished"
CUT = "..."
KEPT_SIDE = 1024
"""Level 2 keeps this many characters or ids at each end of a value that it cuts."""


def adapt(event: dict[str, Any], place: str) -> list[Call]:
    """Give the call of a finished request, nothing for any other event.

    Args:
        event: One logged object.
        place: Where it stands; identifies the call if the event has no request id.

    Raises:
        UnusableError: The request finished without a usable answer.
    """
    kind = find(event, "event")
    if kind != FINISHED:
        if isinstance(kind, str):
            return []
        raise UnusableError(DropReason.unparsable)
    request = find_object(event, "obj") or {}
    answer = find_object(event, "out") or {}
    meta = find_object(answer, "meta_info") or {}
    finish_reason = _finish_reason(meta)
    prompt, text = _text(request), _text(answer)
    prompt_ids = read_token_ids(find(request, "input_ids"), cut=CUT)
    output_ids = read_token_ids(find(answer, "output_ids"), cut=CUT)
    has_ids = bool(prompt_ids and output_ids)
    if not has_ids and (prompt is None or text is None):
        raise UnusableError(DropReason.content_missing)
    if not text and not output_ids:
        raise UnusableError(DropReason.empty_output)
    source_ref = find_text(event, "rid")
    return [
        Conversation(
            id=record_id(SOURCE, source_ref or place, 0),
            source=SOURCE,
            source_ref=source_ref,
            ts=utc_timestamp(find(event, "timestamp")),
            adapter=find_text(request, "lora_path"),
            messages=[
                Turn(role="user", content=prompt or ""),
                Turn(role="assistant", content=text or ""),
            ],
            sampling=read_sampling(find_object(request, "sampling_params") or {}),
            finish_reason=finish_reason,
            usage=read_usage(meta),
            prompt_token_ids=prompt_ids if has_ids else None,
            output_token_ids=output_ids if has_ids else None,
            served_acceptance_length=_acceptance_length(meta),
            has_rendered_prompt=True,
            on_policy_reason="other_model",
        )
    ]


def _finish_reason(meta: dict[str, Any]) -> str | None:
    reason = find(meta, "finish_reason")
    return read_finish_reason(find(reason, "type") if isinstance(reason, dict) else reason)


def _text(holder: dict[str, Any]) -> str | None:
    """Give the text of a request or an answer; None if the level of the log left it out."""
    text = find(holder, "text")
    if text is not None and not isinstance(text, str):
        raise UnusableError(DropReason.unparsable)
    if text and len(text) == 2 * KEPT_SIDE + len(CUT) and text[KEPT_SIDE:].startswith(CUT):
        raise UnusableError(DropReason.truncated_log)
    return text


def _acceptance_length(meta: dict[str, Any]) -> float | None:
    length = find(meta, "spec_accept_length")
    is_number = isinstance(length, (int, float)) and not isinstance(length, bool)
    return float(length) if is_number else None


_read_objects = per_line(adapt)


def read(lines: Iterable[Line]) -> Iterator[Call]:
    """Give the calls of a log; lines that are no JSON object are the server's other output."""
    return _read_objects(line for line in lines if line.text.startswith(b"{"))


def recognises(line: dict[str, Any]) -> bool:
    """Tell whether a line is an event of the request log."""
    event = line.get("event")
    return isinstance(event, str) and event.startswith("request.") and "rid" in line


FORMAT = LogFormat(name=SOURCE, read=read, recognises=recognises)
