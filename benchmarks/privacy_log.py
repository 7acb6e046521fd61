"""The labelled private values as request logs of ten formats, broken lines among them.

Texts of `tests/test_data/privacy_corpus.py` stand in questions, system prompts, earlier answers,
answers, and, in formats that keep messages as they are, in tool calls and their results. Every
text is a message or JSON string of its own, so what the detectors say of it alone holds here, too.
Each call is a session, so none is divided by the splits. Every fortieth line of a format of one
JSON object a line stands there again, broken: cut, of another encoding, of another type; and one
gzip file stands there twice, the second time without its second half.

Each format has one word that is in no way private: it must come through, or nothing was searched.
"""

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks.ingest_corpus import FIRST_MOMENT, FORMATS, NUM_DAYS, LoggedCall
from dflash_data.logs.compression import zstd
from tests.test_data.privacy_corpus import Sample

CALL_TEXTS = 4
"""Corpus texts in one call; one where it stands in the answer, which it may cost."""
ANSWER_SHARE, TOOL_SHARE = 0.08, 0.2
VERBATIM = ("openai", "litellm", "helicone", "weave")
"""Formats that pass tool calls on as they are in the request."""
JOINED = ("openai_batch", "vllm")
"""Formats of several lines a call: a broken one would take a sound call with it."""
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content, 1),
    ".zst": zstd.compress,
}
SUFFIXES = {"litellm": ".jsonl.gz", "langfuse": ".jsonl.zst", "vllm": ".log"}
BROKEN_EVERY = 40
CUT_LOG = "litellm.jsonl.gz"
Messages = list[dict[str, Any]]


def write_logs(folder: Path, samples: list[Sample], *, seed: int) -> dict[str, str]:
    """Write the logs and give the word of each format that must come through.

    Args:
        folder: Gets one folder for each format.
        samples: What the calls say.
        seed: Of who says what, and where.
    """
    dice = random.Random(seed)
    logs: dict[str, list[bytes]] = defaultdict(list)
    calls = list(_calls(samples, dice))
    marked = {f: "sunflower " + "".join(dice.choices("bcdfgklmnprst", k=12)) for f in FORMATS}
    calls += [(name, [_says("user", word)], "Well.") for name, word in marked.items()]
    for number, (name, messages, answer) in enumerate(calls):
        call = _logged(number, len(calls), messages, answer)
        for log, lines in FORMATS[name]([call]):
            logs[log] += lines
    for log, lines in logs.items():
        if log.partition("/")[0] not in JOINED:
            lines = list(_with_broken(lines, dice))
        path = folder / f"{log}{SUFFIXES.get(log, '.jsonl')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKED.get(path.suffix, bytes)(b"".join(line + b"\n" for line in lines)))
    whole = (folder / CUT_LOG).read_bytes()
    (folder / f"cut-{CUT_LOG}").write_bytes(whole[: len(whole) // 2])
    return marked


def _calls(samples: list[Sample], dice: random.Random) -> Iterator[tuple[str, Messages, str]]:
    """Yield format, messages and answer of one call after another."""
    texts = [sample.text for sample in samples]
    dice.shuffle(texts)
    while texts:
        name = dice.choice(list(FORMATS))
        if dice.random() < ANSWER_SHARE:
            yield name, [_says("user", "Repeat it.")], texts.pop()
            continue
        said = [texts.pop() for _ in range(min(CALL_TEXTS, len(texts)))]
        if name in VERBATIM and dice.random() < TOOL_SHARE:
            yield name, _with_tools(said), "It is done."
        else:
            yield name, _in_turns(said, dice), "Noted."


def _in_turns(said: list[str], dice: random.Random) -> Messages:
    """Put texts into questions, the first perhaps into the system prompt, some into answers."""
    messages = [_says("system", said.pop())] if len(said) > 1 and dice.random() < 0.3 else []
    while said:
        messages.append(_says("user", said.pop()))
        if said:
            is_answer = len(said) > 1 and dice.random() < 0.3
            messages.append(_says("assistant", said.pop() if is_answer else "Go on."))
    return messages


def _with_tools(said: list[str]) -> Messages:
    """Put texts into a question, a tool call's arguments and the tool's results."""
    asked, *others = said
    messages = [_says("user", asked)]
    for number, text in enumerate(others):
        function = {"name": "note", "arguments": json.dumps({"note": text})}
        called = {"id": f"c{number}", "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [called]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": text},
        ]
    return [*messages, _says("user", "And now?")]


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _logged(number: int, num_calls: int, messages: Messages, answer: str) -> LoggedCall:
    return LoggedCall(
        number=number,
        session=f"session-{number:x}",
        tenant=f"tenant-{number % 40}",
        moment=FIRST_MOMENT + 86_400 * NUM_DAYS * number / num_calls,
        # Formats that read the texts of messages themselves get texts only.
        messages=cast(list[dict[str, str]], messages),
        answer=answer,
    )


def _with_broken(lines: list[bytes], dice: random.Random) -> Iterator[bytes]:
    """Yield the lines, some of them followed by a broken copy."""
    for number, line in enumerate(lines):
        yield line
        if number % BROKEN_EVERY == 0:
            place = dice.randrange(len(line) // 2, len(line))
            yield dice.choice(
                [
                    line[:place],
                    line[:place] + b"\xff" + line[place:],
                    b"[" + line + b"]",
                    line.replace(b'"role":"user"', b'"role":17'),
                    line.replace(b'"content":"', b'"content":["', 1),
                    line.replace(b":", b":" + b"[" * 900, 1),
                ]
            )
