import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from dflash_data.collect.stage import collect
from dflash_data.regenerate.answer_log import AnswerLog
from dflash_data.regenerate.stage import regenerate
from dflash_train.config import (
    EndpointApi,
    EndpointsConfig,
    RecipeConfig,
    ServingSampling,
    TargetConfig,
    UnavailableError,
)
from dflash_train.features.sampling import RowSampler
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.conversation import Conversation, Turn, read_split
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.stages import Workshop, run_stage
from dflash_train.testing import ask, assert_close, save_tiny_target, write_conversations

RECORDS = [
    ask("a0", "one"),
    ask("a1", "one", None, "two"),
    ask("a2", "one", None, "two", None, "three"),
    ask("b0", "a longer first message than the others"),
    ask("c0", "short", split="test"),
    ask("c1", "short", None, "and on", split="test"),
]

Fault = Callable[["Handler"], None]


@dataclass
class Server:
    """A server of the tiny target that speaks OpenAI's API, and errs where it is told to."""

    target: Target
    model: str = "tiny"
    """Name in replies."""
    faults: deque[Fault] = field(default_factory=deque)
    """What goes wrong with the next requests, after the probe."""
    always: Fault | None = None
    gives_ids: bool = True
    keeps_stop_token: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all requests but the probe."""
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"app": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Write the reply to one request; the target's own answer to its prompt."""
        prompt = body.get("prompt") or self._render(body["messages"])
        sampling = ServingSampling(temperature=body["temperature"])
        sampler = RowSampler(prompt, sampling, seed=body["seed"])
        with self._lock:
            row = self.target.generate_batch(
                [prompt], max_new_tokens=body["max_tokens"], samplers=[sampler]
            )[0]
        text = str(self.target.tokenizer.decode(row.output_ids, skip_special_tokens=True))
        ids = row.output_ids
        if not self.keeps_stop_token and row.finish_reason == "stop":
            ids = ids[:-1]
        known = {"token_ids": ids, "prompt_token_ids": prompt} if self.gives_ids else {}
        return self.reply(body, text, finish_reason=row.finish_reason, **known)

    def reply(self, body: dict[str, Any], text: str, **choice: Any) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, "finish_reason": "stop"} | choice
        choice |= {"text": text} if "prompt" in body else said
        return {"model": self.model, "choices": [choice], "usage": {"prompt_tokens": 3}}

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self.target.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.target.tokenizer(str(text), add_special_tokens=False).input_ids


