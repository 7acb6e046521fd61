import io
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dflash_inference.autoregressive import AutoregressiveDecoder
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.incremental_text import IncrementalText
from dflash_inference.lookup_drafts import LookupDrafts
from dflash_inference.terminal_chat import Chat, converse, figures, greet, show_answer
from dflash_train.cli import main
from dflash_train.config import ServingSampling
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.testing import save_tiny_target, tiny_drafter, tiny_target, tiny_tokenizer
from tests.test_inference.test_decoder import KnowingDrafter

GREEN, CYAN, RESET = "\x1b[32m", "\x1b[36m", "\x1b[0m"


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target()
    target.stop_token_ids = frozenset()
    return target


@pytest.fixture
def new_chat(target: Target) -> Callable[..., Chat]:
    def build(*, max_new_tokens: int = 30, temperature: float = 0.0) -> Chat:
        decoder = SpeculativeDecoder(target, tiny_drafter(target))
        sampling = ServingSampling(temperature=temperature)
        return Chat(decoder=decoder, sampling=sampling, max_new_tokens=max_new_tokens)

    return build


@pytest.fixture
def knowing_chat(target: Target) -> Chat:
    """A chat whose drafter knows most of the answer to the question `one`."""
    ids = render_prompt(target.tokenizer, [Turn(role="user", content="one")])
    plain = AutoregressiveDecoder(target).generate(ids, max_new_tokens=40)
    drafter = KnowingDrafter(tiny_drafter(target).config).eval()
    drafter.know([*ids, *plain.output_ids], lambda position: position % 5 != 0)
    decoder = SpeculativeDecoder(target, drafter)
    return Chat(decoder=decoder, sampling=ServingSampling(), max_new_tokens=40)


def console(*, coloured: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=coloured,
        color_system="standard" if coloured else None,
        width=80,
        highlight=False,
    )


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain_answer(target: Target, *said: str, budget: int = 30) -> str:
    """Decode the last question of a conversation with the decoder alone."""
    roles = ("user", "assistant")
    turns = [Turn(role=roles[place % 2], content=text) for place, text in enumerate(said)]
    decoder = SpeculativeDecoder(target, tiny_drafter(target))
    prompt = render_prompt(target.tokenizer, turns)
    output = decoder.generate(prompt, max_new_tokens=budget).output_ids
    return str(target.tokenizer.decode(output, skip_special_tokens=True))


def test_pieces_join_to_the_decoders_answer_and_the_next_turn_sees_it(
    target: Target, new_chat: Callable[..., Chat]
) -> None:
    chat = new_chat()
    first = "".join(piece.text for piece in chat.answer("one"))
    assert first == plain_answer(target, "one")
    second = "".join(piece.text for piece in chat.answer("two"))
    assert second == plain_answer(target, "one", first, "two")
    chat.clear()
    assert "".join(piece.text for piece in chat.answer("two")) == plain_answer(target, "two")


def test_as_many_pieces_are_accepted_as_drafts_were_committed(knowing_chat: Chat) -> None:
    pieces = list(knowing_chat.answer("one"))
    assert knowing_chat.last is not None
    steps = knowing_chat.last.steps
    num_accepted = sum(min(step.num_accepted, step.committed) for step in steps)
    assert sum(piece.source == "drafter" for piece in pieces) == num_accepted > 20
    assert len(pieces) == 40 + 1  # one a token, and what was held back


def test_accepted_tokens_are_coloured_and_the_targets_own_are_not(
    knowing_chat: Chat,
) -> None:
    screen = console(coloured=True)
    show_answer(knowing_chat, "one", screen)
    knowing_chat.clear()
    pieces = [piece for piece in knowing_chat.answer("one") if piece.text.isprintable()]
    accepted = [piece.text for piece in pieces if piece.source and piece.text]
    assert len(accepted) > 5
    assert shown(screen).count(GREEN) >= len(accepted)
    assert all(f"{GREEN}{text}{RESET}" in shown(screen) for text in accepted)
    own = [piece for piece in pieces if piece.text and not piece.source]
    assert own
    assert f"{GREEN}{own[0].text}{RESET}" not in shown(screen) or own[0].text in accepted


def test_copied_tokens_have_a_colour_of_their_own_which_the_greeting_names(target: Target) -> None:
    decoder = SpeculativeDecoder(target, tiny_drafter(target), policy=LookupDrafts(3))
    chat = Chat(decoder=decoder, sampling=ServingSampling(), max_new_tokens=200)
    pieces = list(chat.answer("again and again and again"))
    assert "lookup" in {piece.source for piece in pieces} <= {"lookup", None}
    screen = console(coloured=True)
    chat.clear()
    show_answer(chat, "again and again and again", screen)
    assert shown(screen).count(CYAN) == sum(bool(p.source and p.text) for p in pieces)
    assert GREEN not in shown(screen)
    greet(screen)
    assert f"{GREEN}from the drafter{RESET}" in shown(screen)
    assert f"{CYAN}copied from the text before{RESET}" in shown(screen)
    assert "/exit: leave." in shown(screen)


