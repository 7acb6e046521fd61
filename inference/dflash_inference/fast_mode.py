"""Where the fast passes can run: on a CPU, and with a C++ compiler for the compiled layers."""

import os
import shutil
import sys

import torch


def missing_compiler() -> str | None:
    """Name the C++ compiler that compiled layers would need and that is not there, else None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else compiler


def can_be_fast(device: torch.device, *, key: str) -> bool:
    """Say whether the fast mode that a key asks for can be had; on a CPU, say aloud if it cannot.

    Args:
        device: Where the target is; on an accelerator there is one mode only.
        key: The recipe key that asks for it.
    """
    if device.type != "cpu":
        return False
    missing = missing_compiler()
    if missing is not None:
        print(
            f"{key} (=true) needs a C++ compiler, and {missing} is not there: going on in the "
            "exact mode, which is slower.",
            file=sys.stderr,
        )
    return missing is None
