"""What a tuning starts from: drafter, settings and rule, all fixed before anything is trained.

The incumbent is the registry's `current`; the start is `init`, else the incumbent. A tuning is an
ordinary run with ordinary keys: `init`, a lower learning rate, `training.patience`, and the shape
of the drafter that it starts from.

The learning rate is the recipe's times `tune.lr_factor`. The recipe's is chosen for weights that
know nothing: at that rate the first steps move a finished drafter a long way, and what they undo
has to be learnt again from less data. 0.3 is a cautious choice and no measured optimum; which rate
is best depends on how new the traffic is, and the early stop by replay, for which the start counts
too, keeps one that is too high from doing harm.
"""

import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from dflash_train.config import RecipeConfig, require
from dflash_train.records.manifest import Manifest
from dflash_train.release.promotion import PromotionRule
from dflash_train.release.registry import KEPT, PROMOTED, Event, Registry, short_name
from dflash_train.release.resolve import resolve_checkpoint
from dflash_train.stages.earlier_runs import check_earlier_runs
from dflash_train.stages.tune.fit import KnownDrafter, check_rival, settings_of
from dflash_train.stages.tune.rule_book import RuleBook, read_book
from dflash_train.stages.workshop import Workshop

TUNING_FOLDER = "tuning"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One tuning, ready to run."""

    config: RecipeConfig
    """The recipe as the stages see it."""
    registry: Registry
    book: RuleBook
    is_new: bool
    """The book is not the one that the run's folder holds, if that holds one."""
    event: Event | None
    """The switch by which this tuning ended already; None before."""


def plan_tuning(config: RecipeConfig, *, force: bool = False) -> Tuning:
    """Find out what a tuning starts from; nothing is written.

    Args:
        config: The recipe as the user gave it.
        force: Begin again although the run was judged already.

    Raises:
        ValueError: There is no drafter to start from, it, the one that serves or an earlier run
            does not fit, or the registry has changed since an unfinished run began.
    """
    _check_settings(config)
    registry = Registry(Path(config.tune.registry))
    current, stored = registry.roles.current, read_book(config.run_dir)
    event = None if stored is None else ending(registry, stored)
    given = None if config.init is None else _given_start(config, config.init)
    if stored is not None and event is not None and not force:
        given = _as_it_began(given, config, registry, stored=stored, event=event)
    serving = current or (None if given is None else given.hash)
    require(
        serving is not None,
        f"tune.registry (={registry.folder}) has no current drafter yet. Give the one that serves "
        "as init=DIR|HUB_ID: it becomes current.",
    )
    assert serving is not None
    start_hash = None if given is None else given.hash
    book = _book(config, serving, start_hash, stored, event, force=force)
    start = given or _registered(registry, book.start, config)
    is_new = stored is None or stored.hash != book.hash
    tuned = tuned_recipe(config, start)
    if book.incumbent != start.hash and (is_new or event is None):  # else they were compared
        check_rival(_registered(registry, book.incumbent, config), start)
    check_earlier_runs(Workshop(tuned))
    return Tuning(
        config=tuned,
        registry=registry,
        book=book,
        is_new=is_new,
        event=None if force else event,
    )


def begin(tuning: Tuning) -> None:
    """Write down what a tuning has committed itself to: the rule, and a registry's first drafter.

    Raises:
        ValueError: The drafter of `init` does not fit the target.
    """
    init = tuning.config.init
    assert init is not None, "a tuned recipe has one"
    if tuning.registry.roles.current is None:
        Workshop(tuning.config).initial_drafter(init)  # one that does not fit never serves
        tuning.registry.adopt(Path(init))
    if tuning.is_new:
        if tuning.book.judged_before:
            _say("this run was judged before, and is judged again: the verdict will say so")
        tuning.book.write(tuning.config.run_dir)


def ending(registry: Registry, book: RuleBook) -> Event | None:
    """Give the last switch by which the tuning of a book ended, by this rule or an earlier one."""
    rules = {book.hash, *book.judged_before}
    found = [
        each
        for each in registry.history()
        if each.kind in (PROMOTED, KEPT) and each.facts["rule"] in rules
    ]
    return found[-1] if found else None


def was_judged(config: RecipeConfig, book: RuleBook, event: Event | None) -> bool:
    """Tell whether a run came to a verdict by this very book.

    Args:
        config: Names the run.
        book: The one.
        event: The switch by which the run ended last, by this book or one before.
    """
    done = Manifest.read(config.run_dir / TUNING_FOLDER)
    by_event = event is not None and event.facts["rule"] == book.hash
    return by_event or (done is not None and done.inputs.get("rule") == book.hash)


