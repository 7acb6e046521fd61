"""A complete recipe and how it is composed.

`register()` puts the dataclasses into hydra's ConfigStore; `recipes/config.yaml` names the
schema first, so a misspelt key fails before anything runs. `compose()` gives the finished
`RecipeConfig`: plain dataclasses, no DictConfig goes further. Checks never change a value.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dflash_train.config.checks import require
from dflash_train.config.data import DataConfig
from dflash_train.config.drift import DriftConfig
from dflash_train.config.learning import LaunchConfig, LossConfig, OptimConfig, TrainingConfig
from dflash_train.config.models import DrafterSettings, TargetConfig
from dflash_train.config.plan import PlanConfig
from dflash_train.config.serving import ServeConfig
from dflash_train.config.tuning import TuneConfig


class WandbMode(Enum):
    """Where W&B writes: to its service, or to a local folder for a later `wandb sync`."""

    online = "online"
    offline = "offline"


PROMPT_SUFFIXES = (".jsonl", ".jsonl.gz")


def set_name(entry: str) -> str:
    """Give the name of an evaluation set: a file of prompts is named without folder and suffix."""
    suffix = next((each for each in PROMPT_SUFFIXES if entry.endswith(each)), None)
    return entry if suffix is None else Path(entry).name.removesuffix(suffix)


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured, on which prompts."""

    eval_sets: list[str] = field(default_factory=lambda: ["humaneval"])
    """Evaluation sets beside the held-out traffic, never trained on: humaneval, gsm8k, math500,
    mbpp, mt-bench, or a file of prompts (`prompts.jsonl`), whose name without suffix is the
    set's."""
    datasets_dir: str | None = None
    """Folder with copies of the Hub's dataset repositories as OWNER/NAME, for machines without
    network; None asks the Hub or its local cache."""
    prompts_per_set: int = 50
    """Prompts taken from each evaluation set, at most; below 50 the report makes no claim."""
    live_traffic: int = 8
    """Held-out requests decoded live."""
    live_per_set: int = 4
    """Prompts of each evaluation set decoded live."""
    live_max_new_tokens: int = 48
    """Budget of a live answer, in tokens."""
    fast: bool = True
    """Decode live as `serve.fast` does, so that speeds are those that a user gets; without a C++
    compiler, exactly. A near-tie may turn and is listed. False shows exactness: eager mode."""
    resamples: int = 10_000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap and of the choice of live prompts."""
    concurrency: str | None = None
    """File with tokens per second at several requests at once, which the report shows."""
    cost_tables: list[str] = field(default_factory=list)
    """Files with the seconds of a step on other hardware, for which the report predicts."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_set", "live_max_new_tokens", "resamples"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name} (={value}) must be at least 1.")
        for name in ("live_traffic", "live_per_set"):
            value = getattr(self, name)
            require(value >= 0, f"evaluate.{name} (={value}) must not be negative.")
        names = [name for name, _ in self.sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(
            not twice,
            f"evaluate.eval_sets (={self.eval_sets}) names {', '.join(twice)} twice. Rename a file "
            "or leave one out.",
        )

    @property
    def sets(self) -> list[tuple[str, str]]:
        """Name of each evaluation set, as files and slices carry it, and its entry here."""
        return [(set_name(entry), entry) for entry in self.eval_sets]


class ExecutorKind(Enum):
    """Where the tasks of the ingest stage run."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass(kw_only=True)
class ExecutorConfig:
    """Where and how widely the ingest stage runs; never changes a byte of its result."""

    kind: ExecutorKind = ExecutorKind.local
    """Processes of this machine, a Slurm cluster or a Ray cluster."""
    workers: int | None = None
    """Tasks that run at once; None takes the cores of this machine, on Slurm no limit."""
    memory_gb: int = 2
    """Memory of one task in GB, which Slurm and Ray set aside."""
    slurm_partition: str = "cpu"
    """Partition of the cluster."""
    slurm_time: str = "04:00:00"
    """Longest time of one task, hours:minutes:seconds."""
    slurm_environment: str = ""
    """Shell command that activates this environment on a node, such as `source .venv/bin/activate`;
    empty if it is already active there."""
    ray_address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""

    def __post_init__(self) -> None:
        require(
            self.workers is None or self.workers >= 1,
            f"executor.workers (={self.workers}) must be at least 1. Leave it out for all cores.",
        )
        require(
            self.memory_gb >= 1,
            f"executor.memory_gb (={self.memory_gb}) must be at least 1. Set it to 2.",
        )


@dataclass(kw_only=True)
class TrackingConfig:
    """Where curves go. `metrics.jsonl` is always written."""

    wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`)."""
    wandb_project: str = "dflash-train"
    """Project name there."""
    wandb_mode: WandbMode = WandbMode.online
    """Send at once, or keep in the run folder."""
    tensorboard: bool = False
    """Also write TensorBoard files to `tensorboard/` in the run folder (extra `tensorboard`)."""


@dataclass(kw_only=True)
class RecipeConfig:
    """A complete run: logs to report."""

    name: str = MISSING
    """Name of the run; its folder is `runs_dir/name`."""
    runs_dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 0
    """Seed of initialisation, anchors and row order."""
    checkpoint: str | None = None
    """Drafter for every verb that reads one, a folder or a Hub id; None takes the best one of this
    run."""
    checkpoint_revision: str | None = None
    """Branch, tag or commit of a Hub `checkpoint`; None takes the default branch."""
    init: str | None = None
    """Drafter (folder or OWNER/NAME of the Hub) whose weights training starts from, in place of
    `drafter.init`; optimiser and steps are new. None starts afresh."""
    init_revision: str | None = None
    """Branch, tag or commit of a Hub `init`; None takes the default branch."""
    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterSettings = field(default_factory=DrafterSettings)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)

    def __post_init__(self) -> None:
        soft, top_k = self.loss.soft_names, self.data.teacher_top_k
        require(
            not soft or top_k > 0,
            f"loss.{', loss.'.join(soft)} (above 0) compare with the target's distributions, but "
            f"data.teacher_top_k (={top_k}) keeps none. Set data.teacher_top_k to 8 and run "
            "`collect`, or these terms to 0.",
        )
        require(
            self.training.head_sample == 0 or self.drafter.draft_vocab_size is None,
            f"training.head_sample (={self.training.head_sample}) samples the whole vocabulary, "
            f"which drafter.draft_vocab_size (={self.drafter.draft_vocab_size}) reduces. Set "
            "training.head_sample to 0.",
        )

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.runs_dir) / self.name


