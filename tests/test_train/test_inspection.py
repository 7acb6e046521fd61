"""The verb `inspect` on a small run folder, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from dflash_train.cli import main
from dflash_train.records.conversation import Conversation, Privacy, Turn, write_shard
from dflash_train.testing import STOP_TOKEN_ID, save_tiny_target, tiny_tokenizer

Inspect = Callable[..., str]


def record(name: str, answer: str | None = "fine", *, split: str = "train") -> Conversation:
    messages = [Turn(role="user", content=f"how is {name}?")]
    if answer is not None:
        messages.append(Turn(role="assistant", content=answer))
    return Conversation(
        id=f"sha256:{name}", source="test", messages=messages, split=split, model="tiny",
        on_policy=True, on_policy_reason="match", finish_reason="stop",
        privacy=Privacy(scrubbed=True),
    )  # fmt: skip


def redacted() -> Conversation:
    spans = [(0, 7, 13, "NAME"), (1, 4, 11, "EMAIL")]
    asked = Turn(role="user", content="how is NAME_1?")
    return replace(
        record("ab1"),
        messages=[asked, Turn(role="assistant", content="ask EMAIL_1 soon")],
        privacy=Privacy(scrubbed=True, redactions={"EMAIL": 1, "NAME": 1}, spans=spans),
    )


def with_ids() -> Conversation:
    tokenizer = tiny_tokenizer()
    output = [*tokenizer("fine", add_special_tokens=False).input_ids, STOP_TOKEN_ID]
    return replace(record("ab2"), prompt_token_ids=[4, 5], output_token_ids=output)


def rendered(name: str, **fields: Any) -> Conversation:
    asked = Turn(role="user", content="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    return replace(
        record(name),
        messages=[asked, *record(name).messages[1:]],
        has_rendered_prompt=True,
        **fields,
    )


def off_policy(name: str) -> Conversation:
    return replace(record(name, "theirs"), on_policy=False, on_policy_reason="other_model")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    conversations = tmp_path / "run" / "conversations"
    answered = replace(record("cd", "ours"), origin="regenerated")
    train = [redacted(), with_ids(), off_policy("cd"), off_policy("ef")]
    write_shard(conversations / "train-00000.jsonl.gz", train)
    theirs = {"on_policy": False, "on_policy_reason": "other_model"}
    write_shard(
        conversations / "validation-00000.jsonl.gz", [rendered("ij"), rendered("kl", **theirs)]
    )
    held_out = [record("gh", "\x1b[2Jfine", split="test")]
    write_shard(conversations / "test-00000.jsonl.gz", held_out)
    write_shard(tmp_path / "run" / "regenerated" / "train-00000.jsonl.gz", [answered])
    return tmp_path / "run"


@pytest.fixture
def inspect(
    run_dir: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Inspect:
    """Run the verb and give what it prints, on stderr if it fails."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "DFLASH_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    recipe = [
        "recipe=smollm2", f"runs_dir={run_dir.parent}", "name=run",
        f"target.name_or_path={target}", "drafter.mask_token_id=3",
    ]  # fmt: skip

    def run(*chosen: str, code: int = 0) -> str:
        assert main(["inspect", *recipe, *chosen]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def test_a_rendered_record_is_shown_with_marks_where_there_is_no_colour(inspect: Inspect):
    lines = inspect("id=sha256:ab1").splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[:8])
    assert facts["id"] == "sha256:ab1"
    assert facts["ids"] == "chat template"
    assert facts["written"] == "by  logged, on-policy (match)"
    assert facts["redactions"] == "EMAIL 1, NAME 1"
    assert facts["tokens"] == "33 prompt, 10 supervised, 7 masked"
    assert lines[8].strip() == "message 0 (user), characters 7 to 13: NAME"
    assert lines[9].strip() == "message 1 (assistant), characters 4 to 11: EMAIL"
    text = "\n".join(lines[11:])
    assert text == (
        "<|im_start|>user\nhow is NAME_1?<|im_end|>\n<|im_start|>assistant\n"
        "{+ask +}[-EMAIL_1-]{+ soon<|im_end|>+}"
    )


def test_a_terminal_gets_colours_unless_it_wants_none(
    inspect: Inspect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = inspect("id=sha256:ab1")
    green, red = "\x1b[32m", "\x1b[31m"
    assert f"{green}ask \x1b[0m{red}EMAIL_1\x1b[0m{green} soon<|im_end|>" in coloured
    assert "{+" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = inspect("id=sha256:ab1")
    assert "{+ask +}[-EMAIL_1-]" in plain
    assert green not in plain
    assert red not in plain


def test_ids_of_the_log_are_shown_as_passed_through(inspect: Inspect):
    shown = inspect("id=sha256:ab2")
    assert "ids         passed through, not tokenised" in shown
    assert "tokens      2 prompt, 5 supervised, 0 masked" in shown
    assert "{+fine<|im_end|>+}" in shown


@pytest.mark.parametrize(("name", "answer"), [("ij", "{+fine<|im_end|>+}"), ("kl", "")])
def test_a_prompt_that_was_logged_rendered_is_shown_as_it_is(
    inspect: Inspect, name: str, answer: str
):
    shown = inspect(f"id=sha256:{name}")
    assert "ids         text as logged, no template" in shown
    assert shown.endswith(f"\n\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{answer}\n")


def test_a_row_that_collect_would_drop_says_why(inspect: Inspect, run_dir: Path):
    broken = replace(with_ids(), usage={"completion_tokens": 99})
    write_shard(run_dir / "conversations" / "train-00000.jsonl.gz", [broken])
    shown = inspect("index=0", "split=train")
    assert "`collect` drops it as truncated_log" in shown
    assert "fine" not in shown, "there is no row to print"


def test_the_targets_own_answer_is_shown_where_it_has_written_one(inspect: Inspect):
    assert "{+ours<|im_end|>+}" in inspect("id=sha256:cd")
    waiting = inspect("id=sha256:ef")
    assert "off-policy (other_model)" in waiting
    assert "`regenerate` has not written its answer" in waiting
    assert waiting.endswith("how is ef?<|im_end|>\n<|im_start|>assistant\n\n")
    assert "theirs" not in waiting


def test_an_index_counts_shards_in_name_order_or_within_a_split(inspect: Inspect):
    assert "sha256:gh" in inspect("index=0")
    assert "sha256:ab1" in inspect("index=1")
    assert "sha256:ab1" in inspect("index=0", "split=train")


def test_control_characters_of_a_log_are_spelt_out(inspect: Inspect):
    shown = inspect("index=0")
    assert "{+\\x1b[2Jfine<|im_end|>+}" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ([], "id or index must be set"),
        (["id=sha256:ab1", "index=0"], "id or index must be set"),
        (["id="], "id (=) must not be empty"),
        (["id=sha256:zz"], "id (=sha256:zz) is no record's here"),
        (["id=sha256:ab"], "id (=sha256:ab) begins the ids of 2 records"),
        (["index=first"], "index (=first) must be a whole number"),
        (["index=-1"], "index (=-1) must be a whole number"),
        (["index=7"], "index (=7) must be below 7, the records of this run"),
        (["index=1", "split=test"], "must be below 1, the records of the split test"),
        (["index=0", "split=holdout"], "split (=holdout) is not in this run. Known splits: test, "),
        (["index=0", "name=other"], "holds no record. Run `dflash-train ingest`"),
        (["index=0", "indices=3"], "indices"),
    ],
)
def test_a_wrong_choice_names_its_key_and_exits_with_2(
    inspect: Inspect, chosen: list[str], complaint: str
):
    assert complaint in inspect(*chosen, code=2)
