"""The report stage: what was measured, for people and for programs.

Writes `report.json` (every figure, checked against `report.schema.json` of this package),
`report.md` and `report.html`, a single page without any outside reference. Run by
`dflash-train report recipe=NAME`.
"""

import importlib.resources
from typing import Any

import orjson
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dflash_inference.figures import WAY_NAMES, draw
from dflash_inference.findings import Findings, find
from dflash_inference.report_file import REPORT_FILE, check_schema
from dflash_inference.statistics import FEWEST_FOR_A_CLAIM
from dflash_train.config import RecipeConfig
from dflash_train.records.manifest import FileEntry, Manifest, write_bytes

REPORT_FOLDER = "report"


def report(config: RecipeConfig, *, manifest: Manifest) -> Manifest:
    """Write the report of a run and its manifest.

    Args:
        config: The recipe.
        manifest: Prepared by the caller; outputs are filled here.

    Raises:
        ValueError: The stage `evaluate` is not complete, or no answer has a verify step.
    """
    folder = config.run_dir / REPORT_FOLDER
    findings = find(config)
    if findings["acceptance_length"] is None:
        raise ValueError(
            "report: no held-out answer has a verify step, each ended with its first token. "
            "Raise data.max_new_tokens or give more traffic."
        )
    written = orjson.dumps(findings, option=orjson.OPT_INDENT_2) + b"\n"
    check_schema(orjson.loads(written))
    contents = {
        REPORT_FILE: written,
        "report.md": render("report.md.j2", findings).encode(),
        "report.html": render("report.html.j2", findings, draw(findings)).encode(),
    }
    for name, content in contents.items():
        write_bytes(folder / name, content)
    manifest.outputs = [FileEntry.of(folder / name, folder) for name in sorted(contents)]
    manifest.write(folder)
    return manifest


def render(template: str, findings: Findings, pictures: dict[str, str] | None = None) -> str:
    """Fill one of this package's templates; HTML is escaped, pictures are put in as they are."""
    environment = Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "mean": _show_mean, "interval": _show_interval, "count": _show_count, "ms": _show_ms,
        "total": _show_total,
    }  # fmt: skip
    source = (importlib.resources.files("dflash_inference") / template).read_text("utf-8")
    return environment.from_string(source).render(
        **findings,
        way_titles=WAY_NAMES,
        sentences=write_sentences(findings),
        pictures={name: Markup(svg) for name, svg in (pictures or {}).items()},
    )


def write_sentences(findings: Findings) -> dict[str, str]:
    """Say in plain words what the figures mean, one sentence per question."""
    return {
        "views": _views_sentence(findings["views"]),
        "prompt_lookup": _lookup_sentence(findings["prompt_lookup"]),
        "foreign_features": _foreign_sentence(findings["foreign_features"]),
        "live_check": _live_sentence(findings["live_check"]),
        "speed": _speed_sentence(findings["speed"]),
        "noise_floor": _noise_sentence(findings["live_check"]),
        "concurrency": _concurrency_sentence(findings["concurrency"]),
        "draft_use": _draft_use_sentence(findings["draft_use"]),
    } | {
        f"eval_{name}": _lookup_sentence(each["prompt_lookup"])
        for name, each in findings["eval_sets"].items()
    }


def read_findings(config: RecipeConfig) -> Findings:
    """Read the figures of a finished report."""
    return orjson.loads((config.run_dir / REPORT_FOLDER / REPORT_FILE).read_bytes())


