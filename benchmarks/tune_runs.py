"""Runs of the tuning protocol: each set of tenants as a whole, and tunings to single tenants.

A set's own run (`fleet`, `prompts`) takes all its logs from `ingest` to `collect` and trains the
other set's generic drafter. A tuning is `dflash-train tune` on one tenant's log; both sets' own
runs are its `tune.replay_from`, so its verdict holds the gains of the tenant and of everybody else,
and with `tune.replay_share` above 0 their older rows are trained on again.
"""

import os
import shutil
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from benchmarks.bench_runs import tell
from benchmarks.gsm8k_data import link_data
from benchmarks.tune_logs import (
    GSM8K,
    MODEL,
    OASST,
    answered_calls,
    gsm8k_calls,
    oasst_calls,
    spread_over_time,
    write_fleet_log,
    write_log,
    write_logs,
)
from dflash_data.privacy.pseudonyms import load_pseudonyms
from dflash_train.config import RecipeConfig, compose, require
from dflash_train.features.target_text import load_target_text
from dflash_train.records.manifest import Manifest, write_bytes
from dflash_train.stages.tune.walk import tune
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop

BENCH = "bench-tune"
KEY_FILE = "hmac-key"
"""One key for all runs, else each would give a tenant and a session another name."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class TenantSet:
    """Tenants that are served together."""

    name: str
    tuned: tuple[str, str]
    """The tenants that a drafter is tuned to."""
    others: tuple[str, ...]
    max_new_tokens: int
    test_share: float
    """Newest share of the time, so that each tuned tenant has 200 requests there."""
    validation_share: float
    num_requests: int | None = None
    """Of the simulated fleet."""

    @property
    def tenants(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.tuned, *self.others)


FLEET = TenantSet(
    name="fleet",
    tuned=("sum-school", "code-tour"),
    others=("back-office", "doc-digest", "campus-desk"),
    max_new_tokens=64,
    test_share=0.25,
    validation_share=0.08,
    num_requests=3400,
)
PROMPTS = TenantSet(
    name="prompts",
    tuned=(GSM8K, OASST),
    others=(),
    max_new_tokens=128,
    test_share=0.30,
    validation_share=0.06,
)
SETS = {each.name: each for each in (FLEET, PROMPTS)}
OTHER = {FLEET.name: PROMPTS, PROMPTS.name: FLEET}
"""Whose generic drafter a set begins with: one that has seen none of its tenants."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is run, and where it is kept."""

    out: Path
    minutes: float
    """Of each tuning."""
    generic_minutes: float
    """Of a generic drafter's training."""
    replay_share: float
    generic: dict[str, str]
    """By set: a drafter to begin with, in place of the other set's."""
    num_steps: int | None
    """Of each tuning, in place of minutes."""
    overrides: tuple[str, ...]

    @property
    def logs(self) -> Path:
        """Folder with a folder of logs for each set."""
        return self.out / "logs"


def prepare_logs(protocol: Protocol, tenants: TenantSet, *, data: Path | None) -> None:
    """Write the answered logs of a set, unless all of them are there.

    Args:
        protocol: Says where.
        tenants: The set.
        data: Folder with `gsm8k`, `gsm8k_smollm2` and `oasst`, which `prompts` needs.

    Raises:
        ValueError: `prompts` has no folder, or a file is missing in it.
    """
    folder = protocol.logs / tenants.name
    paths = [folder / f"{tenant}.jsonl" for tenant in tenants.tenants]
    if not all(path.is_file() for path in paths):
        asked = _asked_run(protocol, tenants)
        require(
            tenants is FLEET or data is not None,
            "--data must be set: the prompts of GSM8K and Open Assistant come from there. Give the "
            "folder above gsm8k/, gsm8k_smollm2/ and oasst/, or --sets fleet.",
        )
        log = Path(asked.data.logs or "")
        if tenants is FLEET:
            assert tenants.num_requests is not None
            write_fleet_log(log, num_requests=tenants.num_requests, seed=SEED)
        else:
            assert data is not None
            write_log(log, spread_over_time(oasst_calls(data), seed=SEED))
            tokenizer = load_target_text(asked.target, [0]).tokenizer
            stored = gsm8k_calls(data, tokenizer, budget=tenants.max_new_tokens)
            write_logs(folder, spread_over_time(stored, seed=SEED))
        workshop = Workshop(asked)
        for stage in ("ingest", "regenerate"):
            run_stage(workshop, stage)
        counts = write_logs(folder, answered_calls(asked.run_dir))
        tell(BENCH, f"{tenants.name}: answered calls {counts}")
    _link_pair(protocol, tenants)