class Handler(BaseHTTPRequestHandler):
    app: Server
    body: dict[str, Any]

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "tiny", "max_model_len": 500}]})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.app.always
        if self.body["max_tokens"] > 1:
            self.app.asked.append(self.body)
            fault = self.app.faults.popleft() if self.app.faults else fault
        elif fault is not refuse:  # the probe
            fault = None
        if fault is not None:
            fault(self)
        else:
            self.send_json(self.app.answer(self.body))

    def send_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.send_text(json.dumps(content), status, **headers)

    def send_text(self, text: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def busy(handler: Handler) -> None:
    handler.send_json({}, 429, Retry_After="0.3")


def broken(handler: Handler) -> None:
    handler.send_json({"error": "boom"}, 503)


def dropped(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def garbled(handler: Handler) -> None:
    handler.send_text('{"choices": [')


def shapeless(handler: Handler) -> None:
    handler.send_json({"choices": [{"text": 7, "finish_reason": "stop"}], "model": "tiny"})


def silent(handler: Handler) -> None:
    handler.app.closing.wait()


def refuse(handler: Handler) -> None:
    quoted = {"detail": [{"loc": ["body", "prompt"], "input": handler.body}], "words": "secret one"}
    handler.send_json(quoted, 422)


def says(text: str, **choice: Any) -> Fault:
    return lambda handler: handler.send_json(handler.app.reply(handler.body, text, **choice))


@pytest.fixture
def servers(target: Target) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(**settings: Any) -> Server:
        started.append(Server(target, **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


def served_by(config: RecipeConfig, *servers: Server, name: str = "run", **keys: Any) -> Any:
    """Give the recipe in which these servers answer, with a run folder of its own."""
    settings = {"concurrency": 1, "retry_wait_s": 0.01, "max_retries": 6, "timeout_s": 20.0} | keys
    endpoints = EndpointsConfig(urls=[server.url for server in servers], **settings)
    return replace(config, name=name, data=replace(config.data, endpoints=endpoints))


def run(config: RecipeConfig, target: Target, records: list[Conversation] = RECORDS) -> Manifest:
    write_conversations(config, records)
    manifest = Manifest(stage="regenerate", recipe_hash="sha256:test")
    return regenerate(config, target=target, manifest=manifest)


def answers(config: RecipeConfig) -> dict[str, Conversation]:
    folder = config.run_dir / "regenerated"
    both = [*read_split(folder, "train"), *read_split(folder, "test")]
    return {record.id: record for record in both}


def files(config: RecipeConfig) -> dict[str, str]:
    folder = config.run_dir / "regenerated"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}


def counted(manifest: Manifest) -> tuple[int, int, dict[str, int]]:
    assert manifest.counts is not None
    drops = {reason: number for reason, number in manifest.counts.dropped.items() if number}
    return manifest.counts.read, manifest.counts.kept, drops


def test_servers_give_the_records_that_this_process_gives(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    served = served_by(config, servers(), name="served")
    here, there = run(config, target), run(served, target)
    assert answers(served) == answers(config)
    assert here.counts == there.counts
    assert not (served.run_dir / "regenerated" / "features").exists()
    assert there.details["answered_by"] == "servers"
    assert there.details["without_token_ids"] == 0


def test_turns_of_a_session_are_asked_in_order_with_the_answers_before(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    run(served := served_by(config, servers(), concurrency=4), target)
    third = answers(served)["a2"].messages
    assert third[1] == answers(served)["a0"].messages[1]
    assert third[3] == answers(served)["a1"].messages[3]


def test_failures_and_the_order_of_arrival_leave_no_trace_in_the_files(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    plain = served_by(config, servers(), name="plain")
    run(plain, target)
    faults = deque([broken, garbled, shapeless, dropped, busy, silent])
    troubled = servers(faults=faults)
    tried = served_by(config, troubled, servers(), name="tried", timeout_s=1.5, concurrency=4)
    assert counted(run(tried, target)) == (6, 6, {})
    assert files(tried) == files(plain)


def test_a_busy_servers_own_waiting_time_is_kept(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers(faults=deque([busy]))
    began = time.monotonic()
    run(served_by(config, server), target, [ask("a0", "one")])
    assert time.monotonic() - began >= 0.3
    assert len(server.asked) == 2


def test_a_server_that_keeps_failing_is_set_aside_and_named(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing, working = servers(always=broken), servers()
    manifest = run(served_by(config, failing, working), target)
    assert counted(manifest) == (6, 6, {})
    assert f"{failing.url} is set aside (HTTP status 503)" in capsys.readouterr().err
    assert len(failing.asked) == 3


def test_a_server_that_is_down_from_the_start_is_set_aside(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone, working = servers(), servers()
    gone.close()
    assert counted(run(served_by(config, gone, working), target)) == (6, 6, {})
    assert f"{gone.url} is set aside (ConnectError)" in capsys.readouterr().err


def test_the_least_busy_server_is_asked_first(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    done = threading.Event()

    def wait(handler: Handler) -> None:
        assert done.wait(20)
        handler.send_json(handler.app.answer(handler.body))

    def last(handler: Handler) -> None:
        handler.send_json(handler.app.answer(handler.body))
        done.set()

    def plain(handler: Handler) -> None:
        handler.send_json(handler.app.answer(handler.body))

    slow, quick = servers(faults=deque([wait])), servers(faults=deque([plain] * 3 + [last]))
    records = [ask(f"{name}0", f"question {name}") for name in "abcde"]
    run(served_by(config, slow, quick, concurrency=2), target, records)
    assert (len(slow.asked), len(quick.asked)) == (1, 4)


def test_a_run_whose_servers_died_goes_on_where_it_stopped(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    undisturbed = served_by(config, servers(), name="undisturbed")
    run(undisturbed, target)
    dying = servers()
    dying.faults.extend([lambda handler: handler.send_json(handler.app.answer(handler.body))] * 3)
    dying.always = broken
    stopped = served_by(config, dying, max_retries=1)
    with pytest.raises(UnavailableError, match=r"no server of data\.endpoints\.urls .* status 503"):
        run(stopped, target)
    logs = sorted((stopped.run_dir / "regenerated" / "answers").iterdir())
    assert sum(len(log.read_bytes().splitlines()) for log in logs) == 3
    logs[0].write_bytes(logs[0].read_bytes()[:-5])  # a kill in the midst of a line
    revived = servers()
    run(served_by(config, revived), target)
    assert len(revived.asked) == 4
    assert files(stopped) == files(undisturbed)


def test_a_finished_log_is_enough_to_write_the_files_again(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers()
    run(served := served_by(config, server), target)
    before = files(served)
    (served.run_dir / "regenerated" / "train-00000.jsonl.gz").unlink()
    server.close()
    run(served, target)
    assert files(served) == before


def test_a_sampled_answer_depends_on_recipe_seed_and_record_alone(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    config.data.serving_sampling = ServingSampling(temperature=1.0)
    records = [ask(f"{name}0", "the same question") for name in "abc"]
    first = served_by(config, servers(), name="first", concurrency=3)
    second = served_by(config, servers(), name="second")
    third = replace(served_by(config, servers(), name="third"), seed=7)
    for each in (first, second, third):
        run(each, target, records)
    said = [[record.output_token_ids for record in answers(e).values()] for e in (first, second)]
    assert said[0] == said[1]
    assert len({tuple(ids or []) for ids in said[0]}) == 3
    assert [record.output_token_ids for record in answers(third).values()] != said[0]


def test_a_sessions_history_holds_its_own_answer_and_no_other_sessions(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    config.data.serving_sampling = ServingSampling(temperature=1.0)
    records = [
        ask(f"{name}{turn}", *["same", None][: 2 * turn], *["more"] * turn or ["same"])
        for name in "ab"
        for turn in (0, 1)
    ]
    run(served := served_by(config, servers()), target, records)
    found = answers(served)
    assert found["a0"].messages[1] != found["b0"].messages[1]
    for name in "ab":
        assert found[f"{name}1"].messages[1] == found[f"{name}0"].messages[1]


def test_a_server_without_token_ids_gives_text_alone(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    manifest = run(served := served_by(config, servers(gives_ids=False)), target)
    assert manifest.details["without_token_ids"] == 6
    for record in answers(served).values():
        assert record.prompt_token_ids is record.output_token_ids is None
        assert record.answer is not None
        assert record.answer.content


@pytest.mark.parametrize("gives_ids", [True, False])
def test_collect_reads_what_servers_have_answered(
    config: RecipeConfig, target: Target, servers: Callable[..., Server], gives_ids: bool
) -> None:
    faults = deque([says(text) for text in ("first", "second", "third")])
    server = servers(gives_ids=gives_ids, faults=deque() if gives_ids else faults)
    served = served_by(config, server)
    records = [ask(f"{name}0", f"question {name}") for name in "abc"]
    run(served, target, records)
    manifest = Manifest(stage="collect", recipe_hash="sha256:test")
    assert counted(collect(served, load_target=lambda: target, manifest=manifest)) == (3, 3, {})
    store = FeatureStore.open(served.run_dir / "features" / "train")
    found = answers(served)
    for row in (store[place] for place in range(len(store))):
        record = found[row.id]
        written = row.input_ids[row.loss_mask].tolist()
        if gives_ids:
            assert written == record.output_token_ids
        else:
            assert record.answer is not None
            assert written == [*target.tokenizer(record.answer.content or "").input_ids, 2]
        want = target.features_of([row.input_ids.tolist()])[0]
        assert_close(row.id, row.features.float(), want, 5e-3)


@pytest.mark.parametrize("keeps_stop_token", [True, False])
def test_ids_end_with_the_stop_token_or_are_not_kept(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    keeps_stop_token: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = [ask(f"{name}0", f"question {name}") for name in "abcd"]
    run(config, target, prompt)
    written = [answers(config)[record.id].output_token_ids or [] for record in prompt]
    monkeypatch.setattr(target, "stop_token_ids", frozenset([written[0][4]]))
    server = servers(keeps_stop_token=keeps_stop_token)
    run(served := served_by(config, server, name="served"), target, prompt)
    stopped = {i: r for i, r in answers(served).items() if r.finish_reason == "stop"}
    assert "a0" in stopped
    for record in stopped.values():
        ids = record.output_token_ids
        assert (ids is not None and ids[-1] in target.stop_token_ids) == keeps_stop_token
    cut = [r for r in answers(served).values() if r.finish_reason == "length"]
    assert all(len(record.output_token_ids or []) == 12 for record in cut)


def test_answers_that_cannot_be_kept_are_counted_and_so_are_the_turns_on_top(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    names = "bcdefg"
    records = [ask("a0", "one"), ask("a1", "one", None, "two")]
    records += [ask(f"{name}0", f"question {name}") for name in names]
    faults = [
        says(""),  # a0, so a1 has no history
        says("odd", finish_reason="abort"),
        says("x", finish_reason="content_filter"),
        says("other words", token_ids=[70, 71, 2]),
        says("x", token_ids=[9999, 2]),
        refuse,
    ]
    manifest = run(served_by(config, servers(faults=deque(faults))), target, records)
    assert counted(manifest) == (8, 1, {
        "empty_output": 1, "content_missing": 1, "not_success": 2, "content_filter": 1,
        "ids_mismatch": 2,
    })  # fmt: skip


def test_one_reason_that_drops_too_much_stops_the_run(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    served = served_by(config, servers(always=says("odd", token_ids=[70, 2])))
    with pytest.raises(ValueError, match=r"unusable as ids_mismatch.*data\.max_drop_share"):
        run(served, target, [ask(f"{name}0", f"question {name}") for name in "abc"])


def test_private_words_of_an_answer_reach_no_file(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    key, mail = "AKIAQ7RZ4M2WXK5TB3NC", "ida.holm@example.com"
    ids = [*target.tokenizer(f"Write to {mail} now.").input_ids, 2]
    faults = [
        says(f"The key is {key} today."),
        says(f"Write to {mail} now.", token_ids=ids),
    ]
    records = [ask(f"{name}0", f"question {name}") for name in "abc"]
    records.append(ask("b1", "question b", None, "and then?"))
    served = served_by(config, servers(faults=deque(faults)))
    manifest = run(served, target, records)
    assert counted(manifest) == (4, 3, {"secret_in_answer": 1})
    assert manifest.details["redacted_in_answers"] == {"EMAIL": 1}
    record = answers(served)["b0"]
    assert record.messages[-1].content == "Write to EMAIL_1 now."
    assert record.privacy.spans == [(1, 9, 16, "EMAIL")]
    assert record.output_token_ids is None
    later = answers(served)["b1"]
    assert later.messages[1] == record.messages[1]
    assert later.privacy.spans == record.privacy.spans
    for path in served.run_dir.rglob("*"):
        assert path.is_dir() or path.suffix == ".gz" or mail.encode() not in path.read_bytes()
    assert key not in str(answers(served))


def test_chat_sends_messages_and_keeps_the_ids_that_come_back(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    call = {"id": "t1", "name": "look", "arguments": "{}"}
    turns = [
        Turn(role="user", content="look it up"),
        Turn(role="assistant", tool_calls=[call]),
        Turn(role="tool", tool_call_id="t1", content="found"),
    ]
    records = [*RECORDS, structs.replace(ask("d0"), messages=turns)]
    server = servers()
    served = served_by(config, server, api=EndpointApi.chat)
    assert counted(run(served, target, records)) == (7, 7, {})
    asked = next(body["messages"] for body in server.asked if len(body["messages"]) == 3
                 and body["messages"][2]["role"] == "tool")  # fmt: skip
    assert asked[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}
    run(here := replace(config, name="here"), target)
    for record_id, record in answers(here).items():
        assert answers(served)[record_id].output_token_ids == record.output_token_ids


def test_settings_are_sent_even_where_they_change_nothing(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    server = servers()
    run(served_by(config, server), target, [ask("a0", "one")])
    body = server.asked[0]
    assert (
        body["prompt"]
        == target.tokenizer(
            "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).input_ids
    )
    settings = {key: body[key] for key in body if key not in ("prompt", "seed")}
    assert settings == {
        "model": "tiny", "max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [2], "return_token_ids": True,
    }  # fmt: skip


def test_a_refused_request_names_our_fields_and_quotes_nothing(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    with pytest.raises(ValueError, match=r"status 422; its reply names prompt\.") as caught:
        run(served_by(config, servers(always=refuse)), target)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("server", "keys", "message"),
    [
        ({"model": "other"}, {}, r"model \(=tiny\) was asked, and another one answered"),
        ({}, {"model": "large"}, r"model \(=large\) is not served by .*, which serves tiny"),
        ({}, {"api_key_env": "NO_SUCH_KEY"}, r"api_key_env \(=NO_SUCH_KEY\) is not set"),
    ],
)
def test_servers_that_do_not_fit_are_refused(
    config: RecipeConfig,
    target: Target,
    servers: Callable[..., Server],
    server: dict[str, Any],
    keys: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(served_by(config, servers(**server), **keys), target)


def test_a_prompt_beyond_the_servers_limit_is_counted(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    records = [ask("a0", "one"), ask("b0", "two"), ask("c0", "x" * 470)]
    server = servers()
    manifest = run(served_by(config, server), target, records)
    assert counted(manifest) == (3, 2, {"too_long": 1})
    assert len(server.asked) == 2


def test_another_address_leaves_the_stage_complete_and_another_engine_does_not(
    config: RecipeConfig, servers: Callable[..., Server], target: Target, tmp_path: Path
) -> None:
    folder = save_tiny_target(tmp_path / "target")
    config.target = TargetConfig(name_or_path=str(folder))
    write_conversations(config, RECORDS)
    Manifest(stage="ingest", recipe_hash="sha256:test").write(config.run_dir / "conversations")
    moved = servers()
    assert run_stage(Workshop(served_by(config, servers())), "regenerate")
    assert not run_stage(Workshop(served_by(config, moved)), "regenerate")
    assert not moved.asked
    sampled = served_by(config, moved)
    sampled.data.serving_sampling = ServingSampling(temperature=1.0)
    assert run_stage(Workshop(sampled), "regenerate")
    assert moved.asked
    assert run_stage(Workshop(config), "regenerate")
    assert (config.run_dir / "regenerated" / "features").exists()


@pytest.mark.parametrize("url", ["localhost:8000", "http://user:word@host/v1"])
def test_addresses_are_checked_and_a_login_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"data\.endpoints\.urls \(=") as caught:
        EndpointsConfig(urls=[url])
    assert "word@" not in str(caught.value)


def test_the_log_gives_back_whole_lines_of_the_same_prompt_only(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.jsonl"
    log = AnswerLog(path)
    log.add("a", [1], ask("a", "one", "two"))
    log.close()
    path.open("ab").write(b'not json\n{"id": "b", "pro')
    log = AnswerLog(path)
    assert log.find("a", [1]) == ask("a", "one", "two")
    assert log.find("a", [2]) is None
    assert log.find("b", [1]) is None
    log.close()
    log.put_in_order(["a"])
    assert len(path.read_bytes().splitlines()) == 1
