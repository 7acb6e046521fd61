"""What a tuning would do, as lines to print: `dflash-train tune ... --dry-run`. Nothing is written.

Each stage that is not complete says what it would take, as far as the stages before it are there to
tell; the registry stays as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields

from dflash_train.config import DrafterSettings, RecipeConfig
from dflash_train.features.store import FeatureStore, read_index
from dflash_train.records.manifest import Manifest
from dflash_train.release.registry import short_name
from dflash_train.stages import estimates
from dflash_train.stages.earlier_runs import (
    described,
    earlier_validation,
    earlier_window,
    mix,
)
from dflash_train.stages.table import BLEND, TUNE
from dflash_train.stages.tune.blending import most_measured, some_of_each_tenant
from dflash_train.stages.tune.rule_book import BOOK_NAME
from dflash_train.stages.tune.start import Tuning, plan_tuning
from dflash_train.stages.tune.walk import looking_again, stage_names
from dflash_train.stages.walk import is_complete
from dflash_train.stages.workshop import Workshop

_Estimate = Callable[[RecipeConfig], Iterator[str]]


def foresee(config: RecipeConfig, *, force: bool = False) -> Iterator[str]:
    """Yield who would be tuned, by which rule the result would be judged, and each stage's share.

    Args:
        config: The recipe as the user gave it.
        force: Every stage would be done again.

    Raises:
        ValueError: The tuning could not begin.
    """
    tuning = plan_tuning(config, force=force)
    workshop = Workshop(tuning.config)
    tuning = looking_again(workshop, tuning)
    yield from _beginning(config, tuning)
    for name in stage_names(tuning.config):
        is_stale = name == TUNE.name and tuning.is_new  # its rule is not the one that was written
        if not (force or is_stale) and is_complete(workshop, name):
            yield f"{name}: complete and unchanged, nothing to do"
        else:
            yield from (f"{name}: {line}" for line in _share(tuning.config, name))


def _beginning(given: RecipeConfig, tuning: Tuning) -> Iterator[str]:
    config, book = tuning.config, tuning.book
    yield from tuning.registry.lines()
    yield f"incumbent: {short_name(book.incumbent)}"
    yield f"start: {config.init}"
    place = config.run_dir / BOOK_NAME
    verb = "will be written to" if tuning.is_new else "stands in"
    yield f"rule {book.rule.hash} {verb} {place}; promoted if:"
    yield from (f"  {sentence}" for sentence in book.rule.sentences())
    yield (
        f"learning rate: {config.optim.lr:g}, {config.tune.lr_factor:g} of the recipe's; stops "
        f"after {config.tune.patience} validations without a better acceptance length"
    )
    keys = " ".join(_keys_of_training(given, config))
    yield f"several GPUs: train with `accelerate launch train.py` and the keys of this run, {keys}"


def _keys_of_training(given: RecipeConfig, tuned: RecipeConfig) -> list[str]:
    """Give the keys that make `train` the training of a tuning, beside those that were given."""
    shape = {each.name: getattr(tuned.drafter, each.name) for each in fields(DrafterSettings)}
    return [
        f"init={tuned.init}",
        f"optim.lr={tuned.optim.lr!r}",
        f"optim.muon_lr={tuned.optim.muon_lr!r}",
        f"training.patience={tuned.training.patience}",
        *(
            f"drafter.{name}={'null' if value is None else value}".replace(" ", "")
            for name, value in shape.items()
            if value != getattr(given.drafter, name)
        ),
    ]


def _share(config: RecipeConfig, name: str) -> Iterator[str]:
    """Yield what one stage would take."""
    needed, estimate = _ESTIMATES[name]
    if name == "ingest" and config.data.logs is not None:
        needed = ()
    missing = [folder for folder in needed if Manifest.read(config.run_dir / folder) is None]
    if missing:
        yield f"to be done; what it takes is known once {config.run_dir / missing[0]} is there"
    else:
        yield from estimate(config)


def _play(config: RecipeConfig) -> Iterator[str]:
    yield f"{config.data.sample.requests} requests of the simulated fleet"


def _train(config: RecipeConfig) -> Iterator[str]:
    if config.tune.replay_from:
        own = FeatureStore.open(config.run_dir / "features" / "train", verify=False)
        yield described(mix(config, own, verify=False))
    yield from estimates.estimate_training(config)


def _blend(config: RecipeConfig) -> Iterator[str]:
    tune = config.tune
    if len(tune.blends) == 1:
        yield f"{tune.blends[0]:.0%} of the tuning, as tune.blends says"
        return
    folder = config.run_dir / "features" / "validation"
    own = FeatureStore.open(folder, verify=False, needs_features=False)
    earlier = earlier_validation(config, verify=False)
    windows = [own] if earlier is None else [own, earlier]
    num_answers = sum(len(some_of_each_tenant(rows, tune.blend_rows)) for rows in windows)
    num_blends = most_measured(len(tune.blends))
    yield (
        f"the start and up to {num_blends} blends on {num_answers} validation answers, here and in "
        "earlier runs"
    )


def _judge(config: RecipeConfig) -> Iterator[str]:
    num_answers = len(read_index(config.run_dir / "features" / "test"))
    earlier = earlier_window(config, verify=False)
    text = f"two drafters on {num_answers} answers of the newest window"
    yield text if earlier is None else f"{text} and {len(earlier)} of earlier runs"


_ESTIMATES: dict[str, tuple[tuple[str, ...], _Estimate]] = {
    "sample-traffic": ((), _play),
    "ingest": (("sample_traffic",), estimates.estimate_ingest),
    "regenerate": (("conversations",), estimates.estimate_regeneration),
    "collect": (("conversations", "regenerated"), estimates.estimate_collection),
    "train": (("features",), _train),
    BLEND.name: (("features",), _blend),
    TUNE.name: (("features",), _judge),
}
"""By stage: the folders of a run that its estimate needs, and the estimate."""
