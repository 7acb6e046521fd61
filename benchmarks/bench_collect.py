"""Collecting features beside the bare target forward, and answering in one pass beside two.

    make bench-collect
    python -m benchmarks.bench_collect --run runs/smollm2 [--rows 96] [--rounds 3] [key=value ...]

On whole sessions of a run's logged traffic, the stages themselves are timed by the wall clock, in
turns, everything that they read, plan, write and hash included:

- one pass: `regenerate`, which keeps the features of the passes that write the answers, then
  `collect`, which links them
- two passes: `regenerate` by a target that keeps no features, then `collect`, which reads each
  session's longest row once more
- the bare forward: the target's layers without the head, which `collect` does not need either,
  over the batches of the stored plan, nothing kept; the model is the same object in one process

The last line is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_measure import describe_machine
from benchmarks.bench_runs import (
    config_of,
    load_before,
    markdown_table,
    tell,
    whole_sessions,
)
from benchmarks.tiny_run import write_tiny_run
from dflash_data.collect.plan import CollectionPlan, open_plan
from dflash_data.collect.stage import collect
from dflash_data.regenerate.stage import regenerate
from dflash_train.config import RecipeConfig
from dflash_train.features.target import Target, TargetOutput
from dflash_train.records.conversation import Conversation
from dflash_train.records.manifest import FILE_NAME, Manifest
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import write_conversations
from dflash_train.training.accelerator import threads_per_process

BENCH = "bench-collect"
GOALS = {"collect_of_bare": 0.9, "one_pass_of_two": 0.75}
"""Speed of collect over that of the bare forward, at least; time of one pass over two, at most."""
SPLIT = "train"
_KEY = "bench"


class PlainTarget(Target):
    """The same target without its taps: what answers where nobody wants features."""

    def __init__(self, target: Target) -> None:
        """Share the loaded weights."""
        super().__init__(
            target.model,
            target.tokenizer,
            target.target_layer_ids,
            name=target.name,
            revision=target.revision,
        )
        self.prefill_s = self.decode_s = 0.0

    def forward(
        self, input_ids: Tensor, *, last_logits_only: bool = False, **inputs: Any
    ) -> TargetOutput:
        """Run new tokens; the features have no columns. The seconds are added up by kind."""
        began = time.perf_counter()
        with torch.no_grad():
            output = self.model(
                input_ids=input_ids,
                past_key_values=inputs.pop("cache"),
                logits_to_keep=1 if last_logits_only else 0,
                **inputs,
            )
        seconds = time.perf_counter() - began
        if input_ids.shape[1] > 1:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
        return TargetOutput(
            logits=output.logits, features=output.logits.new_empty((*input_ids.shape, 0))
        )


@dataclass(kw_only=True)
class Round:
    """Seconds of one round."""

    one_pass: float
    """`regenerate` with features, and `collect`, which links them."""
    generate: float
    """`regenerate` without features."""
    collect: float
    """`collect` of those answers, all of it."""
    bare: float
    """The bare forward over the same batches."""
    prefill: float
    """Of `generate`: reading the prompts."""
    decode: float
    """Of `generate`: one token of each answer after another."""


@dataclass(kw_only=True)
class Traffic:
    """What went through the target."""

    num_rows: int = 0
    """Calls answered."""
    prompt_tokens: int = 0
    """Tokens of their prompts, histories included."""
    answer_tokens: int = 0
    read_rows: int = 0
    """Rows that `collect` reads: calls of one session share one."""
    read_tokens: int = 0
    """Tokens that the target reads in `collect`: each row's last one is never fed."""
    padded_tokens: int = 0
    """The same with padding."""

    @property
    def padding_share(self) -> float:
        """Padding among the tokens of the batches of `collect`."""
        return 1 - self.read_tokens / self.padded_tokens


