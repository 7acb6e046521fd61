"""The doctor's checks on real text: greedy decoding, and acceptance length on stored answers.

Only text shows what no file says. Two conventions for tap ids are in use, which differ by one:
both give the same shapes, and the wrong one only fewer accepted drafts. So answers that a run
stored are replayed under both, and the one that the checkpoint claims must win.
"""

from dataclasses import dataclass, replace
from statistics import mean, stdev

from torch import Tensor

from dflash_train.drafter.checkpoint import weights_hash
from dflash_train.features.store import FeatureRow
from dflash_train.features.target import Target
from dflash_train.records.chat_template import render_prompt
from dflash_train.records.conversation import Turn
from dflash_train.release.evidence import Report, UndecodableTargetError, with_taps
from dflash_train.release.finding import Finding, Patient, broken, demand, ok, skipped, warning
from dflash_train.training.replay import ReplayTrace, replay_rows

QUESTIONS = ("What is the capital of France?", "Count from one to ten.", "Write a short poem.")
"""Prompts to decode where a run stored none."""
NUM_PROMPTS = 3
NOTHING = 1.1
"""Acceptance length below which a drafter drafts next to nothing that is kept."""
CLEAR = 2.0
"""Standard errors beyond which two ways of reading the same answers differ."""
AS_WRITTEN = "as written"
ROWS_AT_ONCE = 4
"""Answers that the target reads in one pass."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Replayed answers, summed up."""

    by_request: dict[str, tuple[int, int]]
    """Committed tokens and verify steps of each, by its id."""
    joint: list[float]
    """Share of steps that accepted at least so many drafts, by position."""

    @property
    def num_steps(self) -> int:
        """Verify steps of all answers."""
        return sum(steps for _, steps in self.by_request.values())

    @property
    def pooled(self) -> float:
        """Tokens committed per verify step, over all steps; 0 where there is no step."""
        return sum(tokens for tokens, _ in self.by_request.values()) / max(1, self.num_steps)


def check_decoding(patient: Patient) -> Finding:
    """Check that greedy tokens with the drafter are those of the target alone."""
    assert patient.target is not None
    assert patient.decode is not None
    prompts = _prompts(patient, patient.target)
    try:
        decoded = patient.decode(patient.target, patient.drafter, prompts)
    except UndecodableTargetError as error:
        return skipped(str(error))
    total = sum(each.num_tokens for each in decoded)
    equal = sum(each.num_equal for each in decoded)
    parted = [each for each in decoded if each.num_equal < each.num_tokens]
    ties = sum(each.is_near_tie for each in parted)
    found = f"{equal} of {total} greedy tokens are the target's own ({equal / total:.1%})"
    demand(
        ties == len(parted),
        f"{found}, and the first difference is no near-tie: speculative decoding would change "
        "what the target says.",
        remedy="Do not serve it: report this with target and checkpoint.",
    )
    steps = sum(each.num_steps for each in decoded)
    note = f", {ties} answers part at a near-tie" if ties else ""
    return ok(f"{found} in {steps} verify steps{note}.")


def _prompts(patient: Patient, target: Target) -> list[list[int]]:
    """Give token ids of stored prompts, else of invented ones."""
    if patient.answers is not None:
        rows = patient.answers.rows[:NUM_PROMPTS]
        return [row.input_ids[: row.prompt_length].tolist() for row in rows]
    turns = [Turn(role="user", content=question) for question in QUESTIONS]
    return [render_prompt(target.tokenizer, [turn]) for turn in turns]


def check_conventions(patient: Patient) -> Finding:
    """Check that stored answers are accepted best with the tap ids as they are written."""
    ids = patient.drafter.config.target_layer_ids
    last = patient.drafter.config.num_target_layers - 1
    conventions = {
        AS_WRITTEN: ids,
        "one lower": [layer - 1 for layer in ids],
        "one higher": [layer + 1 for layer in ids],
    }
    possible = {
        name: layers
        for name, layers in conventions.items()
        if all(0 <= layer < last for layer in layers)
    }
    found = {
        name: _replay(patient, rows) for name, rows in _rows_of_layers(patient, possible).items()
    }
    listed = ", ".join(f"{each.pooled:.2f} {name}" for name, each in found.items())
    text = f"acceptance length of stored answers by tap ids: {listed}"
    best = max(found, key=lambda name: found[name].pooled)
    written = found[AS_WRITTEN]
    demand(
        not _is_clearly_faster(found[best], written),
        f"{text}. dflash_config.target_layer_ids (={ids}) are not the layers of training.",
        remedy=f"Write them {best}: {possible[best]}.",
    )
    if found[best].pooled > written.pooled:
        return warning(
            f"{text}, too close to tell.",
            remedy="Compare with the recipe that trained it.",
        )
    if written.pooled < NOTHING:
        return warning(
            f"{text}: next to nothing is accepted.",
            remedy="Check tap ids, RoPE and mask id, and that these are answers of its target.",
        )
    return ok(f"{text}.")


