"""What the stages of one process share: the recipe, and the target once it is loaded."""

import functools
import gc
from pathlib import Path

import torch

from dflash_train.config import CollectEngine, DrafterInit, RecipeConfig
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.initialization import initialize_from_target
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_loading import load_target_config
from dflash_train.features.target_text import WrittenTarget, load_target_text
from dflash_train.features.target_weights import locate_target
from dflash_train.training.accelerator import Accelerator, build_accelerator

SAMPLE_FOLDER = "sample_traffic"


class Workshop:
    """A recipe and what its stages load once: the target, the launch, the drafter's shape."""

    def __init__(self, config: RecipeConfig) -> None:
        """Load nothing yet."""
        self.config = config

    @functools.cached_property
    def drafter_config(self) -> DrafterConfig:
        """The drafter's full shape: the recipe's settings completed by the target's."""
        target_config = load_target_config(locate_target(self.config.target))
        return DrafterConfig.for_target(self.config.drafter, target_config)

    @functools.cached_property
    def target(self) -> Target:
        """The loaded target."""
        return load_target(self.config.target, self.drafter_config.target_layer_ids)

    @property
    def answering_target(self) -> WrittenTarget:
        """The loaded target; where servers answer, its tokenizer is enough."""
        if self.config.data.endpoints.urls:
            return load_target_text(self.config.target, self.drafter_config.target_layer_ids)
        return self.target

    def target_to_read(self) -> WrittenTarget:
        """Give the loaded target; where vLLM runs it in `collect`, its tokenizer is enough.

        Then weights that `regenerate` has loaded are let go, since a machine seldom holds a target
        twice; later stages load them again.
        """
        if self.config.data.collect_engine is not CollectEngine.vllm:
            return self.target
        self.__dict__.pop("target", None)
        gc.collect()
        torch.cuda.empty_cache()
        return load_target_text(self.config.target, self.drafter_config.target_layer_ids)

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """The processes of this launch."""
        return build_accelerator(self.config.launch)

    def new_drafter(self) -> Drafter:
        """Build the drafter that training starts from: a function of the recipe's seed."""
        torch.manual_seed(self.config.seed)
        drafter = Drafter(self.drafter_config)
        if self.config.drafter.init is DrafterInit.target:
            initialize_from_target(drafter, self.target.model)
        return drafter

    @property
    def checkpoint(self) -> Path:
        """The drafter to evaluate: the recipe's choice, else the best one of this run."""
        chosen = self.config.checkpoint
        return Path(chosen) if chosen else self.config.run_dir / "checkpoint" / "best"

    @property
    def sample_log(self) -> Path:
        """Where the simulated fleet's log of this run lies."""
        return self.config.run_dir / SAMPLE_FOLDER / "traffic.jsonl"

    @property
    def log(self) -> str:
        """The log that the run ingests, a path or an address: the recipe's, else the fleet's."""
        given = self.config.data.logs
        return str(self.sample_log) if given is None else given
