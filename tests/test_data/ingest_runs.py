"""Logs of a few calls, and how tests ingest them."""

import json
from pathlib import Path

from dflash_data.ingest.stage import ingest
from dflash_train.config import DataConfig, RecipeConfig
from dflash_train.records.conversation import Conversation, Turn
from dflash_train.records.manifest import Manifest


def recipe(folder: Path, **data: object) -> RecipeConfig:
    """Give the recipe of a run that is only ingested."""
    return RecipeConfig(name="run", runs_dir=str(folder), data=DataConfig(**data))  # type: ignore[arg-type]


def run(config: RecipeConfig, logs: Path, **evaluation: list[Conversation]) -> Manifest:
    """Ingest logs, and give the manifest."""
    manifest = Manifest(stage="ingest", recipe_hash="sha256:0", inputs={"logs": "sha256:1"})
    return ingest(config, logs, evaluation=evaluation, manifest=manifest)


def prompt(text: str) -> Conversation:
    """Give a prompt of an evaluation set."""
    return Conversation(id="sha256:e", source="set", messages=[Turn(role="user", content=text)])


def pair(number: int, *user: str, **envelope: object) -> bytes:
    """Give a logged call without an answer, behind earlier turns; a session begins each hour."""
    messages: list[dict[str, str | None]] = []
    for text in user:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": None}]
    request = {"messages": messages[:-1], "user": "acme", "metadata": {"session_id": f"s{number}"}}
    fields = {"id": f"r{number}-{len(user)}", "created": 1_792_000_000 + 3600 * number + len(user)}
    return json.dumps({**fields, "request": request, "response": None, **envelope}).encode()


def files_of(folder: Path) -> dict[str, bytes]:
    """Give every file below a folder by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
