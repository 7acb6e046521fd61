"""A finished run of a tiny random target: what `--smoke` gives the benches to work on.

The figures mean nothing; every step of a bench runs as it does on a real run.
"""

from dataclasses import replace
from pathlib import Path

from dflash_train.config import (
    DataConfig,
    DrafterSettings,
    EvaluateConfig,
    LaunchConfig,
    RecipeConfig,
    TargetConfig,
    TrainingConfig,
)
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FileEntry, Manifest
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import MASK_TOKEN_ID, ask, save_tiny_target, write_conversations

SESSIONS = {"train": "abcdef", "validation": "ghi", "test": "jklm"}
"""Sessions of two turns, each named by a letter."""


def write_tiny_run(folder: Path) -> RecipeConfig:
    """Take a tiny random target from conversations to a checkpoint, and give the recipe."""
    config = RecipeConfig(
        name="tiny",
        runs_dir=str(folder),
        target=TargetConfig(name_or_path=str(save_tiny_target(folder / "target"))),
        drafter=DrafterSettings(
            mask_token_id=MASK_TOKEN_ID, num_taps=2, block_size=4, num_hidden_layers=1
        ),
        data=DataConfig(max_new_tokens=12, batch_size=4),
        training=TrainingConfig(max_steps=2, num_anchors=8),
        evaluate=EvaluateConfig(eval_sets=[], resamples=200),
        launch=LaunchConfig(num_threads=1),
    )
    conversations = config.run_dir / "conversations"
    write_conversations(config, _conversations())
    shards = sorted(conversations.glob("*.jsonl.gz"))
    outputs = [FileEntry.of(path, conversations) for path in shards]
    Manifest(stage="ingest", recipe_hash="sha256:0", outputs=outputs).write(conversations)
    workshop = Workshop(config)
    for name in ("regenerate", "collect", "train"):
        run_stage(workshop, name)
    return replace(config, checkpoint=str(workshop.checkpoint))


def _conversations() -> list[Conversation]:
    """Give sessions of two turns; the first answer in the second one's history is to come."""
    records: list[Conversation] = []
    for split, letters in SESSIONS.items():
        for place, letter in enumerate(letters):
            question = f"question {letter} " * (1 + place % 3)
            records.append(ask(f"{letter}0", question, split=split))
            records.append(ask(f"{letter}1", question, None, "and then?", split=split))
    return records