def _is_clearly_faster(one: Acceptance, other: Acceptance) -> bool:
    """Tell whether `one` takes fewer steps for the same answers, beyond two standard errors.

    Layers that follow each other are much alike, so the wrong one may cost a few percent only:
    answers are compared in pairs, since they differ more from each other than that.
    """
    saved = [steps - one.by_request[name][1] for name, (_, steps) in other.by_request.items()]
    if len(saved) < 2:
        return sum(saved) > 0
    return mean(saved) > CLEAR * stdev(saved) / len(saved) ** 0.5


def _rows_of_layers(
    patient: Patient, conventions: dict[str, list[int]]
) -> dict[str, list[FeatureRow]]:
    """Give the stored answers with the features of each set of layers, from one target pass.

    Layers that the run has stored need none.
    """
    assert patient.answers is not None
    assert patient.target is not None
    rows, stored = patient.answers.rows, patient.answers.target_layer_ids
    missing = sorted({layer for ids in conventions.values() if ids != stored for layer in ids})
    states = _read(patient.target, rows, missing) if missing else []

    def with_layers(ids: list[int]) -> list[FeatureRow]:
        places = [missing.index(layer) for layer in ids]
        return [
            replace(row, features=each[:, places].flatten(1))
            for row, each in zip(rows, states, strict=True)
        ]

    return {name: rows if ids == stored else with_layers(ids) for name, ids in conventions.items()}


def _read(target: Target, rows: list[FeatureRow], layers: list[int]) -> list[Tensor]:
    """Give `[N, layers, E]` of each answer, its last row zeros as in the store."""
    tapped = with_taps(target, layers)
    texts = [row.input_ids.tolist() for row in rows]
    return [
        features.unflatten(1, (len(layers), -1))
        for start in range(0, len(texts), ROWS_AT_ONCE)
        for features in tapped.features_of(texts[start : start + ROWS_AT_ONCE])
    ]


def check_acceptance(patient: Patient) -> Finding:
    """Check that stored answers are accepted as the run's report says."""
    assert patient.answers is not None
    own = {"own": patient.drafter.config.target_layer_ids}
    found = _replay(patient, _rows_of_layers(patient, own)["own"])
    positions = "/".join(f"{share:.2f}" for share in found.joint)
    text = (
        f"{found.pooled:.2f} over {found.num_steps} steps of {len(found.by_request)} stored "
        f"answers, drafts accepted by position {positions}"
    )
    try:
        report = patient.answers.report()
    except ValueError as error:
        return warning(f"{text}; not compared: {error}", remedy="")
    if report is None:
        return ok(f"{text}; the run has no report to compare with.")
    low, high = _bounds(report, found)
    reported = "/".join(f"{share:.2f}" for share in report.joint)
    text += f"; the report allows {low:.2f} to {high:.2f}, by position {reported}"
    if low <= found.pooled <= high:
        return ok(f"{text}.")
    is_measured = report.weights == weights_hash(patient.folder)
    if not is_measured:
        return warning(
            f"{text}, of other weights than these.",
            remedy="Run `evaluate` and `report` with this checkpoint.",
        )
    raise broken(
        f"{text}: the same weights draft otherwise than when they were measured.",
        remedy="Compare RoPE, mask id, taps and attention with the recipe that trained it.",
    )


def _bounds(report: Report, found: Acceptance) -> tuple[float, float]:
    """Give the report's interval, moved to what it measured on these very requests."""
    same = [report.by_request[name] for name in found.by_request if name in report.by_request]
    steps = sum(each for _, each in same)
    middle = sum(tokens for tokens, _ in same) / steps if steps else report.pooled
    low, high = (limit - report.pooled + middle for limit in report.interval)
    return low, high


def _replay(patient: Patient, rows: list[FeatureRow]) -> Acceptance:
    assert patient.target is not None
    drafter = patient.drafter
    traces = replay_rows(drafter, patient.target.head, rows)
    lengths = [each.acceptance_lengths for each in traces]
    return Acceptance(
        by_request={
            row.id: (sum(each), len(each)) for row, each in zip(rows, lengths, strict=True) if each
        },
        joint=_joint(traces, drafter.config.num_drafts),
    )


def _joint(traces: list[ReplayTrace], num_drafts: int) -> list[float]:
    """Give the share of steps that accepted at least 1, 2, ... of the drafts that they offered."""
    shares = []
    for position in range(1, num_drafts + 1):
        steps = [
            accepted >= position
            for trace in traces
            for accepted, width in zip(trace.num_accepted, trace.widths, strict=True)
            if width > position
        ]
        shares.append(sum(steps) / max(1, len(steps)))
    return shares
