"""Logs for the tuning protocol: what two sets of tenants asked, and what the target answered.

A tenant's log holds OpenAI request/response pairs with the target's own answers and token ids, as a
server with `return_token_ids` would have logged them, so that `tune` need not write them again. Who
has no stored answer is asked first: a log without answers goes through `ingest` and `regenerate`,
and the answered records come back as a log.

- `fleet`: the simulated fleet, five tenants.
- `prompts`: `gsm8k` (questions, stored answers) and `oasst` (what people asked Open Assistant: each
  prompter's turn of its message trees, a tree being a session, and single prompts).

The rules stand in docs/protocols/tuning.md.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import orjson
from transformers import PreTrainedTokenizerBase

from dflash_data.ingest.explode import instant
from dflash_data.sample_traffic.fleet import DAY_S, EPOCH, NUM_DAYS, write_sample_traffic
from dflash_data.sample_traffic.tenants import TENANTS
from dflash_data.token_answers import TokenAnswer, read_questions, read_token_answers
from dflash_train.config import require
from dflash_train.records.conversation import SPLITS, Conversation, read_split
from dflash_train.records.manifest import atomic_path

MODEL = "smollm2"
"""The name under which these logs know the target (`data.target_aliases`)."""
QUESTIONS = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
ANSWERS = {
    "train": "gsm8k_smollm2/train-1280.jsonl",
    "test": "gsm8k_smollm2/test-64.jsonl",
}
TREES = "oasst/en_100_tree.jsonl"
PROMPTS = "oasst/prompt_lottery_en_250_text.jsonl"
GSM8K, OASST = "gsm8k", "oasst"
GREEDY = {
    "temperature": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request of a tenant, and the answer if it is known."""

    tenant: str
    session: str
    messages: list[dict[str, Any]]
    created: int | None = None
    """Seconds since 1970; None until `spread_over_time` sets it."""
    answer: TokenAnswer | None = None
    text: str | None = None
    """The answer as text; None where it is not known."""


def write_fleet_log(out: Path, *, num_requests: int, seed: int) -> None:
    """Play the simulated fleet; its log has no answers."""
    write_sample_traffic(out, seed=seed, num_requests=num_requests)


def gsm8k_calls(folder: Path, tokenizer: PreTrainedTokenizerBase, *, budget: int) -> list[Call]:
    """Give a call for each question with a stored answer, a session each.

    Args:
        folder: Holds `gsm8k/` and `gsm8k_smollm2/`.
        tokenizer: The target's; turns ids into the text that a log would hold.
        budget: Most tokens of an answer. A longer one is cut: greedily, the target would have
            written the same ones.
    """
    calls: list[Call] = []
    for file, path in ANSWERS.items():
        questions = read_questions(folder / QUESTIONS[file])
        for index, stored in read_token_answers(folder / path).items():
            answer = _cut(stored, budget)
            calls.append(
                Call(
                    tenant=GSM8K,
                    session=f"{GSM8K}-{file}-{index:04d}",
                    messages=[_message("user", questions[index])],
                    answer=answer,
                    text=str(tokenizer.decode(answer.output_token_ids, skip_special_tokens=True)),
                )
            )
    return calls


def oasst_calls(folder: Path) -> list[Call]:
    """Give an unanswered call for each turn of a prompter, with the path that leads to it."""
    calls: list[Call] = []
    for line in _lines(folder / TREES):
        paths = _prompter_paths(line["prompt"], [])
        session = f"{OASST}-{line['message_tree_id']}"
        calls += [Call(tenant=OASST, session=session, messages=path) for path in paths]
    for number, prompt in enumerate(_lines(folder / PROMPTS)):
        session = f"{OASST}-prompt-{number:03d}"
        calls.append(Call(tenant=OASST, session=session, messages=[_message("user", prompt)]))
    return calls


def spread_over_time(calls: list[Call], *, seed: int) -> list[Call]:
    """Give calls a time in the fleet's 14 days: sessions shuffled, evenly by number of calls.

    These data sets have no times, so their newest window is a random draw of sessions.
    """
    sessions: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        sessions[call.session].append(call)
    names = sorted(sessions)
    Random(f"times {seed}").shuffle(names)
    in_order = [call for name in names for call in sessions[name]]
    step = NUM_DAYS * DAY_S // len(in_order)
    return [replace(call, created=EPOCH + place * step) for place, call in enumerate(in_order)]


