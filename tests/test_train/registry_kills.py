"""Kill processes that switch a registry, look at what they leave, and print a line of counts.

    python -m tests.test_train.registry_kills FOLDER SEED

First a process is killed before each file operation of each kind of switch in turn, which leaves no
place out; then some that switch without end are killed at random moments. Whatever they leave, the
three names must mean whole drafters, those of before or those of after.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dflash_train.drafter.checkpoint import drafter_hash
from dflash_train.release.registry import HISTORY_NAME, ROLES, Event, Registry, Roles

FILE_OPERATIONS = {
    "open", "os.rename", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock",
    "shutil.copyfile", "shutil.rmtree",
}  # fmt: skip
NUM_RANDOM_KILLS = 40
LONGEST_LIFE_S = 0.03


def write_drafter(folder: Path, content: str) -> Path:
    """Write what a registry takes for a drafter: it never looks inside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    (folder / "model.safetensors").write_text(content * 1000)
    return folder


def check(registry: Registry) -> Roles:
    """Give what the names mean, after checking that each means a whole drafter."""
    roles = registry.roles
    for role in ROLES:
        link, drafter = registry.folder / role, getattr(roles, role)
        if drafter is None:
            assert not link.exists(), f"{role} means something though it should not"
        else:
            assert drafter_hash(link) == drafter, f"{role} is not the drafter it should be"
    numbers = [event.number for event in registry.history()]
    assert numbers == list(range(1, len(numbers) + 1))
    return roles


def check_next_switch(registry: Registry) -> None:
    """Check that whoever comes after a kill can work, and that no event is lost or invented."""
    events = registry.history()
    registry.nominate(registry.store(registry.folder.parent / "next"), facts={})
    lines = (registry.folder / HISTORY_NAME).read_bytes().splitlines(keepends=True)
    assert [Event.from_json(line) for line in lines] == registry.history()
    assert registry.history()[: len(events)] == events
    assert not list(registry.folder.rglob(".partial-*"))


def switches(folder: Path) -> dict[str, Callable[[Registry], object]]:
    """Give each kind of switch, for a registry that `prepare` has made."""
    sources = {name: folder / name for name in ("first", "second", "third")}
    hashes = {name: drafter_hash(source) for name, source in sources.items()}

    def promote(registry: Registry) -> None:
        registry.promote(registry.store(sources["third"]), against=hashes["second"], facts={})

    return {"promote": promote, "rollback": Registry.roll_back}


def prepare(folder: Path) -> Registry:
    """Give a registry with a current and a previous drafter, as if nothing had been done to it."""
    template, place = Registry(folder / "template"), folder / "registry"
    if template.roles.current is None:
        first = template.adopt(folder / "first")
        template.promote(template.store(folder / "second"), against=first, facts={})
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template.folder, place, symlinks=True)
    return Registry(place)


def run_and_die(action: Callable[[], object], *, at_operation: int) -> bool:
    """Run an action in a process that kills itself before one of its file operations.

    Returns:
        Whether it came to that; else the action ended first.
    """
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, _arguments: tuple[object, ...]) -> None:
            nonlocal done
            if event in FILE_OPERATIONS:
                if done == at_operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        sys.addaudithook(count)
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_everywhere(folder: Path) -> Counter[str]:
    """Kill each kind of switch before each of its file operations."""
    seen: Counter[str] = Counter()
    for switch in switches(folder).values():
        registry = prepare(folder)
        before = registry.roles
        switch(registry)
        after = registry.roles
        place, was_killed = 0, True
        while was_killed:
            registry = prepare(folder)
            was_killed = run_and_die(partial(switch, registry), at_operation=place)
            found = check(registry)
            assert found in (before, after), f"killed at {place}: neither before nor after"
            seen["before" if found == before else "after"] += was_killed
            check_next_switch(registry)
            place += 1
    return seen


def kill_at_random(folder: Path, seed: int) -> Counter[str]:
    """Kill processes that go back and forth without end, at moments of a seed's choice."""
    generator, registry = random.Random(seed), prepare(folder)
    pair = {registry.roles.current, registry.roles.previous}
    seen: Counter[str] = Counter()
    for _ in range(NUM_RANDOM_KILLS):
        before = len(registry.history())
        child = os.fork()
        if child == 0:
            while True:
                registry.roll_back()
        time.sleep(generator.uniform(0, LONGEST_LIFE_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = check(registry)
        assert {found.current, found.previous} == pair
        seen["random"] += 1
        seen["switched"] += len(registry.history()) - before
    check_next_switch(registry)
    return seen


def main(folder: Path, seed: int) -> None:
    """Kill, and print the counts."""
    os.fsync = lambda descriptor: None  # what it guards against is a power cut, not a kill
    for name in ("first", "second", "third", "next"):
        write_drafter(folder / name, name)
    print(json.dumps(kill_everywhere(folder) + kill_at_random(folder, seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
