"""vLLM in a process of its own, answering prompts: its job, its log, its answers.

The worker appends one line per request, so what is answered stays answered: a folder is resumed if
its job is the same, and begun anew otherwise.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from dflash_inference.serve_check.comparison import DraftCounts, ServedAnswer
from dflash_inference.serve_check.prompts import Prompt
from dflash_inference.serve_check.vllm_worker.worker import REASON
from dflash_train.config import UnavailableError, require
from dflash_train.features.target_weights import TargetLocation
from dflash_train.records.manifest import write_bytes

WORKER = Path(__file__).parent / "vllm_worker" / "worker.py"
JOB_NAME, LOG_NAME, ANSWERS_NAME = "job.json", "vllm.log", "answers.jsonl"
_TAIL_LINES = 12
_CPU_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Gigabytes of cache, and no pinning of threads: settings of the caller's environment win."""


@dataclass(kw_only=True)
class Job:
    """What one vLLM answers."""

    target: TargetLocation
    dtype: str
    """`float32` or `bfloat16`, of target and drafter."""
    drafter: Path | None
    """Folder that vLLM loads; None decodes without one."""
    method: str
    """vLLM's name of the kind of drafter: `dflash` or `dspark`."""
    num_drafts: int
    interprets_triton: bool
    """The drafter needs vLLM's V2 runner, and there is no GPU."""
    prompts: list[Prompt]
    max_new_tokens: int
    stop_token_ids: list[int]
    as_released: bool
    """Repair nothing in vLLM (vllm_worker/context_keys.py)."""
    weights_hash: str
    """Of the drafter's files: another drafter in the same folder is another job."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""

    def as_json(self, folder: Path) -> dict[str, Any]:
        """Give what the worker reads."""
        speculative = {
            "method": self.method,
            "model": str(self.drafter and self.drafter.resolve()),
            "num_speculative_tokens": self.num_drafts,
        }
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        return {
            "target": self.target.path,
            "revision": self.target.revision,
            "dtype": self.dtype,
            # vLLM drafts less where a block would reach beyond its limit, so the limit is wider.
            "max_model_len": longest + self.max_new_tokens + 2 * (self.num_drafts + 1),
            "speculative_config": None if self.drafter is None else speculative,
            "interprets_triton": self.interprets_triton and self.drafter is not None,
            "as_released": self.as_released,
            "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": self.stop_token_ids,
            "prompts": [
                {"id": prompt.id, "token_ids": prompt.token_ids} for prompt in self.prompts
            ],
            "answers": str(folder / ANSWERS_NAME),
            "weights_hash": self.weights_hash,
            "settings": self.settings,
        }


def answer_with_vllm(python: Path, job: Job, folder: Path) -> list[ServedAnswer]:
    """Let a vLLM answer all prompts, or what an earlier try left of them.

    Args:
        python: Interpreter that has vLLM 0.32.
        job: What is asked.
        folder: Keeps job, log and answers for the next try.

    Raises:
        ValueError: `python` is not an interpreter.
        UnavailableError: vLLM stopped before every prompt was answered.
    """
    require(
        python.is_file() and os.access(python, os.X_OK),
        f"python (={python}) is not an interpreter. Give the path of a Python that has vLLM 0.32, "
        "or leave it out to have an environment made.",
    )
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    content, path = orjson.dumps(job.as_json(folder)), folder / JOB_NAME
    if not path.is_file() or path.read_bytes() != content:
        (folder / ANSWERS_NAME).unlink(missing_ok=True)
        write_bytes(path, content)
    wanted = [prompt.id for prompt in job.prompts]
    if [each.id for each in read_answers(folder / ANSWERS_NAME)] != wanted:
        _run(python, folder)
    answers = read_answers(folder / ANSWERS_NAME)
    if [each.id for each in answers] != wanted:
        raise UnavailableError(f"vLLM answered {len(answers)} of {len(wanted)} requests.")
    return answers


def read_answers(path: Path) -> list[ServedAnswer]:
    """Read the worker's lines; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [_read_answer(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def _read_answer(line: bytes) -> ServedAnswer:
    content = orjson.loads(line)
    counts = content.get("counts")
    return ServedAnswer(
        id=content["id"],
        output_ids=content["output_ids"],
        finish_reason=content["finish_reason"],
        accepted=content.get("accepted"),
        remarks=content["remarks"],
        counts=counts
        and DraftCounts(
            num_drafts=counts["num_drafts"],
            num_accepted=counts["num_accepted_tokens"],
            accepted_at=counts["num_accepted_tokens_per_pos"],
        ),
    )


def _run(python: Path, folder: Path) -> None:
    log = folder / LOG_NAME
    tqdm.write(f"serve-check: vLLM starts; its log is {log}", file=sys.stderr)
    own = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, WORKER, folder / JOB_NAME],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=_CPU_DEFAULTS | own,
        )  # fmt: skip
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        ended = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        raise UnavailableError(
            f"vLLM of {python} ended {ended}. {_cause(log)}\nIts log is {log}. Requests that were "
            "answered are kept: run the command again to go on."
        )


def _cause(log: Path) -> str:
    """Give the worker's own words for its end, else the last lines of the log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith(REASON)), None)
    if reason is not None:
        return reason.removeprefix(REASON)
    shown = "\n".join(f"  {line[:300]}" for line in lines[-_TAIL_LINES:])
    return f"The last lines of its log:\n{shown}" if shown else "Its log is empty."
