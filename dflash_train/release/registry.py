"""A registry: the drafter that serves, the one before it, the one on trial; switched all at once.

    REGISTRY/
      current, previous, candidate   links through `state`: a drafter's folder wherever one is read
      state -> states/000007         the one link that a switch renames
      states/000007/                 three links to drafters, and event.json: who, when, why
      drafters/0123456789abcdef/     each drafter once, under the hash of its config and weights
      history.jsonl                  the events so far, one a line

Whatever is written first lies where nobody looks: a drafter under a partial name, a state that no
link names. Then one rename makes all three names mean what they shall. A process that is killed
leaves the state before or the state after, and the next one removes what it left half done.
Writers take turns by a lock that the kernel lets go with its holder. Nothing is ever deleted of a
drafter that was registered, so whoever reads one while it is replaced reads on undisturbed.
"""

import fcntl
import getpass
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from dflash_train.config import require
from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.records.manifest import atomic_path, canonical_json, content_hash, write_bytes
from dflash_train.release.resolve import DRAFTER_FILES

ROLES = ("current", "candidate", "previous")
HISTORY_NAME = "history.jsonl"
STATE_LINK, STATES, DRAFTERS = "state", "states", "drafters"
EVENT_NAME, LOCK_NAME = "event.json", ".lock"
ADOPTED, NOMINATED, PROMOTED, KEPT, ROLLED_BACK = (
    "adopted", "nominated", "promoted", "kept", "rolled back",
)  # fmt: skip
"""Kinds of events: a first drafter, one on trial, one that took over, one that did not, an undo."""
_NEXT_LINK = ".state-next"
_PARTIAL = ".partial-"
_HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which drafter each name means, by its hash; None: none."""

    current: str | None = None
    """Serves."""
    candidate: str | None = None
    """Was tuned last and does not serve; None once it was promoted."""
    previous: str | None = None
    """Served before; what a rollback brings back."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One switch of a registry."""

    number: int
    """1, 2, ...; also the number of the state that it made."""
    kind: str
    time: str
    """UTC, RFC 3339."""
    who: str
    """User and machine."""
    roles: Roles
    """After the switch."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Why: hashes of rule and verdict, the run, reasons."""

    def to_json(self) -> bytes:
        """Give the one line of the event."""
        return canonical_json(asdict(self) | {"content_hash": content_hash(asdict(self))}) + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> "Event":
        """Read a line back.

        Raises:
            ValueError: It is damaged.
        """
        content = orjson.loads(line)
        stored = content.pop("content_hash")
        if content_hash(content) != stored:
            raise ValueError("its content hash does not match")
        return cls(**content | {"roles": Roles(**content["roles"])})


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Registry:
    """A folder of drafters and the three names that say what each is for."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime] = _utc_now) -> None:
        """Name a registry; nothing is read or made yet.

        Args:
            folder: Need not exist: then no name means anything.
            clock: Gives the time of events.
        """
        self.folder = folder
        self._clock = clock

    @property
    def roles(self) -> Roles:
        """What the names mean now.

        Raises:
            ValueError: The registry is damaged.
        """
        number = self._active_number()
        return self._event(number).roles if number else Roles()

    def drafter_folder(self, drafter: str) -> Path:
        """Give the folder of a registered drafter, which never changes."""
        return self.folder / DRAFTERS / short_name(drafter)

    def lines(self) -> list[str]:
        """Say what the names mean, and how that came about last."""
        roles, history = self.roles, self.history()
        lines = [f"{self.folder / role}: {short_name(getattr(roles, role))}" for role in ROLES]
        if history:
            last = history[-1]
            lines.append(f"last switch: {last.kind} at {last.time} by {last.who}")
        return lines

    def history(self) -> list[Event]:
        """Give all switches so far, the first one first; `history.jsonl` may be one behind.

        Raises:
            ValueError: The registry is damaged.
        """
        return [self._event(number) for number in range(1, self._active_number() + 1)]

    def store(self, source: Path) -> str:
        """Copy a drafter into the registry, unless it is there, and give its hash.

        Args:
            source: Folder of a drafter in any layout; what servers read of it is copied.

        Raises:
            ValueError: It is no drafter, or changed while it was copied.
        """
        found = drafter_hash(source)
        final = self.drafter_folder(found)
        if final.exists():
            self.check(found)
            return found
        with self._locked():
            if not final.exists():
                with atomic_path(final) as partial:
                    _copy_drafter(source, partial)
                    require(
                        drafter_hash(partial) == found,
                        f"{source} changed while it was copied. Wait for what writes it, and run "
                        "the command again.",
                    )
                _sync(final.parent)
        return found

    def check(self, drafter: str) -> None:
        """Compare a registered drafter's files with its hash.

        Raises:
            ValueError: They are missing or damaged.
        """
        folder = self.drafter_folder(drafter)
        require(folder.is_dir(), f"{folder} is missing. {_RESTORE}")
        require(
            drafter_hash(folder) == drafter,
            f"{folder} does not match the hash that it was registered under. {_RESTORE}",
        )

    def adopt(self, source: Path) -> str:
        """Make a drafter the first `current` of an empty registry, and give its hash.

        Raises:
            ValueError: It is no drafter, or the registry has a current one.
        """
        found = self.store(source)
        self._switch(ADOPTED, lambda roles: replace(roles, current=found), against=None, facts={})
        return found

    def nominate(self, drafter: str, *, facts: dict[str, Any]) -> None:
        """Make a registered drafter the `candidate`, unless it has a name already."""
        if drafter not in (self.roles.candidate, self.roles.current):
            self._switch(NOMINATED, lambda roles: replace(roles, candidate=drafter), facts=facts)

    def promote(self, drafter: str, *, against: str, facts: dict[str, Any]) -> None:
        """Make a registered drafter `current` and the current one `previous`.

        Args:
            drafter: Its hash.
            against: The drafter that it was compared with, which must still be current.
            facts: Why.

        Raises:
            ValueError: Another drafter has become current meanwhile.
        """

        def promoted(roles: Roles) -> Roles:
            return Roles(current=drafter, previous=roles.current)

        self._switch(PROMOTED, promoted, against=against, facts=facts)

    def keep(self, drafter: str, *, against: str, facts: dict[str, Any]) -> None:
        """Write down that a candidate was judged and the current drafter stays.

        Args:
            drafter: The candidate's hash; it keeps that name.
            against: The drafter that it was compared with, which must still be current.
            facts: Why.

        Raises:
            ValueError: Another drafter has become current meanwhile.
        """

        def kept(roles: Roles) -> Roles:
            return replace(roles, candidate=None if drafter == roles.current else drafter)

        self._switch(KEPT, kept, against=against, facts=facts)

    def roll_back(self) -> Event:
        """Exchange `current` and `previous`; a second time undoes the first.

        Raises:
            ValueError: There is no previous drafter, or its files are damaged.
        """

        def exchanged(roles: Roles) -> Roles:
            require(
                roles.previous is not None,
                f"registry (={self.folder}) has no previous drafter to go back to: nothing was "
                "promoted here yet.",
            )
            assert roles.previous is not None
            self.check(roles.previous)
            return replace(roles, current=roles.previous, previous=roles.current)

        return self._switch(ROLLED_BACK, exchanged, facts={})

    def _switch(
        self,
        kind: str,
        change: Callable[[Roles], Roles],
        *,
        facts: dict[str, Any],
        against: str | None = "",
    ) -> Event:
        """Make all three names mean something new, at once.

        Args:
            kind: Of the event.
            change: From what they mean now.
            facts: Of the event.
            against: What must be current now; empty asks for nothing.
        """
        with self._locked():
            roles = self.roles
            require(
                against == "" or roles.current == against,
                f"{self.folder / 'current'} is {short_name(roles.current)} by now and not "
                f"{short_name(against)}, which the candidate was compared with. Run `tune` under "
                "another name.",
            )
            event = Event(
                number=self._active_number() + 1,
                kind=kind,
                time=self._clock().strftime("%Y-%m-%dT%H:%M:%SZ"),
                who=_user_and_machine(),
                roles=change(roles),
                facts=facts,
            )
            self._write_state(event)
            self._activate(event.number)
            self._write_history()
        return event

    def _write_state(self, event: Event) -> None:
        """Write the folder of a state under the name that it will have."""
        with atomic_path(self._state_folder(event.number)) as partial:
            partial.mkdir()
            for role in ROLES:
                drafter = getattr(event.roles, role)
                if drafter is not None:
                    target = Path("..", "..", DRAFTERS, self.drafter_folder(drafter).name)
                    (partial / role).symlink_to(target, target_is_directory=True)
            (partial / EVENT_NAME).write_bytes(event.to_json())
            _sync(partial / EVENT_NAME, partial)
        _sync(self.folder / STATES)

    def _activate(self, number: int) -> None:
        """Rename the one link through which all three names go."""
        link = self.folder / _NEXT_LINK
        link.unlink(missing_ok=True)
        link.symlink_to(Path(STATES, self._state_folder(number).name), target_is_directory=True)
        os.replace(link, self.folder / STATE_LINK)
        _sync(self.folder)

    def _write_history(self) -> None:
        lines = b"".join(event.to_json() for event in self.history())
        path = self.folder / HISTORY_NAME
        if not path.is_file() or path.read_bytes() != lines:
            write_bytes(path, lines)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other process write meanwhile, and begin by removing what a kill has left."""
        for folder in (self.folder, self.folder / STATES, self.folder / DRAFTERS):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK_NAME).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove_leftovers()
            for role in ROLES:
                name = self.folder / role
                if not name.is_symlink():
                    name.symlink_to(Path(STATE_LINK, role), target_is_directory=True)
            if self._active_number():
                self._write_history()
            yield

    def _remove_leftovers(self) -> None:
        for folder in (self.folder, self.folder / STATES, self.folder / DRAFTERS):
            for partial in folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(partial)
        active = self._active_number()
        for state in (self.folder / STATES).iterdir():
            if int(state.name) > active:
                shutil.rmtree(state)

    def _state_folder(self, number: int) -> Path:
        return self.folder / STATES / f"{number:06d}"

    def _active_number(self) -> int:
        """Give the number of the state that counts; 0 before the first."""
        link = self.folder / STATE_LINK
        return int(link.readlink().name) if link.is_symlink() else 0

    def _event(self, number: int) -> Event:
        path = self._state_folder(number) / EVENT_NAME
        try:
            return Event.from_json(path.read_bytes())
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}. {_RESTORE}") from error


_RESTORE = "Restore the registry from a copy, or begin another one with tune.registry=DIR init=DIR."


def _copy_drafter(source: Path, folder: Path) -> None:
    """Copy what servers read of a drafter, links followed, and have it on the disk."""
    folder.mkdir()
    for pattern in DRAFTER_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
            _sync(folder / path.name)
    _sync(folder)


def _sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _user_and_machine() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def short_name(drafter: str | None) -> str:
    """Give the first digits of a drafter's hash, which name its folder."""
    return "none" if drafter is None else drafter.removeprefix("sha256:")[:_HASH_DIGITS]