def register() -> None:
    """Put the schema into hydra's ConfigStore under the name `schema`."""
    ConfigStore.instance().store(name="schema", node=RecipeConfig)


def recipes_dir(chosen: str | None = None) -> Path:
    """Find the recipes: `--recipes DIR`, else `./recipes`, else the copy inside the wheel.

    Raises:
        ValueError: The chosen folder holds no `config.yaml`.
    """
    packaged = Path(__file__).resolve().parents[1] / "recipes"
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    candidates = [Path(chosen)] if chosen else [Path("recipes"), packaged, checkout]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ValueError(f"--recipes (={chosen}) holds no config.yaml. Give the folder that does.")


def known_recipes(folder: Path) -> list[str]:
    """List the names that `recipe=` accepts."""
    return sorted(path.stem for path in (folder / "recipe").glob("*.yaml"))


def compose(overrides: list[str], recipes: str | None = None) -> RecipeConfig:
    """Compose and check a recipe from command-line overrides such as `recipe=smollm2
    optim.lr=1e-3`.

    Raises:
        ValueError: An unknown key, a wrong type, a failing check or a required value left open.
    """
    register()
    folder = recipes_dir(recipes)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = hydra_compose("config", overrides=overrides)
        missing = sorted(OmegaConf.missing_keys(composed))
        require(not missing, f"{', '.join(missing)} must be set: add KEY=VALUE to the command.")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, folder)) from error
    assert isinstance(config, RecipeConfig)
    require(
        config.training.max_steps is not None or config.training.minutes is not None,
        "training.max_steps (=null) or training.minutes (=null) must be set, the length of the "
        "run: add training.minutes=30 to the command.",
    )
    return config


def _explain(error: Exception, folder: Path) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
    key = getattr(cause, "full_key", None)
    where = f"{key}: " if key and key not in first_line else ""
    return (
        f"recipe: {where}{first_line}. Known recipes: {', '.join(known_recipes(folder))}; "
        "`dflash-train run recipe=NAME --print-recipe` prints every key."
    )


def to_plain(config: Any) -> dict[str, Any]:
    """Give a config dataclass as plain JSON values: enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
