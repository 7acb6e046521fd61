"""The Triton kernels against torch's operations, FlexAttention and Liger, on a GPU.

Numbers first: before the clock starts, every contender's results and gradients are compared with
the twin's in float32, at the limits of the number format, and a contender that misses them ends the
bench. Then the forward pass and the backward pass are timed apart, medians of many runs with a
cleared cache between them, beside the roofline of `kernel_tables`. Run by `make bench-kernels` on
any CUDA or ROCm machine; elsewhere it says so. It ends in a line of JSON.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from triton.testing import do_bench

from benchmarks.kernel_cases import CASES, LIGER, OURS, TWIN, Case, CaseOf, Sizes
from benchmarks.kernel_tables import CHIPS, Chip, all_work, roofline_ms

LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 2e-2)}
"""Relative RMS error allowed for (outputs, gradients): those of the tests."""
RIVAL_FACTOR = 5
"""How much more others may round: Liger keeps logits in bf16."""
WARM_UP_MS, TIMED_MS = 200, 1000
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a contender's numbers lie from the twin's in float32."""

    op: str
    contender: str
    output: float
    """Largest RMS error over RMS value of an output."""
    gradient: float | None
    """Of a gradient; None where the contender has no backward pass on this device."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one pass of one contender takes."""

    op: str
    stage: str
    """`forward` or `backward`."""
    contender: str
    ms: float
    """Median."""
    roofline_ms: float | None
    """The least for this chip; None where its data sheet is not in the table."""


def check_numbers(
    build: CaseOf, sizes: Sizes, *, device: torch.device, dtype: torch.dtype
) -> list[Errors]:
    """Compare every contender with the twin in float32 on the same inputs.

    Raises:
        RuntimeError: A contender's error is above the limit of the number format, for others than
            ours and the twin `RIVAL_FACTOR` times the limit.
    """
    torch.manual_seed(SEED)
    case = build(sizes, device, dtype)
    torch.manual_seed(SEED)
    wide = build(sizes, device, torch.float32)
    for exact, rounded in zip(wide.inputs, case.inputs, strict=True):
        exact.data.copy_(rounded.data)
    want = [output.detach() for output in wide.contenders[TWIN]()]
    upstream = [torch.randn_like(output) for output in want]
    wanted = wide.gradients(wide.contenders[TWIN](), upstream)
    found = [
        _errors(case, name, want, wanted, [each.to(dtype) for each in upstream])
        for name in case.contenders
    ]
    for each in found:
        _judge(each, LIMITS[dtype])
    return found


def _errors(
    case: Case, name: str, want: list[Tensor], wanted: list[Tensor], upstream: list[Tensor]
) -> Errors:
    outputs = case.contenders[name]()
    error, gradient_error = _worst([each.detach() for each in outputs], want), None
    if outputs[0].requires_grad:
        upstream = [each.to(output.dtype) for each, output in zip(upstream, outputs, strict=True)]
        gradient_error = _worst(case.gradients(outputs, upstream), wanted)
    return Errors(op=case.op, contender=name, output=error, gradient=gradient_error)


