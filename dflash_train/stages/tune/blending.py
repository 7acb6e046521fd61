"""Between training and verdict: how much of the tuning the candidate takes over.

Between the weights that a tuning began from and those that it found, most of the gain comes early
and most of the forgetting late (WiSE-FT, arXiv 2109.01903). So the candidate's weights are
`(1 - b) * start + b * tuned`, with the largest share b at which nobody loses: by replay on
validation windows, here and of the earlier runs, never on the newest ones, by which it is judged.
Nothing is trained for it.
"""

import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from tqdm import tqdm

from dflash_train.config import RecipeConfig
from dflash_train.drafter.checkpoint import drafter_hash, save_checkpoint
from dflash_train.drafter.metadata import METADATA_NAME, CheckpointMetadata
from dflash_train.drafter.model import Drafter
from dflash_train.features.mixed_rows import ChosenRows
from dflash_train.features.row_source import RowSource
from dflash_train.records.manifest import FileEntry, Manifest, atomic_path, write_bytes
from dflash_train.stages.drafters import import_drafter
from dflash_train.stages.earlier_runs import earlier_validation, earlier_validation_inputs
from dflash_train.stages.online import open_rows
from dflash_train.stages.workshop import Workshop

BLEND_FOLDER = "blend"
_OWN, _EARLIER = "traffic", "earlier runs"
_FEWEST = 20
"""Rows of a tenant that is looked at for itself; no claim rests on them."""
_ROOM = 0.5
"""Share of `tune.tenant_margin` that a validation may spend: on the newest windows chance adds."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """One share of the tuned weights, by replay on validation windows."""

    share: float
    """b."""
    gain: float
    """Relative to the start, on this run's window."""
    worst: float
    """The least relative gain of anybody, tenants here and in earlier runs."""
    whose: str
    """Who that is."""


def candidate_folder(config: RecipeConfig) -> Path:
    """Give the folder of the drafter that a tuning judges."""
    return config.run_dir / BLEND_FOLDER / "candidate"


def blending_inputs(workshop: Workshop) -> dict[str, str]:
    """Hash what the choice depends on beside the run: the start, validation of earlier runs.

    Raises:
        ValueError: An earlier run does not fit.
    """
    return {"start": drafter_hash(_start(workshop))} | earlier_validation_inputs(workshop)


