"""Keyed hashes in place of provider ids: the same customer is recognisable, but not readable.

The key is never stored beside data. It comes from `data.hmac_key_file`, else from the
environment variable DFLASH_HMAC_KEY, else from a file that the first run makes in its run
folder (mode 0600), so that reruns give the same hashes.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import atomic_path

KEY_FILE_NAME = ".hmac-key"
ENVIRONMENT_VARIABLE = "DFLASH_HMAC_KEY"
MIN_KEY_BYTES = 16
NUM_HEX_DIGITS = 16


class Pseudonyms:
    """Gives `h:` pseudonyms; the key shows neither in its text form nor in datatrove's logs."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "Pseudonyms(key=hidden)"

    def hide(self, kind: str, *parts: str | None) -> str:
        """Give the pseudonym of a provider id; kinds (`session`, `tenant`, ...) never collide."""
        message = "\x1f".join([kind, *(part or "" for part in parts)]).encode()
        return "h:" + hmac.new(self._key, message, hashlib.sha256).hexdigest()[:NUM_HEX_DIGITS]


def load_pseudonyms(config: RecipeConfig) -> Pseudonyms:
    """Find or make the key.

    Raises:
        ValueError: The chosen key is missing or too short.
    """
    if config.data.hmac_key_file is not None:
        name, key = "data.hmac_key_file", _read_key(Path(config.data.hmac_key_file))
    elif ENVIRONMENT_VARIABLE in os.environ:
        name, key = ENVIRONMENT_VARIABLE, os.environ[ENVIRONMENT_VARIABLE].encode()
    else:
        path = config.run_dir / KEY_FILE_NAME
        if not path.exists():
            _make_key(path)
        name, key = str(path), _read_key(path)
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(
            f"{name} holds {len(key)} bytes, a key needs at least {MIN_KEY_BYTES}. "
            "Put random text there, for example from `openssl rand -hex 32`."
        )
    return Pseudonyms(key)


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"data.hmac_key_file (={path}) cannot be read ({error.strerror}). "
            "Name a readable file, or unset it to use a key of this run folder."
        ) from error


def _make_key(path: Path) -> None:
    with atomic_path(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
            stream.flush()
            os.fsync(stream.fileno())