def tuned_recipe(config: RecipeConfig, start: KnownDrafter) -> RecipeConfig:
    """Give the recipe of the stages of a tuning.

    Args:
        config: The recipe as the user gave it.
        start: The drafter to start from.

    Raises:
        ValueError: It is of another target, or its kind excludes a setting.
    """
    settings = settings_of(start, config)
    if settings.get("final_logit_softcapping", 0) is None:
        settings["final_logit_softcapping"] = 0.0  # the recipe's word for none
    factor, optim = config.tune.lr_factor, config.optim
    return replace(
        config,
        init=str(start.folder),
        init_revision=None,
        drafter=replace(config.drafter, **settings),
        optim=replace(optim, lr=factor * optim.lr, muon_lr=factor * optim.muon_lr),
        training=replace(config.training, patience=config.tune.patience),
    )


def _check_settings(config: RecipeConfig) -> None:
    from dflash_inference.statistics import FEWEST_FOR_A_CLAIM

    require(
        config.checkpoint is None,
        f"checkpoint (={config.checkpoint}) names a finished drafter, and a tuning trains one. "
        "Give the drafter to start from as init, or leave both out for the registry's current.",
    )
    require(
        config.training.patience is None,
        f"training.patience (={config.training.patience}) is tune.patience in a tuning. Set that.",
    )
    require(
        config.tune.min_requests >= FEWEST_FOR_A_CLAIM,
        f"tune.min_requests (={config.tune.min_requests}) must be at least {FEWEST_FOR_A_CLAIM}: "
        "fewer make no claim. Set it to 100.",
    )


def _given_start(config: RecipeConfig, init: str) -> KnownDrafter:
    folder = resolve_checkpoint(init, revision=config.init_revision, key="init")
    require(
        not folder.resolve().is_relative_to((config.run_dir / "checkpoint").resolve()),
        f"init (={init}) lies where this run writes its own drafter. Give the run another name.",
    )
    return KnownDrafter.read(folder, config, named=f"init (={init})")


def _registered(registry: Registry, drafter: str, config: RecipeConfig) -> KnownDrafter:
    registry.check(drafter)
    named = f"tune.registry (={registry.folder}): its drafter {short_name(drafter)}"
    return KnownDrafter.read(registry.drafter_folder(drafter), config, named=named)


def _as_it_began(
    given: KnownDrafter | None,
    config: RecipeConfig,
    registry: Registry,
    *,
    stored: RuleBook,
    event: Event,
) -> KnownDrafter | None:
    """Give what the run started from where `init` has come to mean what it ended with.

    `init=registry/current` does, once the run's candidate was promoted: its command, given again,
    still means the same run.
    """
    became = given is not None and given.hash == event.facts["candidate"] != stored.start
    if became and event.kind == PROMOTED and registry.drafter_folder(stored.start).is_dir():
        return _registered(registry, stored.start, config)
    return given


def _book(
    config: RecipeConfig,
    serving: str,
    given: str | None,
    stored: RuleBook | None,
    event: Event | None,
    *,
    force: bool,
) -> RuleBook:
    """Give the book of the recipe: the stored one, unless something in it has changed.

    Args:
        config: The recipe.
        serving: The drafter that serves.
        given: That of `init`, if it is set.
        stored: What the run committed itself to before.
        event: How that ended.
        force: Begin again against the drafter that serves.

    Raises:
        ValueError: Another drafter serves than when this unfinished run began.
    """
    if stored is None or force or stored.incumbent == serving:
        incumbent = serving
    else:
        require(
            event is not None,
            f"{config.tune.registry}/current has changed since {config.run_dir} was begun against "
            "another drafter. Give the run another name, or begin again with --force.",
        )
        incumbent = stored.incumbent
    mark = f"{config.name}-{secrets.token_hex(4)}" if stored is None else stored.run
    book = RuleBook(run=mark, rule=_rule(config), incumbent=incumbent, start=given or incumbent)
    if stored is None:
        return book
    is_same = replace(stored, judged_before=[]) == book
    before = stored.judged_before
    if was_judged(config, stored, event) and (force or not is_same):
        before = [*before, stored.hash]
    return replace(book, judged_before=before)


def _rule(config: RecipeConfig) -> PromotionRule:
    from dflash_inference.statistics import FEWEST_FOR_A_CLAIM

    return PromotionRule(
        min_requests=config.tune.min_requests,
        tenant_margin=config.tune.tenant_margin,
        fewest_requests=FEWEST_FOR_A_CLAIM,
        resamples=config.evaluate.resamples,
        seed=config.evaluate.seed,
    )


def _say(message: str) -> None:
    tqdm.write(f"tune: {message}", file=sys.stderr)
