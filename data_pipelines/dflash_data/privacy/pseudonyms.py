"""Keyed hashes in place of provider ids: the same customer is recognisable, but not readable.

The key is never stored beside data. It comes from `data.hmac_key_file`, else from the
environment variable DFLASH_HMAC_KEY, else from a file that the first run makes in its run
folder (mode 0600), so that reruns give the same hashes.
"""

import hashlib
import os
import secrets
from pathlib import Path
from typing import NamedTuple

from dflash_data.privacy.text_cache import TextCache
from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import atomic_path

KEY_FILE_NAME = ".hmac-key"
ENVIRONMENT_VARIABLE = "DFLASH_HMAC_KEY"
MIN_KEY_BYTES = 16
NUM_HEX_DIGITS = 16
MAX_CACHED_CHARACTERS = 4_000_000
"""Per process: the open sessions of a busy hour, a few megabytes."""


class MarkedText(NamedTuple):
    """A text whose private values are marks, and their kinds in order."""

    text: str
    kinds: tuple[str, ...]


class Pseudonyms:
    """Gives `h:` pseudonyms; the key shows neither in its text form nor in datatrove's logs.

    `marked` holds texts and what scrubbing made of them, which depends on the key. It stays in
    this process: a pickled copy starts empty, so nothing unscrubbed goes to a worker's file.
    """

    __slots__ = ("_inner", "_key", "_outer", "marked")

    def __init__(self, key: bytes) -> None:
        self._key = key
        # HMAC-SHA-256 with the key worked in once (RFC 2104): OpenSSL's takes much longer to set
        # up than to hash these short texts.
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))
        self.marked: TextCache[MarkedText] = TextCache(MAX_CACHED_CHARACTERS)

    def __repr__(self) -> str:
        return "Pseudonyms(key=hidden)"

    def __reduce__(self) -> tuple[type["Pseudonyms"], tuple[bytes]]:
        return Pseudonyms, (self._key,)

    def hide(self, kind: str, *parts: str | None) -> str:
        """Give the pseudonym of a provider id; kinds (`session`, `tenant`, ...) never collide."""
        return "h:" + self._hex("\x1f".join([kind, *(part or "" for part in parts)]))

    def mark(self, kind: str, value: str) -> str:
        """Give the keyed hash of a private value, 16 hex digits; equal values, equal hashes."""
        return self._hex(f"mark\x1f{kind}\x1f{value}")

    def _hex(self, message: str) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message.encode(errors="surrogatepass"))
        outer.update(inner.digest())
        return outer.hexdigest()[:NUM_HEX_DIGITS]


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


def has_key(config: RecipeConfig) -> bool:
    """Say whether there is a key to find: a chosen one, or the run's own."""
    is_chosen = config.data.hmac_key_file is not None or ENVIRONMENT_VARIABLE in os.environ
    return is_chosen or (config.run_dir / KEY_FILE_NAME).exists()


def rehearsal_pseudonyms(config: RecipeConfig) -> Pseudonyms:
    """Give the key without making one: where the run has none yet, one that is forgotten."""
    if has_key(config):
        return load_pseudonyms(config)
    return Pseudonyms(secrets.token_bytes(MIN_KEY_BYTES))


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
