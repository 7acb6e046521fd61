"""Where the target's files lie on this machine, told without torch and without a download.

Processes that read logs need the tokenizer and nothing else of the target; they must start fast and
stay small. Downloads and weights are the business of `features/target_weights.py`.
"""

import os
import re
from pathlib import Path

from dflash_train.config import TargetConfig

WHEEL_PREFIX = "wheel:"
TOKENIZER_NAME = "tokenizer.json"


def dflash_home() -> Path:
    """Give the folder for converted targets: `$DFLASH_HOME`, else `~/.cache/dflash-train`."""
    return Path(os.environ.get("DFLASH_HOME", "~/.cache/dflash-train")).expanduser()


def wheel_folder(requirement: str) -> Path | None:
    """Give where the model of a wheel `NAME==VERSION` is kept; None for any other text."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._-]+)", requirement)
    return dflash_home() / "targets" / f"{match[1]}-{match[2]}" if match else None


def find_tokenizer_file(config: TargetConfig) -> Path | None:
    """Give the target's `tokenizer.json`; None if it is not on this machine, or has none."""
    name = config.name_or_path
    if name.startswith(WHEEL_PREFIX):
        folder = wheel_folder(name.removeprefix(WHEEL_PREFIX))
        path = folder / TOKENIZER_NAME if folder is not None else None
    elif Path(name).is_dir():
        path = Path(name) / TOKENIZER_NAME
    elif name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        path = _cached_tokenizer(name, config.revision)
    else:
        path = None
    return path.absolute() if path is not None and path.is_file() else None


def _cached_tokenizer(repository: str, revision: str | None) -> Path | None:
    """Give the file that an earlier download left; a name that no repository can have has none."""
    from huggingface_hub import try_to_load_from_cache  # no process that reads logs needs it
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repository, TOKENIZER_NAME, revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