def own_run(protocol: Protocol, tenants: TenantSet) -> RecipeConfig:
    """Give the recipe of the run that holds all tenants of a set and trains on them."""
    minutes = f"training.minutes={protocol.generic_minutes}"
    return _recipe(protocol, tenants, tenants.name, [*_for_minutes(minutes), _logs(tenants.name)])


def collect_own_run(protocol: Protocol, tenants: TenantSet) -> Workshop:
    """Bring a set's own run up to `collect`; what is there stays."""
    workshop = Workshop(_placed(protocol, own_run(protocol, tenants)))
    for stage in ("ingest", "regenerate", "collect"):
        run_stage(workshop, stage)
    return workshop


def generic_drafter(protocol: Protocol, tenants: TenantSet) -> str:
    """Give the drafter that a set begins with: the given one, or one trained on the other set."""
    if tenants.name in protocol.generic:
        return protocol.generic[tenants.name]
    workshop = collect_own_run(protocol, OTHER[tenants.name])
    run_stage(workshop, "train")
    return str(workshop.checkpoint)


class Way(StrEnum):
    """How a tuning is done, and what of it is judged."""

    alone = "alone"
    """On the tenant's log, the tuned weights as they are."""
    replayed = "replayed"
    """With older rows of everybody else, the weights as they are."""
    blended = "blended"
    """The same training; the candidate is `tune`'s own choice between old and tuned weights."""

    @property
    def run(self) -> str:
        """Name of the run's folder: two ways share a training."""
        return Way.alone if self is Way.alone else Way.replayed


@dataclass(frozen=True, kw_only=True)
class TuningRun:
    """A finished tuning."""

    config: RecipeConfig
    verdict: dict[str, Any]
    """As `verdict.json` holds it, tenants by name."""


def tune_to(
    protocol: Protocol,
    tenants: TenantSet,
    names: tuple[str, ...],
    *,
    way: Way,
    start: str,
    num_steps: int | None,
) -> TuningRun:
    """Run `dflash-train tune` on the logs of some tenants of a set; a finished one is read.

    Args:
        protocol: Minutes, settings, place.
        tenants: The set.
        names: One tenant, or both tuned ones.
        way: How; `replayed` comes before `blended`, which judges the same run again.
        start: The generic drafter.
        num_steps: Length of the training; None turns the protocol's minutes into steps.
    """
    length = (
        _for_minutes(f"training.minutes={protocol.minutes}")
        if num_steps is None
        else [f"training.max_steps={num_steps}"]
    )
    logs, place = _logs_of(tenants, names)
    name = f"{tenants.name}-{logs}-{way.run}"
    runs = [str(protocol.out / "runs" / each) for each in (OTHER[tenants.name].name, tenants.name)]
    given = [
        *length,
        _logs(place),
        f"init={start}",
        f"tune.replay_share={0.0 if way is Way.alone else protocol.replay_share}",
        f"tune.replay_from=[{','.join(runs)}]",
        f"tune.registry={protocol.out / 'registries' / name}",
        *([] if way is Way.blended else ["tune.blends=[1.0]"]),
    ]
    config = _placed(protocol, _recipe(protocol, tenants, name, given))
    collected = _collected_by(tenants, names, way)
    if collected is not None:
        link_data(config.run_dir, protocol.out / "runs" / collected)
    kept = protocol.out / "verdicts" / f"{tenants.name}-{logs}-{way}.json"
    if way is Way.replayed and (verdict := _kept(kept, config)) is not None:
        return TuningRun(config=config, verdict=verdict)
    tell(BENCH, f"{name}, {way}: {num_steps or f'{protocol.minutes:g} minutes'}")
    verdict = _with_names(tune(config).verdict, config, tenants)
    if way is Way.replayed:  # `blended` writes its own over it
        write_bytes(kept, orjson.dumps({"training": _training(config), "verdict": verdict}))
    return TuningRun(config=config, verdict=verdict)


