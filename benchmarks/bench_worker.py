"""One contender in a process of its own: build it, warm it up, measure steps, print JSON.

Started by `bench_train`, which also puts a rival's folder on this process's search path.
"""

import argparse
import json
import re
import resource
from pathlib import Path

import torch

from benchmarks.bench_case import Case, Shapes, build_case
from benchmarks.bench_measure import Stepper, TrainingStep


def build_step(contender: str, case: Case, *, attention: str, chunk_blocks: int) -> TrainingStep:
    """Build a contender; its packages are imported here and nowhere else."""
    if contender == "ours":
        from benchmarks.bench_ours import OurStep

        return OurStep(case)
    if contender == "twin":
        from benchmarks.bench_twin import PlainTwin

        return PlainTwin(case)
    from benchmarks.bench_rivals import SpecForgeStep, SpeculatorsStep

    if contender == "speculators":
        return SpeculatorsStep(case, attention=attention)
    return SpecForgeStep(case, attention=attention, chunk_blocks=chunk_blocks)


def limit_memory() -> None:
    """Make an allocation beyond the memory that is free now fail here, not kill a neighbour."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    limit = int(found[1]) * 1024 * 9 // 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> None:
    """Measure one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--precision", required=True, help="torch.set_float32_matmul_precision")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--chunk-blocks", type=int, default=128)
    parser.add_argument("--shapes", default="{}", help="JSON that replaces fields of Shapes")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slot-losses", help="file to write [A, K] cross entropies to")
    arguments = parser.parse_args()
    limit_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    case = build_case(Shapes(**json.loads(arguments.shapes)))
    step = build_step(
        arguments.contender,
        case,
        attention=arguments.attention,
        chunk_blocks=arguments.chunk_blocks,
    )
    if arguments.slot_losses:
        torch.save(step.slot_losses(), arguments.slot_losses)
    torch.set_float32_matmul_precision(arguments.precision)
    stepper = Stepper(step)
    # The first step pays for lazily allocated state; its loss is the one of the shared weights.
    found = {"loss": stepper.take(), "growth_mib": stepper.growth_mib()}
    print(json.dumps(found | {"seconds": [stepper.seconds() for _ in range(arguments.steps)]}))


if __name__ == "__main__":
    main()