def blend(workshop: Workshop, manifest: Manifest) -> None:
    """Choose the share, write the candidate and what was measured, and the manifest last."""
    config = workshop.config
    folder, best = config.run_dir / BLEND_FOLDER, config.run_dir / "checkpoint" / "best"
    measured: list[Blend] = []
    share = config.tune.blends[0]
    if len(config.tune.blends) > 1:
        shares = sorted(config.tune.blends, reverse=True)
        least = -_ROOM * config.tune.tenant_margin
        chosen, measured = choose(shares, _measuring(workshop, best), least=least)
        share = chosen.share
        _say(measured, share)
    _write_candidate(workshop, best, share)
    content = {"share": share, "measured": [asdict(each) for each in measured]}
    write_bytes(folder / "blends.json", orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    paths = [folder / "blends.json", *sorted(candidate_folder(config).iterdir())]
    # Metadata names code and versions: another commit with the same weights is no change.
    files = [path for path in paths if path.name != METADATA_NAME]
    manifest.outputs = [FileEntry.of(path, folder) for path in files]
    manifest.details = {"share": share}
    manifest.write(folder)


def choose(
    shares: Sequence[float], measure: Callable[[float], Blend], *, least: float
) -> tuple[Blend, list[Blend]]:
    """Find the largest share at which nobody's gain is below `least`.

    The largest share is measured first, then the others are halved: what is lost is taken to grow
    with the share, so few of them are measured. Where somebody loses at every share that was
    measured, it is the one whose worst loss is smallest.

    Args:
        shares: The largest first.
        measure: Replays one.
        least: Relative gain, at most 0 as a rule.

    Returns:
        The chosen one, and all that were measured, in order.
    """
    seen = [measure(shares[0])]
    first, last = (0, 0) if seen[0].worst >= least else (1, len(shares))
    while first < last:  # the answer is one of first..last, `last` if nobody loses there
        middle = (first + last) // 2
        seen.append(measure(shares[middle]))
        if seen[-1].worst >= least:
            last = middle
        else:
            first = middle + 1
    fitting = [each for each in seen if each.worst >= least]
    if fitting:
        return max(fitting, key=lambda each: each.share), seen
    return max(seen, key=lambda each: each.worst), seen


def most_measured(num_shares: int) -> int:
    """Give how many of so many shares `choose` measures at most."""
    return 1 + (num_shares - 1).bit_length()


def blended(start: Drafter, tuned: Drafter, share: float) -> Drafter:
    """Give a drafter of mixed weights, `(1 - share) * start + share * tuned`, on the CPU.

    Both may lie on different devices: a replay moves the one that it takes.
    """
    with torch.random.fork_rng():
        drafter = Drafter(tuned.config).to(tuned.fc.weight.dtype)
    old = start.state_dict()
    mixed = {
        name: torch.lerp(old[name].to(tensor.device), tensor, share)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tuned.state_dict().items()
    }
    drafter.load_state_dict(mixed)
    return drafter.eval()


def _measuring(workshop: Workshop, best: Path) -> Callable[[float], Blend]:
    """Replay the start, and give what replays a share and says what it gains."""
    from dflash_inference.paired_gains import paired_gains

    config = workshop.config
    windows = _windows(workshop)
    start, tuned = (
        import_drafter(folder, config.target).drafter for folder in (_start(workshop), best)
    )
    before = _replayed(workshop, windows, start, name="start")

    def measure(share: float) -> Blend:
        mixed = blended(start, tuned, share)
        after = _replayed(workshop, windows, mixed, name=f"blend {share:g}")
        gains = [
            gain
            for window in windows
            for gain in paired_gains(
                window,
                new=after[window],
                old=before[window],
                fewest_requests=_FEWEST,
                resamples=1,  # means alone are read
                seed=config.evaluate.seed,
            )
        ]
        worst = min(gains, key=lambda gain: gain.difference.value)
        return Blend(
            share=share,
            gain=gains[0].difference.value,
            worst=worst.difference.value,
            whose=worst.name,
        )

    return measure


@torch.no_grad()
def _replayed(
    workshop: Workshop, windows: dict[str, RowSource], drafter: Drafter, *, name: str
) -> dict[str, list[Any]]:
    """Give the traces of a drafter, by window."""
    from dflash_inference.evaluate import replay_each_row

    target = workshop.target
    drafter = drafter.to(target.device).eval()
    found: dict[str, list[Any]] = {}
    with tqdm(total=sum(map(len, windows.values())), desc=name, unit="answer") as bar:
        for window, rows in windows.items():
            answers = (rows[place] for place in range(len(rows)))
            found[window] = []
            for trace in replay_each_row(drafter, target.head, answers, split=window):
                found[window].append(trace)
                bar.update()
    return found


def _windows(workshop: Workshop) -> dict[str, RowSource]:
    """Open validation rows, no more of each tenant than the recipe says, spread evenly."""
    windows = {_OWN: open_rows(workshop, "validation")}
    earlier = earlier_validation(workshop.config, verify=True)
    if earlier is not None and len(earlier):
        windows[_EARLIER] = earlier
    most = workshop.config.tune.blend_rows
    return {name: some_of_each_tenant(rows, most) for name, rows in windows.items()}


def some_of_each_tenant(rows: RowSource, most: int) -> RowSource:
    """Give up to `most` rows of each tenant, spread evenly over its rows."""
    by_tenant: dict[str | None, list[int]] = defaultdict(list)
    for place, line in enumerate(rows.lines):
        by_tenant[line.tenant].append(place)
    chosen: list[int] = []
    for places in by_tenant.values():
        number = min(len(places), most)
        chosen += [places[step * len(places) // number] for step in range(number)]
    return ChosenRows(rows.folder, [(rows, place) for place in sorted(chosen)])


def _start(workshop: Workshop) -> Path:
    init = workshop.config.init
    assert init is not None, "a tuned recipe has one"
    return Path(init)


def _write_candidate(workshop: Workshop, best: Path, share: float) -> None:
    """Write the candidate; the tuned weights alone are a copy of their files."""
    place = candidate_folder(workshop.config)
    if share == 1:
        with atomic_path(place) as partial:
            shutil.copytree(best, partial)
        return
    start = _start(workshop)
    tuned = import_drafter(best, workshop.config.target)
    metadata = tuned.metadata or CheckpointMetadata()
    done = {"blend": share, "blended_with": drafter_hash(start), "acceptance_length": None}
    metadata = replace(metadata, provenance=metadata.provenance | done)
    drafter = blended(import_drafter(start, workshop.config.target).drafter, tuned.drafter, share)
    save_checkpoint(drafter, place, metadata=metadata)


def _say(measured: list[Blend], share: float) -> None:
    for each in measured:
        mark = " <- candidate" if each.share == share else ""
        tqdm.write(
            f"blend: {each.share:.0%} of the tuning gains {each.gain:+.1%} on validation; "
            f"the worst is {each.worst:+.1%} ({each.whose}){mark}",
            file=sys.stderr,
        )