@dataclass
class Bench:
    """Runs the stages on one set of records, in a folder of its own."""

    config: RecipeConfig
    target: Target
    records: list[Conversation]
    folder: Path
    plan: CollectionPlan | None = field(default=None, init=False)
    """Of the first round; the same in each, since the target decodes greedily."""

    def round(self, number: int) -> Round:
        """Time everything once; every other round in the opposite order."""
        works: list[Callable[[], dict[str, float]]] = [self._one_pass, self._two_passes, self._bare]
        if self.plan is not None and number % 2 == 1:
            works.reverse()
        seconds: dict[str, float] = {}
        for work in works:
            seconds |= work()
        return Round(**seconds)

    def traffic(self) -> Traffic:
        """Count what one round put through the target."""
        assert self.plan is not None, "no round has run"
        lines = self.plan.read_lines()
        batches = [[len(row.input_ids) - 1 for row in rows] for rows in self._batches()]
        return Traffic(
            num_rows=len(lines),
            prompt_tokens=sum(line.prompt_length for line in lines),
            answer_tokens=sum(line.num_tokens - line.prompt_length for line in lines),
            read_rows=sum(map(len, batches)),
            read_tokens=sum(map(sum, batches)),
            padded_tokens=sum(max(lengths) * len(lengths) for lengths in batches),
        )

    def _one_pass(self) -> dict[str, float]:
        config = self._fresh_run("one-pass")
        return {"one_pass": _seconds(lambda: self._regenerate(config, self.target))
                + _seconds(lambda: self._collect(config))}  # fmt: skip

    def _two_passes(self) -> dict[str, float]:
        config = self._fresh_run("two-passes")
        plain = PlainTarget(self.target)
        generate = _seconds(lambda: self._regenerate(config, plain))
        # Rows without features, as the answers of a server leave them.
        shutil.rmtree(config.run_dir / "regenerated" / "features")
        (config.run_dir / "regenerated" / FILE_NAME).unlink()
        reading = _seconds(lambda: self._collect(config))
        if self.plan is None:
            kept = self.folder / "plan"
            shutil.copytree(config.run_dir / "features" / SPLIT / "plan", kept)
            self.plan = open_plan(kept, key=_manifest("collect").key)
        return {
            "generate": generate,
            "collect": reading,
            "prefill": plain.prefill_s,
            "decode": plain.decode_s,
        }

    def _bare(self) -> dict[str, float]:
        layers = self.target.model.get_decoder()
        batches = [_padded(rows, self.target.device) for rows in map(_fed, self._batches())]

        def forward() -> None:
            with torch.no_grad():
                for input_ids, mask in batches:
                    layers(input_ids=input_ids, attention_mask=mask, use_cache=False)

        return {"bare": _seconds(forward)}

    def _batches(self) -> list[list[Any]]:
        assert self.plan is not None, "collect has not planned"
        return [self.plan.read_rows(batch) for shard in self.plan.shards for batch in shard.batches]

    def _fresh_run(self, name: str) -> RecipeConfig:
        config = replace(self.config, name=name, runs_dir=str(self.folder))
        shutil.rmtree(config.run_dir, ignore_errors=True)
        write_conversations(config, self.records)
        return config

    def _regenerate(self, config: RecipeConfig, target: Target) -> None:
        regenerate(config, target=target, manifest=_manifest("regenerate"))

    def _collect(self, config: RecipeConfig) -> None:
        collect(config, load_target=lambda: self.target, manifest=_manifest("collect"))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = _options().parse_intermixed_args(arguments)
    load, began = load_before(BENCH), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-collect-", dir=options.folder) as name:
        folder = Path(name)
        if options.smoke:
            config = write_tiny_run(folder)
        else:
            config = config_of(options.run, options.overrides)
            torch.set_num_threads(threads_per_process(config.launch))
        records = whole_sessions(config.run_dir, split=SPLIT, num_rows=options.rows)
        bench = Bench(config, Workshop(config).target, records, folder)
        rounds = measure(bench, num_rounds=2 if options.smoke else options.rounds)
        traffic = bench.traffic()
    print(table(rounds, traffic))
    about = describe_machine(torch.get_num_threads()) | {"load_before": load}
    about["wall_s"] = round(time.perf_counter() - began)
    print(json.dumps(summary(rounds, traffic) | about))


