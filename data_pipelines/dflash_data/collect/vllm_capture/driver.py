"""The program that `capture.py` starts in vLLM's own environment; it imports nothing of ours.

    python driver.py JOB.json < rows.jsonl
    python driver.py --version

Each line of the input is one row, `{"path": ..., "token_ids": [...]}`; its hidden states go to
`path`. vLLM batches whatever has arrived. When the input ends, what is left is finished and the
program ends: so it never outlives the process that feeds it.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

SUPPORTED = "0.32."
"""vLLM releases whose hidden-state extraction this was read and tested against."""
REASON = "capture: "
"""How the line of the output begins that says why the program stopped."""
VERSION = "version: "
"""How the line begins that answers `ASKS_VERSION`."""
ASKS_VERSION = "--version"
"""The argument that asks for vLLM's release instead of features."""
IDLE_WAIT_S = 0.02


def main() -> None:
    """Answer the rows of standard input with files, then exit."""
    if sys.argv[1] == ASKS_VERSION:
        print(f"{VERSION}{check_version()}")
        return
    job = json.loads(Path(sys.argv[1]).read_text())
    # One process: an error of the engine is ours, and killing it leaves nothing behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    check_version()
    engine = start_engine(job)
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=read_rows, args=(sys.stdin, inbox), daemon=True).start()
    serve(engine, inbox)


def check_version() -> str:
    """Give vLLM's release; refuse a Python without it, or with one that was never tried."""
    try:
        from vllm import __version__  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"this Python has no vLLM ({error}). Install vllm==0.32.0.") from error
    if not __version__.startswith(SUPPORTED):
        raise RuntimeError(f"this Python has vLLM {__version__}, not 0.32. Install vllm==0.32.0.")
    return __version__


def start_engine(job: dict[str, Any]) -> Any:
    """Load the target with hidden-state extraction and our connector; gives an LLMEngine."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    settings = {
        "model": job["model"],
        "revision": job["revision"],
        "dtype": job["dtype"],
        "max_model_len": job["max_model_len"],
        "skip_tokenizer_init": True,
        "enforce_eager": True,  # prefills gain nothing from graphs, and compiling takes minutes
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {
                "hf_config": {"eagle_aux_hidden_state_layer_ids": job["vllm_layer_ids"]}
            },
        },
        "kv_transfer_config": {
            "kv_connector": "HiddenStateFiles",
            "kv_connector_module_path": "hidden_state_files",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "shared_storage_path": job["folder"],
                "allow_custom_save_path": True,
                "use_synchronization_lock": False,
            },
        },
    }
    return LLM(**settings | job["settings"]).llm_engine


def read_rows(lines: TextIO, inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Put each row into the inbox, then None; runs in a thread of its own."""
    for line in lines:
        inbox.put(json.loads(line))
    inbox.put(None)


def serve(engine: Any, inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Step the engine until the input has ended and the file of every row is written."""
    is_open = True
    while is_open or has_work(engine):
        is_open = is_open and admit(engine, inbox)
        engine.step()


def has_work(engine: Any) -> bool:
    """Whether rows are being computed or files written.

    `LLMEngine.has_unfinished_requests` is False as soon as a prompt is computed; the scheduler
    keeps a request until the connector reports its file.
    """
    return engine.engine_core.engine_core.scheduler.has_requests()


def admit(engine: Any, inbox: "queue.SimpleQueue[dict[str, Any] | None]") -> bool:
    """Hand over the rows that have arrived; False once the input has ended."""
    while True:
        try:
            row = inbox.get(timeout=0 if has_work(engine) else IDLE_WAIT_S)
        except queue.Empty:
            return True
        if row is None:
            return False
        add_row(engine, row)


def add_row(engine: Any, row: dict[str, Any]) -> None:
    """Ask for a prefill; the one token that vLLM insists on generating is ignored."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    parameters = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        extra_args={"kv_transfer_params": {"hidden_states_path": row["path"]}},
    )
    engine.add_request(Path(row["path"]).name, {"prompt_token_ids": row["token_ids"]}, parameters)


if __name__ == "__main__":
    try:
        main()
    except Exception as failure:
        # The reader looks for this one line; vLLM's own exit may add more lines after it.
        words = " ".join(str(failure).split())
        sys.stderr.write(f"{traceback.format_exc()}{REASON}{type(failure).__name__}: {words}\n")
        sys.exit(1)
