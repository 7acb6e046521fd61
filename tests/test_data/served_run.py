"""A run of `regenerate` whose answers come from servers: its recipe and what it left."""

from dataclasses import replace
from typing import Any

from dflash_data.regenerate.stage import regenerate
from dflash_train.config import EndpointsConfig, RecipeConfig
from dflash_train.features.target import Target
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.testing import ask, write_conversations
from tests.test_data.answer_server import Server

RECORDS = [
    ask("a0", "one"),
    ask("a1", "one", None, "two"),
    ask("a2", "one", None, "two", None, "three"),
    ask("b0", "a longer first message than the others"),
    ask("c0", "short", split="test"),
    ask("c1", "short", None, "and on", split="test"),
]


def served_by(config: RecipeConfig, *servers: Server, name: str = "run", **keys: Any) -> Any:
    """Give the recipe in which these servers answer, with a run folder of its own."""
    settings = {"concurrency": 1, "retry_wait_s": 0.01, "max_retries": 6, "timeout_s": 20.0} | keys
    endpoints = EndpointsConfig(urls=[server.url for server in servers], **settings)
    return replace(config, name=name, data=replace(config.data, endpoints=endpoints))


def run(config: RecipeConfig, target: Target, records: list[Conversation] = RECORDS) -> Manifest:
    write_conversations(config, records)
    manifest = Manifest(stage="regenerate", recipe_hash="sha256:test")
    return regenerate(config, target=target, manifest=manifest)


def answers(config: RecipeConfig) -> dict[str, Conversation]:
    folder = config.run_dir / "regenerated"
    both = [*read_split(folder, "train"), *read_split(folder, "test")]
    return {record.id: record for record in both}


def files(config: RecipeConfig) -> dict[str, str]:
    folder = config.run_dir / "regenerated"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}


def counted(manifest: Manifest) -> tuple[int, int, dict[str, int]]:
    assert manifest.counts is not None
    drops = {reason: number for reason, number in manifest.counts.dropped.items() if number}
    return manifest.counts.read, manifest.counts.kept, drops
