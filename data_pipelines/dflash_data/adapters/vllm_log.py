"""vLLM's request log: text lines, several for each request, joined on the request id.

    INFO  Received request chatcmpl-c3: params: SamplingParams(n=1, ...), lora_request: None.
    DEBUG Request chatcmpl-c3 details: prompt: '...', prompt_token_ids: [1, 4093], ...
    DEBUG Request chatcmpl-c3 JSON body: {"model": ..., "messages": [...]}
    DEBUG Generated response chatcmpl-c3 details: output_token_ids: [33, 347]
    INFO  Generated response chatcmpl-c3: output: '...', finish_reason: stop

Up to 0.12 the first and the last line held the prompt, the answer and all ids. Whatever stands
before the message (time, process, colours) is passed over, and so is any other line. The body
line has the bare id, the others `chatcmpl-` before it. vLLM's own prefix has no year, so `ts`
is known only where something else put a full time before the line.

Open requests alone are held: a request goes out when its only choice and the ids of that have
come, in either order. Where the log has no ids or several choices, nothing says which line is the
last: such a request goes out a few answers after its own, one that never ends when too many are
open.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from dflash_data.adapters.fields import utc_timestamp
from dflash_data.adapters.log_cut import LogCut
from dflash_data.adapters.log_format import Line, LogFormat
from dflash_data.adapters.vllm_request import VllmRequest, add_message
from dflash_data.drops import Call, Drop, DropReason, UnusableError

MESSAGE = re.compile(
    rb"(?P<verb>Received request|Request|Generated response) (?P<id>\S+)"
    rb"(?: \(streaming (?P<stream>delta|complete)\))?(?P<detail> details| JSON body)?: "
)
ENDED = re.compile(rb"(?:Request (\S+) (?:aborted|failed)|Aborted request (\S+?)\.)")
PREFIX_BYTES = 400
"""The message starts within this many bytes, or the line is none of these."""
FULL_TIME = re.compile(
    rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?(?![\d:])"
)
VLLM_PREFIX = re.compile(rb"(?:DEBUG|INFO|WARNING|ERROR)\S* \S*\d\d-\d\d \d\d:\d\d:\d\d")
ID_PREFIXES = ("chatcmpl-", "cmpl-")
MAX_OPEN = 4096
"""Requests without an answer that are held; more than vLLM runs and queues in practice."""
MAX_ANSWERED = 64
"""Answered requests that wait for a line that is still to come."""
MAX_SUSPECTS = 16
"""Requests that wait until the log shows whether their longest text was cut."""


def read(lines: Iterable[Line]) -> Iterator[Call]:
    """Give one call for each request of the log, and a drop for each further choice."""
    requests = _Requests()
    for line in lines:
        found = MESSAGE.search(line.text, 0, PREFIX_BYTES)
        if found is None:
            requests.note(line.text)
        else:
            yield from requests.add(found, line)
    yield from requests.rest()


class _Requests:
    """The requests that are open, answered, or suspected to be cut."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, VllmRequest] = OrderedDict()
        self.answered: OrderedDict[str, VllmRequest] = OrderedDict()
        self.suspects: list[VllmRequest] = []
        self.cut = LogCut()

    def note(self, text: bytes) -> None:
        """Take what other lines tell: the configured limit, and requests that were aborted."""
        self.cut.learn_from(text)
        ended = ENDED.search(text, 0, PREFIX_BYTES)
        request = self.open.get(_join_key(ended[1] or ended[2])) if ended else None
        if request is not None:
            request.unusable = DropReason.not_success

    def add(self, found: re.Match[bytes], line: Line) -> list[Call]:
        """Add one line to its request; give what is complete by now."""
        verb, request_id, stream, detail = found.groups()
        if stream == b"delta":
            return []
        key = _join_key(request_id)
        request = self.open.get(key)
        holder = self.open
        if request is None and (request := self.answered.get(key)) is not None:
            holder = self.answered
        elif request is None:
            request = VllmRequest(key=key, ts=_time(line.text, found.start()))
            self.open[key] = request
        text = memoryview(line.text)[found.end() :]
        kind = detail if verb == b"Request" else verb
        add_message(request, kind, text, self.cut)
        if request.output is not None:
            if request.is_complete:
                del holder[key]
                return self._finish(request)
            if holder is self.open:
                self.answered[key] = self.open.pop(key)
        if len(self.answered) > MAX_ANSWERED:
            return self._finish(self.answered.popitem(last=False)[1])
        if len(self.open) > MAX_OPEN:
            return self._finish(self.open.popitem(last=False)[1])
        return []

    def rest(self) -> Iterator[Call]:
        """Yield what is left at the end of the log."""
        for request in [*self.answered.values(), *self.open.values()]:
            yield from self._finish(request)
        for request in self.suspects:
            yield from _calls(request, self.cut)

    def _finish(self, request: VllmRequest) -> list[Call]:
        if self.cut.is_suspect(request.longest):
            self.suspects.append(request)
            decided, self.suspects = (
                self.suspects[:-MAX_SUSPECTS],
                self.suspects[-MAX_SUSPECTS:],
            )
        else:
            is_decided = bool(self.suspects) and not self.cut.is_suspect(self.suspects[0].longest)
            decided = [*self.suspects, request] if is_decided else [request]
            self.suspects = [] if is_decided else self.suspects
        return [call for one in decided for call in _calls(one, self.cut)]


def _calls(request: VllmRequest, cut: LogCut) -> list[Call]:
    further: list[Call] = [Drop(DropReason.extra_choice)] * request.num_further
    try:
        return [request.conversation(cut), *further]
    except UnusableError as unusable:
        return [Drop(unusable.reason), *further]


def _join_key(request_id: bytes) -> str:
    key = request_id.decode("utf-8", "replace")
    return key.split("-", 1)[1] if key.startswith(ID_PREFIXES) else key


def _time(text: bytes, end: int) -> str | None:
    found = FULL_TIME.search(text, 0, end)
    return utc_timestamp(found[0].decode().replace(",", ".")) if found else None


def recognises_text(line: bytes) -> bool:
    """Tell whether a line is of vLLM's log: a message of a request, or vLLM's own prefix."""
    return bool(MESSAGE.search(line, 0, PREFIX_BYTES) or VLLM_PREFIX.search(line, 0, PREFIX_BYTES))


FORMAT = LogFormat(
    name="vllm_log",
    read=read,
    recognises=lambda line: False,
    recognises_text=recognises_text,
    joins_lines=True,
)
