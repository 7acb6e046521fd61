"""A real vLLM serves a trained drafter in both dialects and does what our decoder does.

    DFLASH_VLLM_PYTHON=/opt/vllm/bin/python DFLASH_SERVED_DRAFTER=DIR \\
        pytest -m slow tests/end_to_end/test_vllm_serve_check.py

The drafter is one of SmolLM2-135M-Instruct, such as `make drafter` leaves in the cache. Without the
first variable use `make serve-check`, which makes vLLM's environment itself.
"""

import os
from pathlib import Path

import orjson
import pytest
from safetensors.torch import load_file, save_file

from dflash_train.cli import main
from dflash_train.drafter.checkpoint import CONFIG_NAME, WEIGHTS_NAME

PYTHON = os.environ.get("DFLASH_VLLM_PYTHON", "")
DRAFTER = os.environ.get("DFLASH_SERVED_DRAFTER", "")
QUESTIONS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell?",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts is that?",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON and DRAFTER), reason="DFLASH_VLLM_PYTHON or DFLASH_SERVED_DRAFTER is not set"
    ),
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"prompt": each}) + b"\n" for each in QUESTIONS))
    return path


def check(prompts: Path, drafter: Path | str, capsys, **keys: str) -> tuple[int, dict]:
    chosen = [f"{key}={value}" for key, value in keys.items()]
    code = main(
        ["serve-check", f"checkpoint={drafter}", f"prompts={prompts}", f"python={PYTHON}",
         "max_new_tokens=32", *chosen]
    )  # fmt: skip
    printed = capsys.readouterr().out
    print(printed)
    return code, orjson.loads(printed.splitlines()[-1])


def test_both_dialects_are_served_as_our_decoder_decodes(prompts: Path, capsys) -> None:
    code, report = check(prompts, DRAFTER, capsys, dialects="zlab,speculators")
    assert code == 0
    assert [each["agrees"] for each in report["sides"]] == [True, True]
    assert all(each["accepted_drafts"] > 10 for each in report["sides"])


def test_taps_in_another_order_in_what_is_served_are_found(
    prompts: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    tensors = load_file(Path(DRAFTER) / WEIGHTS_NAME)
    width = tensors["fc.weight"].shape[0]
    tensors["fc.weight"] = tensors["fc.weight"].roll(width, dims=1).contiguous()
    save_file(tensors, spoiled / WEIGHTS_NAME, metadata={"format": "pt"})
    (spoiled / CONFIG_NAME).write_bytes((Path(DRAFTER) / CONFIG_NAME).read_bytes())
    monkeypatch.setattr("dflash_train.stages.serve_check._written", lambda *_: spoiled)
    code, report = check(prompts, DRAFTER, capsys)
    assert code == 1
    (side,) = report["sides"]
    assert not side["agrees"]
    assert side["cause"]