def answered_calls(run_dir: Path) -> list[Call]:
    """Give the calls of a run that `regenerate` has answered, with their times and ids.

    A tenant of the fleet is told by its system prompt, since records hold no names; without one it
    is Open Assistant.
    """
    tenants = {tenant.system: tenant.name for tenant in TENANTS}
    calls: list[Call] = []
    for split in SPLITS:
        for record in read_split(run_dir / "regenerated", split):
            opening = record.messages[0]
            tenant = tenants.get(opening.content or "", OASST)
            calls.append(_answered_call(record, tenant))
    return calls


def write_logs(folder: Path, calls: Iterable[Call]) -> dict[str, int]:
    """Write `folder/<tenant>.jsonl` in order of time and give the calls of each tenant."""
    by_tenant: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_tenant[call.tenant].append(call)
    for tenant, some in by_tenant.items():
        write_log(folder / f"{tenant}.jsonl", some)
    return {tenant: len(some) for tenant, some in sorted(by_tenant.items())}


def write_log(path: Path, calls: list[Call]) -> None:
    """Write the calls of a log in order of time; those of one moment keep theirs."""
    in_order = sorted(calls, key=lambda call: call.created or 0)
    with atomic_path(path) as partial:
        lines = (_pair(call, f"{path.stem}-{place}") for place, call in enumerate(in_order))
        partial.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def _answered_call(record: Conversation, tenant: str) -> Call:
    answer, moment = record.answer, instant(record)
    assert answer is not None, "regenerate has written it"
    assert record.finish_reason is not None
    assert moment is not None, "these logs have times"
    stored = TokenAnswer(
        index=record.turn,
        prompt_token_ids=record.prompt_token_ids or [],
        output_token_ids=record.output_token_ids or [],
        finish_reason=record.finish_reason,
    )
    return Call(
        tenant=tenant,
        session=record.session or record.id,
        messages=[turn.as_message() for turn in record.prompt],
        created=int(moment),
        answer=stored,
        text=answer.content,
    )


def _cut(answer: TokenAnswer, budget: int) -> TokenAnswer:
    ids = answer.output_token_ids
    if len(ids) <= budget:
        return answer
    return TokenAnswer(
        index=answer.index,
        prompt_token_ids=answer.prompt_token_ids,
        output_token_ids=ids[:budget],
        finish_reason="length",
    )


def _prompter_paths(message: dict[str, Any], path: list[dict[str, Any]]) -> list[Any]:
    """List the conversations of a message tree that end with a prompter's turn."""
    is_prompter = message["role"] == "prompter"
    here = [*path, _message("user" if is_prompter else "assistant", message["text"])]
    below = [each for reply in message["replies"] for each in _prompter_paths(reply, here)]
    return [here, *below] if is_prompter else below


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _pair(call: Call, name: str) -> dict[str, Any]:
    """Give a log line as an OpenAI-compatible gateway writes it."""
    request = {
        "model": MODEL,
        "messages": call.messages,
        "user": call.tenant,
        "metadata": {"session_id": call.session},
    }
    response = None if call.answer is None else _response(call.answer, call.text)
    return {
        "id": name,
        "created": call.created,
        "request": request | GREEDY,
        "response": response,
    }


def _response(answer: TokenAnswer, text: str | None) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": _message("assistant", text or ""),
        "finish_reason": answer.finish_reason,
        "token_ids": answer.output_token_ids,
    }
    return {"model": MODEL, "prompt_token_ids": answer.prompt_token_ids, "choices": [choice]}


def _lines(path: Path) -> list[Any]:
    require(
        path.is_file(),
        f"--data: {path} is not there. The folder must hold {TREES} and {PROMPTS}, from "
        "https://github.com/LAION-AI/Open-Assistant (model/model_eval/manual/data).",
    )
    return [orjson.loads(line) for line in path.read_bytes().splitlines() if line]
