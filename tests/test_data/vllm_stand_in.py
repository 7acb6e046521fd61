"""An interpreter that finds a stand-in under vLLM's name, for tests without vLLM.

Its states are a formula of token and layer (`stand_in_features`). It finishes the newest row first;
where STAND_IN_DIES_AFTER is set, the oldest, and kills itself after so many.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

HIDDEN_SIZE = 32
STAND_IN = """
import os
import signal
import sys

import numpy
from safetensors.numpy import save_file

__version__ = "0.32.0"


class SamplingParams:
    def __init__(self, *, extra_args, **_):
        self.path = extra_args["kv_transfer_params"]["hidden_states_path"]


class LLM:
    def __init__(self, *, speculative_config, **settings):
        chosen = [f"{k}={v}" for k, v in settings.items() if k.startswith(("max_num", "gpu_"))]
        with open(os.environ["STAND_IN_LOG"].replace("run.txt", "settings.txt"), "w") as log:
            log.write(str(chosen))
        extra = speculative_config["draft_model_config"]["hf_config"]
        self.layers = numpy.array(extra["eagle_aux_hidden_state_layer_ids"], numpy.float32)
        self.llm_engine = self.engine_core = self.scheduler = self
        self.rows, self.num_done = [], 0

    def add_request(self, _name, prompt, parameters):
        if 666 in prompt["prompt_token_ids"]:
            raise MemoryError("no page is left")
        self.rows.append((prompt["prompt_token_ids"], parameters.path))

    def has_requests(self):
        return bool(self.rows)

    def step(self):
        if self.rows:
            dies_after = int(os.environ.get("STAND_IN_DIES_AFTER", "-1"))
            if dies_after == self.num_done:
                print("engine: low on memory for [11, 12, 13, 14, 15]", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            self.num_done += 1
            ids, path = self.rows.pop(-1 if dies_after < 0 else 0)
            with open(os.environ["STAND_IN_LOG"], "a") as log:
                log.write(f"{ids[0]}\\n")
            states = numpy.array(ids, numpy.float32)[:, None, None] + self.layers[:, None] / 100
            states = numpy.broadcast_to(states, (len(ids), len(self.layers), 32)).copy()
            save_file({"hidden_states": states, "token_ids": numpy.array(ids)}, path + ".partial")
            os.replace(path + ".partial", path)
"""


def python_with_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the interpreter into a folder; the first token of each row it ran goes to run.txt."""
    (folder / "site").mkdir()
    (folder / "site" / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("STAND_IN_LOG", str(folder / "run.txt"))
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def stand_in_features(row: list[int], taps: list[int]) -> Tensor:
    """Give the features of a row by the stand-in's formula; vLLM's ids are the taps plus one."""
    layers = torch.tensor([tap + 1 for tap in taps]) / 100
    states = torch.tensor(row[:-1], dtype=torch.float32)[:, None] + layers
    return functional.pad(states.repeat_interleave(HIDDEN_SIZE, dim=1), (0, 0, 0, 1))
