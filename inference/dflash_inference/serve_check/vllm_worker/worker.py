"""The program that `vllm_engine.py` starts in vLLM's own environment; it imports nothing of ours.

    python worker.py JOB.json

Answers the job's prompts greedily, one request at a time, and appends one JSON line per request to
the job's `answers` file. Requests that stand there already are skipped, so after a kill the same
command goes on. `JOB.json` is what `vllm_engine.Job.as_json` writes.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

SUPPORTED = "0.32."
"""vLLM releases whose counters and drafters this was tested with."""
REASON = "serve-check: "
"""How the line of the output begins that says why the program stopped."""
COUNTERS = "vllm:spec_decode_"


def main() -> None:
    """Answer what is not answered yet."""
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = Path(job["answers"])
    left = [each for each in job["prompts"] if each["id"] not in answered_ids(answers)]
    if not left:
        return
    repairs: list[str] = []
    engine = start_engine(job, repairs)
    with answers.open("a") as stream:
        for prompt in left:
            print(f"request {prompt['id']}", file=sys.stderr, flush=True)
            answer = {"id": prompt["id"], **answer_prompt(engine, prompt["token_ids"], job)}
            answer["remarks"] = repairs
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


def answered_ids(answers: Path) -> set[str]:
    """Give the requests that have a line, and cut off what a kill left of another."""
    if not answers.exists():
        return set()
    content = answers.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        answers.write_bytes(whole)
    return {json.loads(line)["id"] for line in whole.splitlines()}


def start_engine(job: dict[str, Any], repairs: list[str]) -> Any:
    """Load the target, with the drafter if the job has one; gives a `vllm.LLM`.

    Args:
        job: What is served.
        repairs: Gets a sentence for whatever was repaired in vLLM.
    """
    # One process: killing it leaves nothing behind, and its counters are this process's.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if job["interprets_triton"]:
        from interpreted_triton import register  # pyright: ignore[reportMissingImports]

        register()
    import vllm  # pyright: ignore[reportMissingImports]

    if not vllm.__version__.startswith(SUPPORTED):
        raise RuntimeError(f"this Python has vLLM {vllm.__version__}, not {SUPPORTED}x.")
    if job["speculative_config"] is not None and not job["as_released"]:
        from context_keys import repair  # pyright: ignore[reportMissingImports]

        repairs += repair()
    settings = {
        "model": job["target"],
        "revision": job["revision"],
        "dtype": job["dtype"],
        "max_model_len": job["max_model_len"],
        "max_num_seqs": 1,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    if job["speculative_config"] is not None:
        settings |= {
            "speculative_config": job["speculative_config"],
            "per_request_spec_decode_metrics": "detailed",
        }
    return vllm.LLM(**settings | job["settings"])


def answer_prompt(engine: Any, token_ids: list[int], job: dict[str, Any]) -> dict[str, Any]:
    """Answer one prompt; drafts are told twice, by step and as the counters' difference."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_new_tokens"],
        stop_token_ids=job["stop_token_ids"],
        detokenize=False,
    )
    before = read_counters(engine)
    (reply,) = engine.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
    after = read_counters(engine)
    output = reply.outputs[0]
    answer: dict[str, Any] = {
        "output_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
    }
    steps = output.spec_decode_metrics
    if job["speculative_config"] is not None:
        answer |= {
            "accepted": [] if steps is None else list(steps.per_step_accepted),
            "counts": {name: subtract(after[name], before.get(name, 0)) for name in after},
        }
    return answer


def read_counters(engine: Any) -> dict[str, Any]:
    """Give vLLM's counters of speculation: numbers, and one list by position."""
    found: dict[str, Any] = {}
    for metric in engine.get_metrics():
        if metric.name.startswith(COUNTERS):
            name = metric.name.removeprefix(COUNTERS)
            found[name] = metric.values if name.endswith("per_pos") else metric.value
    return found


def subtract(after: Any, before: Any) -> Any:
    """Give the difference of two readings of a counter; it may have had no value before."""
    if not isinstance(after, list):
        return after - before
    return [more - less for more, less in zip(after, before or [0] * len(after), strict=True)]


if __name__ == "__main__":
    try:
        main()
    except Exception as failure:
        # The reader looks for this one line; vLLM's own exit may add more lines after it.
        words = " ".join(str(failure).split())[:600]
        sys.stderr.write(f"{traceback.format_exc()}{REASON}{type(failure).__name__}: {words}\n")
        sys.exit(1)
