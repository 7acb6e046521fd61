"""Where a result came from: git commit, package versions, machine, command line."""

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "dflash-train",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "datatrove",
    "safetensors",
)

PRIVATE_KEYS = ("excluded_tenants", "api_key=", "password", "secret")
"""What the name or value of a setting holds if its value must not be read beside results."""
HIDDEN = "HIDDEN"
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """Give the commit of this source tree and whether it has local changes; None outside git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        inside = git("rev-parse", "--show-toplevel") == str(root)
        sha = git("rev-parse", "HEAD") if inside else None
        dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if sha else None
    except OSError:  # no git on this machine
        sha, dirty = None, None
    return {"sha": sha, "dirty": dirty}


@functools.cache
def package_versions() -> dict[str, str]:
    """Give the versions that decide numbers, by distribution name."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def command_line() -> str:
    """Give this process's command as a user would type it, without folders of this machine.

    Names of customers, passwords and keys do not belong beside results: `HIDDEN` stands for them.
    """
    return shlex.join([Path(sys.argv[0]).name, *map(_without_private_value, sys.argv[1:])])


def _without_private_value(argument: str) -> str:
    """Hide the value of a private setting, and the login of any address."""
    if any(key in argument.lower() for key in PRIVATE_KEYS):
        name, separator, _ = argument.partition("=")
        return f"{name}={HIDDEN}" if separator else HIDDEN
    return _LOGIN.sub(HIDDEN, argument)


def machine() -> dict[str, str | int]:
    """Describe the hardware for a report: processor, cores used, memory, accelerator."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes / 2**30),
        "accelerator": accelerator,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