def calibrated_steps(run: TuningRun) -> int:
    """Give the steps that the minutes of a tuning became."""
    manifest = Manifest.read(run.config.run_dir / "checkpoint")
    assert manifest is not None, "a finished tuning has trained"
    return int(manifest.details["calibration"]["max_steps"])


def _training(config: RecipeConfig) -> str | None:
    """Name the training that a run holds; None before its end."""
    manifest = Manifest.read(config.run_dir / "checkpoint")
    return None if manifest is None else manifest.hash


def _kept(path: Path, config: RecipeConfig) -> dict[str, Any] | None:
    """Read the verdict over a training that was judged in another way since."""
    if not path.exists():
        return None
    found = orjson.loads(path.read_bytes())
    return found["verdict"] if found["training"] == _training(config) else None


def _recipe(protocol: Protocol, tenants: TenantSet, name: str, more: list[str]) -> RecipeConfig:
    """Compose the recipe of a run; the protocol's own overrides come last."""
    return compose(
        [
            "recipe=smollm2",
            f"name={name}",
            f"data.max_new_tokens={tenants.max_new_tokens}",
            f"data.test_share={tenants.test_share}",
            f"data.validation_share={tenants.validation_share}",
            f"data.target_aliases=[{MODEL}]",
            "data.trust_unknown_sampling=true",
            "evaluate.eval_sets=[]",
            *more,
            *protocol.overrides,
        ]
    )


def _placed(protocol: Protocol, config: RecipeConfig) -> RecipeConfig:
    """Put a run below the protocol's folder, with the key that all runs share."""
    key = protocol.out / KEY_FILE
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True)
        key.write_bytes(os.urandom(32).hex().encode())
    logs = None if config.data.logs is None else str(protocol.logs / config.data.logs)
    data = replace(config.data, logs=logs, hmac_key_file=str(key))
    return replace(config, runs_dir=str(protocol.out / "runs"), data=data)


def _asked_run(protocol: Protocol, tenants: TenantSet) -> RecipeConfig:
    """Give the recipe of the run in which the target answers; it reads one tap, to throw away."""
    given = [
        _logs(f"asked/{tenants.name}.jsonl"),
        "drafter.num_taps=1",
        "drafter.target_layer_ids=[0]",
        "data.max_per_cluster=1000000",  # the tunings decide what repeats too often
    ]
    return _placed(protocol, _recipe(protocol, tenants, f"answers-{tenants.name}", given))


def _logs_of(tenants: TenantSet, names: tuple[str, ...]) -> tuple[str, str]:
    """Give what the logs of some tenants are called in names of runs, and where they lie."""
    first, *more = names
    if not more:
        return first, f"{tenants.name}/{first}.jsonl"
    return "pair", f"{tenants.name}-pair" if tenants.others else tenants.name


def _collected_by(tenants: TenantSet, names: tuple[str, ...], way: Way) -> str | None:
    """Name the run that has collected the same logs before: features take gigabytes."""
    first, *more = names
    if more:
        return None if tenants.others else tenants.name
    return f"{tenants.name}-{first}-{Way.replayed}" if way is Way.alone else None


def _link_pair(protocol: Protocol, tenants: TenantSet) -> None:
    """Lay the logs of both tuned tenants into one folder."""
    folder = protocol.logs / f"{tenants.name}-pair"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in tenants.tuned:
        os.link(protocol.logs / tenants.name / f"{name}.jsonl", folder / f"{name}.jsonl")


def _with_names(
    verdict: dict[str, Any], config: RecipeConfig, tenants: TenantSet
) -> dict[str, Any]:
    """Say `gsm8k` where the verdict says the tenant's pseudonym."""
    pseudonyms = load_pseudonyms(config)
    names = {
        pseudonyms.hide("tenant", each): each
        for each in (*tenants.tenants, *OTHER[tenants.name].tenants)
    }

    def named(gain: dict[str, Any]) -> dict[str, Any]:
        for pseudonym, name in names.items():
            gain = gain | {"name": gain["name"].replace(pseudonym, name)}
        return gain

    return verdict | {"gains": [named(gain) for gain in verdict["gains"]]}


def _for_minutes(minutes: str) -> list[str]:
    return ["training.max_steps=null", minutes]


def _logs(place: str) -> str:
    return f"data.logs={place}"
