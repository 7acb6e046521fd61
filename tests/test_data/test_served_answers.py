"""What `regenerate` makes of the answers that servers give."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec import structs

from dflash_data.collect.stage import collect
from dflash_train.config import EndpointApi, RecipeConfig, ServingSampling
from dflash_train.features.store import FeatureStore
from dflash_train.features.target import Target
from dflash_train.records.conversation import Turn
from dflash_train.records.manifest import Manifest
from dflash_train.testing import ask, assert_close
from tests.test_data.answer_server import Server, refuse, says
from tests.test_data.served_run import RECORDS, answers, counted, run, served_by


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


def test_a_prompt_beyond_the_servers_limit_is_counted(
    config: RecipeConfig, target: Target, servers: Callable[..., Server]
) -> None:
    records = [ask("a0", "one"), ask("b0", "two"), ask("c0", "x" * 470)]
    server = servers()
    manifest = run(served_by(config, server), target, records)
    assert counted(manifest) == (3, 2, {"too_long": 1})
    assert len(server.asked) == 2