def measure(bench: Bench, *, num_rounds: int) -> list[Round]:
    """Warm up on one session, then measure in turns."""
    first = bench.records[0]
    few = [record for record in bench.records if record.session == first.session]
    tell(BENCH, f"warm-up on {len(few)} rows, then {num_rounds} rounds of {len(bench.records)}")
    Bench(bench.config, bench.target, few, bench.folder / "warm-up").round(0)
    rounds: list[Round] = []
    for number in range(num_rounds):
        rounds.append(bench.round(number))
        shown = ", ".join(f"{name} {value:.1f} s" for name, value in asdict(rounds[-1]).items())
        tell(BENCH, f"round {number + 1}: {shown}")
    return rounds


def summary(rounds: list[Round], traffic: Traffic) -> dict[str, Any]:
    """Give what the last line holds: figures, goals, and which goals are met."""
    middle = _medians(rounds)
    found = {
        "collect_of_bare": middle.bare / middle.collect,
        "one_pass_of_two": middle.one_pass / (middle.generate + middle.collect),
    }
    met = {
        "collect_of_bare": found["collect_of_bare"] >= GOALS["collect_of_bare"],
        "one_pass_of_two": found["one_pass_of_two"] <= GOALS["one_pass_of_two"],
    }
    return {
        "bench": "collect",
        **{name: round(value, 4) for name, value in found.items()},
        "goals": GOALS,
        "met": met,
        "keeping_features_costs": round(middle.one_pass / middle.generate - 1, 4),
        "collect_tokens_per_s": round(traffic.read_tokens / middle.collect, 1),
        "bare_tokens_per_s": round(traffic.read_tokens / middle.bare, 1),
        "padding_share": round(traffic.padding_share, 4),
        "traffic": asdict(traffic),
        "medians_s": asdict(middle),
        "rounds_s": [asdict(each) for each in rounds],
    }


def table(rounds: list[Round], traffic: Traffic) -> str:
    """Give one line for each thing that was timed; tokens are real ones, padding apart."""
    middle = _medians(rounds)
    answered = traffic.prompt_tokens + traffic.answer_tokens
    rows = [
        ("one pass: regenerate + collect", middle.one_pass, answered),
        ("regenerate, nothing kept", middle.generate, answered),
        ("- prompts", middle.prefill, traffic.prompt_tokens),
        ("- answers", middle.decode, traffic.answer_tokens),
        ("collect", middle.collect, traffic.read_tokens),
        ("bare forward", middle.bare, traffic.read_tokens),
        ("two passes", middle.generate + middle.collect, answered),
    ]
    lines = [
        [name, f"{seconds:.2f}", str(tokens), f"{tokens / seconds:.0f}"]
        for name, seconds, tokens in rows
    ]
    told = (
        f"{traffic.num_rows} calls in {traffic.read_rows} rows; {traffic.padding_share:.1%} padding"
    )
    return f"{markdown_table(['what', 's', 'tokens', 'tokens/s'], lines)}\n\n{told}\n"


def _medians(rounds: list[Round]) -> Round:
    each = [asdict(one) for one in rounds]
    return Round(**{name: statistics.median(one[name] for one in each) for name in each[0]})


def _manifest(stage: str) -> Manifest:
    return Manifest(stage=stage, recipe_hash=_KEY)


def _fed(rows: list[Any]) -> list[list[int]]:
    """Give the tokens that the target reads of each row: all but the last."""
    return [row.input_ids[:-1] for row in rows]


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad at the end, as `collect` does: ids and attention mask."""
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    input_ids, mask = (
        torch.nn.utils.rnn.pad_sequence(each, batch_first=True).to(device) for each in (ids, masks)
    )
    return input_ids, mask


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=smollm2, ...")
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="a finished run")
    parser.add_argument("--rows", type=int, default=96, help="calls, in whole sessions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs go for the time being")
    parser.add_argument("--smoke", action="store_true", help="a tiny random target, in seconds")
    return parser


if __name__ == "__main__":
    main()
