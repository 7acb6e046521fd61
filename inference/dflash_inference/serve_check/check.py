"""Prompts, decoded by us and by servers, compared: one verdict for each server and dialect.

dflash-train serve-check checkpoint=DIR target.name_or_path=NAME [prompts=FILE] [url=ADDRESS]
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.serve_check.comparison import RequestFinding, ServedAnswer, compare_request
from dflash_inference.serve_check.near_tie import NearTieJudge
from dflash_inference.serve_check.own_steps import decode_as_served
from dflash_inference.serve_check.prompts import Prompt
from dflash_inference.serve_check.running_server import RunningServer
from dflash_inference.serve_check.verdict import SideVerdict
from dflash_inference.serve_check.vllm_engine import Job, answer_with_vllm
from dflash_inference.trace import DecodeTrace
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.drafter.config import DrafterConfig
from dflash_train.features.target_weights import TargetLocation


@dataclass(kw_only=True)
class OwnAnswers:
    """The prompts and what our decoder did with them."""

    decoder: SpeculativeDecoder
    prompts: list[Prompt]
    max_new_tokens: int
    traces: list[DecodeTrace] = field(default_factory=list)

    @classmethod
    def decode(
        cls, decoder: SpeculativeDecoder, prompts: list[Prompt], *, max_new_tokens: int
    ) -> "OwnAnswers":
        """Decode all prompts greedily, one at a time."""
        shown = tqdm(prompts, desc="our decoder", unit="request", file=sys.stderr)
        traces = [
            decode_as_served(decoder, prompt.token_ids, max_new_tokens=max_new_tokens)
            for prompt in shown
        ]
        return cls(decoder=decoder, prompts=prompts, max_new_tokens=max_new_tokens, traces=traces)

    def compare(
        self, side: str, served: list[ServedAnswer], plain: list[ServedAnswer] | None
    ) -> SideVerdict:
        """Compare a server's answers, in the order of the prompts.

        Args:
            side: What the verdict calls the server.
            served: Its answers with the drafter.
            plain: Its answers without; None if it was not asked for them.
        """
        without: Iterable[ServedAnswer | None] = plain or [None] * len(served)
        rows = zip(self.prompts, self.traces, served, without, strict=True)
        findings = [self._compare_one(*row) for row in rows]
        by_step = all(each.accepted is not None for each in served)
        remarks = sorted({remark for each in served for remark in each.remarks})
        return SideVerdict(side=side, requests=findings, by_step=by_step, remarks=remarks)

    def _compare_one(
        self, prompt: Prompt, ours: DecodeTrace, served: ServedAnswer, plain: ServedAnswer | None
    ) -> RequestFinding:
        judge = NearTieJudge(
            decoder=self.decoder, prompt_ids=prompt.token_ids, output_ids=served.output_ids
        )
        return compare_request(ours, served, plain=plain, judge=judge)


@dataclass(kw_only=True)
class VllmSettings:
    """What every vLLM of one check shares."""

    python: Path
    """Interpreter that has vLLM 0.32."""
    target: TargetLocation
    dtype: str
    """`float32` or `bfloat16`."""
    as_released: bool = False
    """Repair nothing in vLLM (vllm_worker/context_keys.py)."""
    work_dir: Path
    """Keeps jobs, logs and answers, so that a check that was cut short goes on."""


def check_vllm(
    own: OwnAnswers, folders: dict[str, Path], settings: VllmSettings
) -> list[SideVerdict]:
    """Let vLLM serve each folder, and the target alone, and compare.

    Args:
        own: Our decoding.
        folders: Drafter folder of each dialect, by its name.
        settings: Where vLLM is and what it serves.

    Raises:
        UnavailableError: vLLM stopped.
    """
    plain = _ask(own, None, settings, name="plain")
    verdicts = []
    for dialect, folder in folders.items():
        served = _ask(own, folder, settings, name=dialect)
        verdicts.append(own.compare(f"vLLM, {dialect}", served, plain))
    return verdicts


def check_server(own: OwnAnswers, server: RunningServer) -> SideVerdict:
    """Ask a server that runs already, and compare.

    Raises:
        UnavailableError: It does not answer as its API promises.
    """
    return own.compare(f"{server.api.value} at {server.url}", server.answer(own.prompts), None)


def _ask(
    own: OwnAnswers, folder: Path | None, settings: VllmSettings, *, name: str
) -> list[ServedAnswer]:
    drafter = own.decoder.block_drafter
    assert drafter is not None, "a decoder without a drafter has nothing to check"
    shape = drafter.drafter.config
    job = Job(
        target=settings.target,
        dtype=settings.dtype,
        drafter=folder,
        method="dspark" if shape.is_shifted else "dflash",
        num_drafts=shape.num_drafts,
        interprets_triton=needs_second_runner(shape) and not torch.cuda.is_available(),
        as_released=settings.as_released,
        prompts=own.prompts,
        max_new_tokens=own.max_new_tokens,
        stop_token_ids=sorted(own.decoder.target.stop_token_ids),
        weights_hash="" if folder is None else drafter_hash(folder),
    )
    return answer_with_vllm(settings.python, job, settings.work_dir / f"vllm-{name}")


def needs_second_runner(shape: DrafterConfig) -> bool:
    """Say whether vLLM 0.32 serves a drafter in its V2 model runner only."""
    mixes_layers = len(set(shape.layer_types or [])) > 1
    return shape.is_dflash2 or shape.is_shifted or mixes_layers
