"""Every recipe as a small run: a tiny target of its architecture, a few conversations, sizes."""

from pathlib import Path

from dflash_train.config import RecipeConfig, compose
from dflash_train.records.manifest import Manifest
from dflash_train.testing import MASK_TOKEN_ID, ask, write_conversations
from tests.test_train.recipe_targets import save_recipe_target

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIZES = [
    f"drafter.mask_token_id={MASK_TOKEN_ID}",
    "drafter.num_hidden_layers=2",
    "target.dtype=float32",
    "data.max_new_tokens=24",
    "training.max_steps=2",
    "training.minutes=null",
    "training.validate_every=2",
    "training.save_every=2",
    "training.log_every=1",
    "training.num_anchors=8",
    "training.pack_tokens=256",
    "evaluate.eval_sets=[]",
    "evaluate.live_traffic=0",
    "evaluate.live_per_set=0",
    "launch.num_threads=1",
]
TRAIN = [ask(f"{name}0", f"question {name}" * (place + 1)) for place, name in enumerate("abcdefgh")]
HELD_OUT = [
    ask(f"{name}0", f"held out {name}", split=split)
    for name, split in (("i", "validation"), ("j", "validation"), ("k", "test"), ("l", "test"))
]
OWN_SIZES = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64
}  # fmt: skip
"""Of drafters whose recipe writes such a size; the others copy the tiny target's."""


def small_overrides(name: str, folder: Path) -> list[str]:
    """Write a recipe's tiny target, and give the words behind `recipe=NAME` that make a small run.

    Overridden are the target and sizes alone.
    """
    written = compose([f"recipe={name}"], str(RECIPES))
    target = save_recipe_target(written.target, folder / "target")
    own = [
        f"drafter.{key}={size}"
        for key, size in OWN_SIZES.items()
        if getattr(written.drafter, key) is not None
    ]
    return [f"runs_dir={folder}", f"target.name_or_path={target}", *SIZES, *own]


def small_recipe(name: str, overrides: list[str]) -> RecipeConfig:
    """Compose such a run, and put conversations where `ingest` leaves them."""
    config = compose([f"recipe={name}", *overrides], str(RECIPES))
    write_conversations(config, [*TRAIN, *HELD_OUT])
    Manifest(stage="ingest", recipe_hash="r").write(config.run_dir / "conversations")
    return config