@pytest.mark.parametrize("no_color", [True, False])
def test_without_a_terminal_or_with_no_color_nothing_is_coloured(
    knowing_chat: Chat, monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Console(file=io.StringIO(), force_terminal=no_color, highlight=False)
    show_answer(knowing_chat, "one", screen)
    assert "\x1b[3" not in shown(screen)


def test_what_the_target_writes_cannot_steer_the_terminal(new_chat: Callable[..., Chat]) -> None:
    chat, screen = new_chat(max_new_tokens=60, temperature=1.5), console()
    show_answer(chat, "one", screen)
    assert chat.turns[-1].content is not None
    assert any(ord(character) < 32 for character in chat.turns[-1].content)
    assert not any(ord(each) < 32 and each not in "\n\t" for each in shown(screen))


def test_figures_are_those_of_the_steps(new_chat: Callable[..., Chat]) -> None:
    chat = new_chat(max_new_tokens=50)
    list(chat.answer("one"))
    assert chat.last is not None
    steps = chat.last.steps
    length = sum(step.num_accepted + 1 for step in steps) / len(steps)
    told = figures(chat.last)
    assert told.startswith(f"[50 tokens, acceptance length {length:.2f}, ")
    assert "tokens/s" in told
    assert told.endswith(", cut off at serve.max_new_tokens]")
    single = new_chat(max_new_tokens=1)
    list(single.answer("one"))
    assert single.last is not None
    assert "tokens/s" not in figures(single.last)


def test_slash_commands_leave_forget_or_are_named(new_chat: Callable[..., Chat]) -> None:
    chat, screen = new_chat(max_new_tokens=2), console()
    converse(chat, ["one", "  ", "/clear", "/what", "two", "/exit", "three"], screen)
    assert [turn.content for turn in chat.turns if turn.role == "user"] == ["two"]
    assert "/what is not a command. Known: /exit" in shown(screen)
    assert shown(screen).count("acceptance length") + shown(screen).count("tokens, prefill") >= 2


def test_a_conversation_longer_than_the_targets_positions_says_what_to_do(
    new_chat: Callable[..., Chat],
) -> None:
    chat, screen = new_chat(max_new_tokens=4090), console()
    converse(chat, ["x" * 50], screen)
    assert "Type /clear" in shown(screen)
    assert chat.turns == []


def test_an_interrupted_answer_ends_and_stays_as_far_as_it_came(
    new_chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, screen = new_chat(max_new_tokens=300), console()
    real_step, num_steps = chat.decoder.step, []

    def step(requests: list[object]) -> None:
        if len(num_steps) == 4:
            raise KeyboardInterrupt
        num_steps.append(1)
        real_step(requests)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(chat.decoder, "step", step)
    show_answer(chat, "one", screen)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    assert "tokens/s" in shown(screen)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(tiny_drafter(tiny_target()), folder / "drafter")
    return [
        f"checkpoint={folder / 'drafter'}",
        f"target.name_or_path={save_tiny_target(folder / 'tiny')}",
        "serve.fast=false",
        "serve.adaptive=false",
        "serve.max_new_tokens=12",
    ]


def test_one_prompt_is_answered_on_the_command_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *command, "prompt=How many, please?"]) == 0
    output = capsys.readouterr().out
    assert plain_answer(tiny_target(), "How many, please?", budget=12)[:3] in output
    assert "acceptance length" in output


def test_lines_of_stdin_are_questions(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/clear\ntwo\n"))
    assert main(["generate", *command]) == 0
    output = capsys.readouterr().out
    assert output.count("prefill") == 2
    assert "\x1b[" not in output


OWN_KEYS = [
    ("generate", "prompt=Hi"), ("inspect", "index=0"), ("export-dataset", "license=x"),
    ("pseudonym", "tenant=acme"),
]  # fmt: skip
"""Verbs that take a key which is no part of the recipe."""


@pytest.mark.parametrize(("verb", "key"), OWN_KEYS)
def test_a_recipe_is_printed_and_nothing_else_done(
    command: list[str], capsys: pytest.CaptureFixture[str], verb: str, key: str
) -> None:
    assert main([verb, key, "--print-recipe", *command]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["serve"]["max_new_tokens"] == 12
    assert f"checkpoint={printed['checkpoint']}" == command[0]


@pytest.mark.parametrize(("verb", "key"), OWN_KEYS)
def test_a_verb_that_foretells_nothing_refuses_a_dry_run(
    command: list[str], capsys: pytest.CaptureFixture[str], verb: str, key: str
) -> None:
    assert main([verb, key, "--dry-run", *command]) == 2
    said = capsys.readouterr()
    assert f"not for `{verb}`" in said.err
    assert said.out == ""


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_a_missing_drafter_or_another_targets_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], verb: str, tmp_path: Path
) -> None:
    assert main([verb, *command, f"checkpoint={tmp_path / 'none'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err


TEXTS = ["plain", "\u00e9\u4e2d\U0001f600 caf\u00e9", "\U0001f469\u200d\U0001f469\u200d\U0001f467"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_text_comes_in_whole_characters(text: str, step: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    reader = IncrementalText(tokenizer)
    pieces = [reader.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(pieces) == text == reader.text
    assert reader.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_given_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a\u4e2d", add_special_tokens=False).input_ids
    reader = IncrementalText(tokenizer)
    assert [reader.push([token]) for token in ids[:-1]] == ["a", "", ""]
    assert reader.finish() == "\ufffd"


def test_a_stop_text_and_what_may_begin_it_are_held_back() -> None:
    tokenizer = tiny_tokenizer()
    reader = IncrementalText(tokenizer, ("END", "NEVER"))
    pieces = [reader.push([token]) for token in tokenizer("xENxNEENDyy").input_ids]
    assert "".join(pieces) == "xENxNE" == reader.text
    assert pieces[:5] == ["x", "", "", "ENx", ""]
    assert reader.finish() == ""