def summary_lines(config: RecipeConfig) -> list[str]:
    """Give the last lines on screen of a run, from its finished report."""
    findings = read_findings(config)
    sentences = write_sentences(findings)
    headline = findings["acceptance_length"]
    views = findings["views"]
    lines = [
        f"acceptance length {_show_estimate(headline)}, pooled, K = {headline['block_size']}, "
        f"by replay on {headline['num_requests']} held-out answers",
        f"unseen traffic    {_show_found(views['unseen'])}: {sentences['views']}",
        f"prompt lookup     {_show_other(findings['prompt_lookup'])}: {sentences['prompt_lookup']}",
        f"other's features  {_show_other(findings['foreign_features'])}: "
        f"{sentences['foreign_features']}",
    ]
    for name, each in findings["eval_sets"].items():
        lines.append(f"{each['title']:<17} {_show_found(each)}: {sentences[f'eval_{name}']}")
    lines.append(f"live check        {sentences['live_check']}")
    lines.append(f"speed             {sentences['speed']}")
    return lines


def _views_sentence(views: Findings) -> str:
    """Say what the unseen view of held-out traffic is made of."""
    unseen, num_answers = views["unseen"], views["traffic"]["answers"]
    if views["answers_unknown"] == num_answers:
        return "No unseen group: this run does not know which answers resemble its training."
    seen = f"{views['answers_seen']} of {num_answers} answers resemble training"
    unknown = f", of {views['answers_unknown']} it is not known" if views["answers_unknown"] else ""
    if not unseen["answers"]:
        return f"No unseen group: {seen}{unknown}."
    few = "" if unseen["answers"] >= FEWEST_FOR_A_CLAIM else ", too few for a claim"
    return (
        f"{unseen['answers']} answers of {unseen['groups']} sessions without a near-duplicate in "
        f"training{few}; {seen}{unknown}."
    )


def _lookup_sentence(compared: Findings | None) -> str:
    if compared is None:
        return "There is no answer to compare with prompt lookup."
    difference = compared["difference"]
    value, (low, high) = difference["value"], difference["interval"]
    gap = f"{value:+.2f} tokens per step, 95 % interval {low:+.2f} to {high:+.2f}"
    num_requests = difference["num_requests"]
    if num_requests < FEWEST_FOR_A_CLAIM:
        return (
            f"Undecided whether the drafter beats prompt lookup ({gap}): {num_requests} answers "
            f"are too few for a claim, which needs {FEWEST_FOR_A_CLAIM}."
        )
    match difference["verdict"]:
        case "better":
            return f"The drafter beats prompt lookup ({gap}, on the same {num_requests} answers)."
        case "worse":
            return (
                f"The drafter does not beat prompt lookup ({gap}, on the same {num_requests} "
                "answers)."
            )
    return (
        f"Undecided whether the drafter beats prompt lookup ({gap}, on the same {num_requests} "
        "answers): the interval includes 0."
    )


def _foreign_sentence(compared: Findings | None) -> str:
    if compared is None:
        return "Not measured: the held-out answers belong to one conversation."
    difference = compared["difference"]
    low, high = difference["interval"]
    gap = f"{difference['value']:+.2f} tokens per step, 95 % interval {low:+.2f} to {high:+.2f}"
    if low > 0:
        return f"The drafter reads its features: with those of another request it loses ({gap})."
    return f"With the features of another request the drafter is not clearly worse ({gap})."


def _live_sentence(check: Findings) -> str:
    if check["num_requests"] == 0:
        return "Nothing was decoded live."
    return (
        f"{check['num_equal_to_replay']} of {check['num_requests']} prompts equal replay at every "
        f"step ({check['num_steps_equal']} of {check['num_steps']} steps); token-match rate "
        f"{check['token_match_rate']:.2%} against plain decoding, {check['num_identical']} of "
        f"{check['num_requests']} outputs identical; {_mismatch_words(check)}"
    )


def _noise_sentence(check: Findings) -> str:
    """Say how far two runs of the target alone agree: less cannot be asked of speculation."""
    if check["num_requests"] == 0:
        return ""
    return (
        f"Noise floor: the target alone, decoding the same prompts in a batch, matches its own "
        f"plain decoding at {check['batch_match_rate']:.2%} "
        f"({check['num_batch_identical']} of {check['num_requests']} outputs identical); the "
        f"stored answers match it at {check['stored_match_rate']:.2%}."
    )


