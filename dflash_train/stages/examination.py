"""The verb `doctor`: a checkpoint beside as much evidence as its command names.

    dflash-train doctor checkpoint=DIR [target.name_or_path=NAME] [recipe=NAME]

A recipe always has a target and a run folder, if only by default; they are evidence where the
command says so, since a stranger's checkpoint has nothing to do with the default recipe.
"""

from dataclasses import dataclass

from dflash_train.config import RecipeConfig, require
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target, load_target
from dflash_train.release.doctor import examine
from dflash_train.release.evidence import Decoded, UndecodableTargetError, with_taps
from dflash_train.release.finding import Finding
from dflash_train.stages.workshop import Workshop

NUM_NEW_TOKENS = 24
"""Tokens decoded per prompt."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a command names beside the checkpoint."""

    target: bool
    recipe: bool
    run: bool

    @classmethod
    def of(cls, overrides: list[str]) -> "Scope":
        """Read the keys of a command; without `checkpoint=` it is about a run of its own."""
        names = {override.partition("=")[0].lstrip("+~").split(".")[0] for override in overrides}
        recipe = "recipe" in names or "checkpoint" not in names
        return cls(
            target=recipe or "target" in names,
            recipe=recipe,
            run=recipe or not names.isdisjoint({"name", "runs_dir"}),
        )


def examine_checkpoint(config: RecipeConfig, scope: Scope) -> list[Finding]:
    """Check a drafter, the recipe's or the best one of its run.

    Raises:
        ValueError: There is no such checkpoint, or the target cannot be loaded.
    """
    folder = Workshop(config).checkpoint
    require(
        folder.is_dir(),
        f"checkpoint (={folder}) is not a folder. Run `train` first, or give checkpoint=DIR.",
    )
    return examine(
        folder,
        load_target(config.target, []) if scope.target else None,
        recipe=config if scope.recipe else None,
        run_dir=config.run_dir if scope.run else None,
        decode=decode_prompts,
    )


def decode_prompts(target: Target, drafter: Drafter, prompts: list[list[int]]) -> list[Decoded]:
    """Decode prompts greedily by the target alone and with the drafter.

    Raises:
        UndecodableTargetError: The target has layers that cannot forget rejected tokens.
    """
    from dflash_inference.autoregressive import AutoregressiveDecoder
    from dflash_inference.decoder import SpeculativeDecoder
    from dflash_inference.live_check import find_mismatch
    from dflash_inference.target_pass import require_croppable

    try:
        require_croppable(target)
    except ValueError as error:
        raise UndecodableTargetError(str(error)) from error
    target = with_taps(target, drafter.config.target_layer_ids)
    plainly, speculatively = AutoregressiveDecoder(target), SpeculativeDecoder(target, drafter)
    decoded = []
    for prompt in prompts:
        plain = plainly.generate(prompt, max_new_tokens=NUM_NEW_TOKENS)
        live = speculatively.generate(prompt, max_new_tokens=NUM_NEW_TOKENS)
        mismatch = find_mismatch(plain, live, dtype=target.model.dtype)
        num_tokens = len(plain.output_ids)
        decoded.append(
            Decoded(
                num_tokens=num_tokens,
                num_equal=num_tokens if mismatch is None else mismatch.position,
                num_steps=len(live.steps),
                is_near_tie=mismatch is not None and mismatch.is_near_tie,
            )
        )
    return decoded