def _worst(got: list[Tensor], want: list[Tensor]) -> float:
    """Give the largest RMS error over RMS value; NaN stays NaN."""
    errors = [
        (a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()
        for a, b in zip(got, want, strict=True)
    ]
    return torch.stack(errors).max().item()


def _judge(errors: Errors, limits: tuple[float, float]) -> None:
    factor = 1 if errors.contender in (OURS, TWIN) else RIVAL_FACTOR
    found = (("outputs", errors.output, limits[0]), ("gradients", errors.gradient, limits[1]))
    for name, error, own_limit in found:
        limit = factor * own_limit
        if error is not None and not error <= limit:  # NaN is not
            raise RuntimeError(
                f"{errors.op}, {errors.contender}: RMS error {error:.1e} of {name} exceeds "
                f"{limit:.0e}. Nothing is timed."
            )


def time_case(case: Case, *, chip: Chip | None) -> list[Timing]:
    """Time both passes of every contender."""
    rooflines = {} if chip is None else _rooflines(case.op, chip)
    timings = []
    for name, run in case.contenders.items():
        outputs = run()
        # Of a sum of losses 1, with which Liger has nothing left to do.
        upstream = [(torch.randn_like if each.dim() else torch.ones_like)(each) for each in outputs]

        def go_back(outputs: list[Tensor] = outputs, upstream: list[Tensor] = upstream) -> object:
            return case.gradients(outputs, upstream)

        for stage, timed in (("forward", run), ("backward", go_back)):
            ms = do_bench(timed, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median")
            assert isinstance(ms, float)
            timings.append(
                Timing(
                    op=case.op, stage=stage, contender=name, ms=ms,
                    roofline_ms=rooflines.get(stage),
                )
            )  # fmt: skip
    return timings


def _rooflines(op: str, chip: Chip) -> dict[str, float]:
    """Give the least milliseconds of each stage; cross entropy has both in its forward pass."""
    if op == "block_cross_entropy":
        return {"forward": sum(roofline_ms(each, chip) for each in all_work() if op in each.name)}
    named = {each.name: roofline_ms(each, chip) for each in all_work()}
    return {stage: named[f"{op} {stage}"] for stage in ("forward", "backward")}


def chip_of(device_name: str) -> Chip | None:
    """Give the data sheet of a device, if the table has it."""
    return next((chip for chip in CHIPS if chip.name.split()[0] in device_name), None)


def table(timings: list[Timing]) -> str:
    """Give the timings in Markdown, each beside its roofline and the twin's time."""
    rows = ["| op | pass | contender | ms | of the roofline | of the twin's time |"]
    rows.append("|---|---|---|---:|---:|---:|")
    twins = {(each.op, each.stage): each.ms for each in timings if each.contender == TWIN}
    for each in timings:
        share = "-" if each.roofline_ms is None else f"{each.roofline_ms / each.ms:.0%}"
        ratio = each.ms / twins[each.op, each.stage]
        rows.append(
            f"| {each.op} | {each.stage} | {each.contender} | {each.ms:.3f} | {share} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(rows)


def describe(device_name: str | None) -> dict[str, object]:
    """Say where and when this ran, and with which versions."""
    versions = {}
    for name in ("torch", "triton", "liger-kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "benchmark": "kernels",
        "device": device_name,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions,
    }


def main() -> None:
    """Check and time everything, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=Sizes.num_blocks, help="A")
    parser.add_argument("--tokens", type=int, default=Sizes.num_tokens, help="T")
    parser.add_argument("--vocabulary", type=int, default=Sizes.vocab_size, help="V")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-kernels: no CUDA or ROCm device here, so nothing was timed.")
        print(json.dumps({**describe(None), "timings": []}))
        return
    sizes = Sizes(
        num_blocks=options.blocks, num_tokens=options.tokens, vocab_size=options.vocabulary
    )
    name, device = torch.cuda.get_device_name(), torch.device("cuda")
    chip = chip_of(name) if sizes == Sizes() else None  # rooflines are those of the full sizes
    errors, timings = [], []
    for build in CASES:
        errors += check_numbers(build, sizes, device=device, dtype=torch.bfloat16)
        torch.cuda.empty_cache()
        timings += time_case(build(sizes, device, torch.bfloat16), chip=chip)
        torch.cuda.empty_cache()
    absent = "" if any(each.contender == LIGER for each in errors) else "; Liger is not installed"
    print(f"{name}, bf16, {sizes}{absent}", file=sys.stderr)
    print(table(timings))
    found = {"errors": [asdict(each) for each in errors], "timings": [asdict(t) for t in timings]}
    print(json.dumps({**describe(name), "sizes": asdict(sizes), **found}))


if __name__ == "__main__":
    main()