def _mismatch_words(check: Findings) -> str:
    num_mismatches, num_ties = len(check["mismatches"]), check["num_near_ties"]
    if num_mismatches == 0:
        return "no mismatch to explain."
    listed = "; ".join(
        f"{each['plain_logit']:.6f} against {each['runner_up_logit']:.6f}"
        for each in check["mismatches"]
    )
    if num_ties == num_mismatches:
        return f"every mismatch is a near-tie of two logits ({listed})."
    return (
        f"{num_mismatches - num_ties} of {num_mismatches} mismatches are NOT near-ties ({listed}): "
        "this is an error, please report it."
    )


def _speed_sentence(speed: Findings) -> str:
    rates = speed["tokens_per_second"]
    if speed["speed_up"] is None:
        return "Not measured: nothing was decoded live."
    low, high = speed["speed_up_interval"]
    few = "" if speed["num_requests"] >= FEWEST_FOR_A_CLAIM else ", too few for a claim"
    return (
        f"{rates['speculative']:.1f} tokens/s speculative, {rates['plain']:.1f} in the same loop "
        f"at width 1: a factor of {speed['speed_up']:.2f} per output token (95 % interval "
        f"{low:.2f} to {high:.2f}, {speed['num_requests']} prompts{few}). "
        f"{_lookup_speed_sentence(speed['ways'])} A step costs "
        f"{speed['step_cost']:.2f} plain tokens, so it pays above an acceptance length of "
        f"{speed['step_cost']:.2f}. {_setting_sentence(speed['setting'])}"
    )


def _lookup_speed_sentence(ways: Findings) -> str:
    """Say what copying from the prompt brings on the same passes: the speed to beat."""
    found = ways.get("prompt_lookup")
    if found is None or found["speed_up"] is None:
        return "Prompt lookup was not timed."
    low, high = found["speed_up_interval"]
    return f"Prompt lookup on the same passes: {found['speed_up']:.2f} ({low:.2f} to {high:.2f})."


def _setting_sentence(setting: Findings) -> str:
    modes = {"fast": "packed and compiled passes", "exact": "eager passes"}
    device = f"on {setting['device']}" if setting["device"] else None
    words = [modes[setting["mode"]], setting["dtype"], device, "one request at a time"]
    return f"Measured with {', '.join(word for word in words if word)}, greedy."


def _concurrency_sentence(found: Findings | None) -> str:
    if found is None:
        return "Not measured at several requests at once."
    if found["loses_from"] is None:
        return (
            f"Speculation pays at every concurrency measured, up to {found['pays_up_to']} "
            f"({found['setting']})."
        )
    if found["pays_up_to"] is None:
        return f"Speculation does not pay at any concurrency measured ({found['setting']})."
    even = found["break_even_concurrency"]
    return (
        f"Speculation pays up to a concurrency of {found['pays_up_to']} and loses from "
        f"{found['loses_from']}; break-even near {even:.1f} ({found['setting']})."
    )


def _draft_use_sentence(use: Findings) -> str:
    if use["efficiency"] is None:
        return "Nothing was drafted."
    return (
        f"{use['efficiency']:.1%} of {use['drafted']:,} drafts were kept; "
        f"{use['wasted_verify_rows']:.1%} of the rows that verify read were of no use."
    )


def _show_mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _show_interval(interval: list[float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _show_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _show_total(parts: dict[str, float] | None) -> str:
    return "-" if parts is None else _show_ms(sum(parts.values()))


def _show_count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _show_estimate(found: Findings) -> str:
    return f"{_show_mean(found['pooled'])} (95 % interval {_show_interval(found['interval'])})"


def _show_found(view: Findings) -> str:
    found = view["acceptance_length"]
    return "no verify step" if found is None else _show_estimate(found)


def _show_other(compared: Findings | None) -> str:
    return "-" if compared is None else _show_estimate(compared["acceptance_length"])
