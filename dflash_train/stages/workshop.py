"""What the stages of one process share: the recipe, and the target once it is loaded."""

import functools
import gc
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from dflash_train.config import CollectEngine, DrafterInit, FeaturesFrom, RecipeConfig, require
from dflash_train.drafter.checkpoint import WEIGHTS_NAME, weight_files
from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.initialization import initialize_from_target
from dflash_train.drafter.model import Drafter
from dflash_train.features.target import Target, load_target
from dflash_train.features.target_shape import own_target_config, planned_target_config
from dflash_train.features.target_text import WrittenTarget, load_target_text
from dflash_train.release.resolve import resolve_checkpoint
from dflash_train.stages.drafters import import_drafter
from dflash_train.training.accelerator import Accelerator, build_accelerator
from dflash_train.training.initial_weights import check_start

SAMPLE_FOLDER = "sample_traffic"


class Workshop:
    """A recipe and what its stages load once: the target, the launch, the drafter's shape."""

    def __init__(self, config: RecipeConfig) -> None:
        """Load nothing yet."""
        self.config = config

    @functools.cached_property
    def drafter_config(self) -> DrafterConfig:
        """The drafter's full shape: the recipe's settings completed by the target's."""
        own = own_target_config(self.config.target)
        return DrafterConfig.for_target(self.config.drafter, own)

    @functools.cached_property
    def planned_target_config(self) -> PreTrainedConfig:
        """The target's text configuration for a plan: the recipe's where its own is unreachable."""
        return planned_target_config(self.config.target)

    @functools.cached_property
    def planned_drafter_config(self) -> DrafterConfig:
        """The drafter's full shape for a plan, which computes nothing."""
        return DrafterConfig.for_target(self.config.drafter, self.planned_target_config)

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
        """Give the loaded target; where `collect` does not run it, its tokenizer is enough.

        Before vLLM runs it, weights that `regenerate` has loaded are let go, since a machine seldom
        holds a target twice; later stages load them again. Where features are online, `train` needs
        them next, and they stay.
        """
        data = self.config.data
        is_loaded = "target" in self.__dict__
        if data.collect_engine is not CollectEngine.vllm:
            if is_loaded or data.features is FeaturesFrom.stored:
                return self.target
            return load_target_text(self.config.target, self.drafter_config.target_layer_ids)
        self.let_target_go()
        return load_target_text(self.config.target, self.drafter_config.target_layer_ids)

    def let_target_go(self) -> None:
        """Free the memory of the target, if it is loaded; who asks for it next loads it again."""
        self.__dict__.pop("target", None)
        gc.collect()
        torch.cuda.empty_cache()

    @functools.cached_property
    def accelerator(self) -> Accelerator:
        """The processes of this launch."""
        return build_accelerator(self.config.launch)

    def new_drafter(self) -> Drafter:
        """Build the drafter that training starts from: `init`, or a function of the seed.

        Raises:
            ValueError: The drafter of `init` cannot be read, or contradicts the recipe.
        """
        if self.config.init is not None:
            return self.initial_drafter(self.config.init)
        torch.manual_seed(self.config.seed)
        drafter = Drafter(self.drafter_config)
        if self.config.drafter.init is DrafterInit.target:
            initialize_from_target(drafter, self.target.model)
        return drafter

    def initial_drafter(self, init: str) -> Drafter:
        """Read the drafter that `init` names, if its weights can mean the same in this run.

        Raises:
            ValueError: It cannot be read, or contradicts the recipe.
        """
        drafter = import_drafter(self.initial_folder(init), self.config.target).drafter
        check_start(drafter.config, self.drafter_config, init=init)
        return drafter

    def initial_folder(self, init: str) -> Path:
        """Give the folder of the drafter that `init` names.

        Raises:
            ValueError: It is none, or training would empty it first.
        """
        folder = resolve_checkpoint(init, revision=self.config.init_revision, key="init")
        require(
            not folder.resolve().is_relative_to((self.config.run_dir / "checkpoint").resolve()),
            f"init (={init}) lies where this run writes its own drafter. Give the run another "
            "name.",
        )
        require(
            bool(weight_files(folder)),
            f"init (={init}) holds no {WEIGHTS_NAME}. Give the folder of a drafter.",
        )
        return folder

    @functools.cached_property
    def checkpoint(self) -> Path:
        """The drafter to read: the recipe's choice, else the best one of this run.

        Raises:
            ValueError: The choice is no folder and no drafter that the Hub gives.
            UnavailableError: The Hub cannot be reached.
        """
        chosen, revision = self.config.checkpoint, self.config.checkpoint_revision
        if chosen is not None:
            return resolve_checkpoint(chosen, revision=revision)
        require(
            revision is None,
            f"checkpoint_revision (={revision}) goes with checkpoint (=null). Give checkpoint=ID.",
        )
        return self.config.run_dir / "checkpoint" / "best"

    @property
    def sample_log(self) -> Path:
        """Where the simulated fleet's log of this run lies."""
        return self.config.run_dir / SAMPLE_FOLDER / "traffic.jsonl"

    @property
    def log(self) -> str:
        """The log that the run ingests, a path or an address: the recipe's, else the fleet's."""
        given = self.config.data.logs
        return str(self.sample_log) if given is None else given
