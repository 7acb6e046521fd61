"""Every setting of a recipe, with its unit and its check: one dataclass per group."""

from dflash_train.config.checks import UnavailableError, require
from dflash_train.config.data import DataConfig, SampleTrafficConfig
from dflash_train.config.learning import (
    LaunchConfig,
    LossConfig,
    OptimConfig,
    OptimizerName,
    Precision,
    ScheduleName,
    TrainingConfig,
    Weighting,
)
from dflash_train.config.models import (
    Attention,
    DrafterInit,
    DrafterSettings,
    Dtype,
    TargetConfig,
)
from dflash_train.config.recipe import (
    EvaluateConfig,
    RecipeConfig,
    TrackingConfig,
    WandbMode,
    compose,
    known_recipes,
    recipes_dir,
    register,
    to_plain,
)

__all__ = [
    "Attention", "DataConfig", "DrafterInit", "DrafterSettings", "Dtype", "EvaluateConfig",
    "LaunchConfig", "LossConfig", "OptimConfig", "OptimizerName", "Precision", "RecipeConfig",
    "SampleTrafficConfig", "ScheduleName", "TargetConfig", "TrackingConfig", "TrainingConfig",
    "UnavailableError", "WandbMode", "Weighting", "compose", "known_recipes", "recipes_dir",
    "register", "require", "to_plain",
]  # fmt: skip
