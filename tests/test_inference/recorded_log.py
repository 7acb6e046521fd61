"""Reading back what `serve` has logged: as lines, and through `ingest`."""

from pathlib import Path
from typing import Any

import orjson

from dflash_data.ingest.stage import ingest
from dflash_train.config import DataConfig, RecipeConfig, TargetConfig
from dflash_train.records.conversation import SPLITS, Conversation, read_split
from dflash_train.records.manifest import Manifest


def recorded(log: Path) -> list[dict[str, Any]]:
    """Read the lines of a log."""
    return [orjson.loads(line) for line in log.read_bytes().splitlines()]


def ingested(
    target: str | Path, log: Path, folder: Path, *, served_as: str = "tiny"
) -> tuple[Manifest, list[Conversation]]:
    """Run `ingest` on a log and give its books and its records."""
    config = RecipeConfig(
        name="recorded",
        runs_dir=str(folder),
        target=TargetConfig(name_or_path=str(target)),
        data=DataConfig(
            logs=str(log), target_aliases=[served_as], max_drop_share=1.0,
            validation_share=0.3, test_share=0.3,  # of a few seconds, and no split may be empty
        ),
    )  # fmt: skip
    manifest = Manifest(stage="ingest", recipe_hash="sha256:0", inputs={"logs": "sha256:1"})
    manifest = ingest(config, log, evaluation={}, manifest=manifest)
    records = [
        record for split in SPLITS for record in read_split(config.run_dir / "conversations", split)
    ]
    return manifest, records
