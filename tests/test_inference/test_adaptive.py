"""`serve` and `generate` measure this machine once and draft where it pays."""

import io
from pathlib import Path

import pytest

from dflash_inference.adaptive import draft_where_it_pays, measured_batches, warm_up
from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.paying_drafts import PayingDrafts
from dflash_inference.sampling import SamplingParams
from dflash_inference.serving_costs import read_cost_table
from dflash_train.cli import main
from dflash_train.drafter.checkpoint import save_checkpoint
from dflash_train.testing import save_tiny_target, tiny_drafter, tiny_target


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    save_checkpoint(tiny_drafter(tiny_target()), tmp_path / "drafter")
    return [
        f"checkpoint={tmp_path / 'drafter'}",
        f"target.name_or_path={save_tiny_target(tmp_path / 'tiny')}",
        "serve.fast=false",
        "serve.max_new_tokens=24",
    ]


def tables(home: Path) -> list[Path]:
    return list((home / "cost-tables").glob("*"))


def test_an_adaptive_decoder_says_what_a_fixed_one_says(home: Path) -> None:
    target = tiny_target()
    fixed, adaptive = (SpeculativeDecoder(target, tiny_drafter(target)) for _ in range(2))
    draft_where_it_pays(adaptive, most_requests=1)
    assert isinstance(adaptive.policy, PayingDrafts)
    prompt = [1, *range(20, 40), *range(20, 40)]
    for temperature in (0.0, 0.9):  # plain DFlash proposes the likeliest: a seed gives the same
        params = SamplingParams(max_new_tokens=60, temperature=temperature, seed=7)
        first, second = (each.generate(prompt, params=params) for each in (fixed, adaptive))
        assert first.output_ids == second.output_ids
        assert {step.source for step in first.steps} == {"drafter"}
    (path,) = tables(home)
    assert {row.batch for row in read_cost_table(path).rows} == {1}


def test_a_warm_up_runs_every_kind_of_pass_and_changes_no_policy() -> None:
    target, widths = tiny_target(), []
    decoder = SpeculativeDecoder(
        target,
        tiny_drafter(target),
        observe=lambda request: widths.extend(step.width for step in request.steps[-1:]),
    )
    policy = decoder.policy
    warm_up(decoder)
    assert {1, 4} <= set(widths)
    assert decoder.policy is policy


def test_as_many_requests_are_timed_as_may_run_at_once() -> None:
    assert [measured_batches(most) for most in (1, 3, 16)] == [(1,), (1, 2), (1, 2, 4, 8)]


def test_a_chat_measures_at_its_first_start_only(
    command: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[str] = []
    for arguments in (["serve.adaptive=false"], [], []):
        assert main(["generate", *command, *arguments, "prompt=How many?"]) == 0
        said = capsys.readouterr()
        answers.append(said.out.rpartition("[")[0])
        assert ("measure passes" in said.err) == (len(answers) == 2)
        assert len(tables(home)) == (len(answers) > 1)
    assert answers[0] == answers[1] == answers[2]


def test_costs_prints_what_it_has_measured_and_where_that_is(
    command: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["costs", *command, "serve.most_requests=2"]) == 0
    (path,) = tables(home)
    table = read_cost_table(path)
    hardware, heading, *lines, last = capsys.readouterr().out.splitlines()
    assert (hardware, last) == (table.hardware, str(path))
    assert heading.split() == ["requests", "tokens", "each", "draft", "ms", "verify", "ms"]
    shown = [[float(number) for number in line.split()] for line in lines]
    want = [[r.batch, r.width, 1000 * r.draft_s, 1000 * r.verify_s] for r in table.rows]
    assert shown == [pytest.approx(row, abs=0.006) for row in want]
    assert [(row.batch, row.width) for row in table.rows] == [
        (batch, width) for batch in (1, 2) for width in (1, 2, 4)
    ]
    path.write_text(path.read_text().replace(table.hardware, "marked"))
    assert main(["costs", *command, "serve.most_requests=2"]) == 0
    assert capsys.readouterr().out.startswith("marked")
    assert main(["costs", "--force", *command, "serve.most_requests=2"]) == 0
    assert capsys.readouterr().out.startswith(table.hardware)


def test_questions_of_a_pipe_are_answered_adaptively_too(
    command: list[str], home: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["generate", *command]) == 0
    assert capsys.readouterr().out.count("acceptance length") == 2
