"""What is known about the Triton kernels without a GPU: what compilers make of them, and rooflines.

Triton brings the compilers of NVIDIA and AMD with it, so every kernel is compiled here in the
configuration that each architecture would run; the machine code tells its registers and spills.
Times are computed from the counts of the kernels' own schedules and from data sheets: no kernel
has run. `make kernel-tables` writes both tables into kernels/README.md.
"""

import argparse
import contextlib
import importlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dflash_kernels._launch import Arch, Specimen, Work

OPS = ("block_attention", "block_cross_entropy", "context_kv")
README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
TARGETS = {
    Arch.sm_80: GPUTarget("cuda", 80, 32),
    Arch.sm_89: GPUTarget("cuda", 89, 32),
    Arch.sm_90: GPUTarget("cuda", 90, 32),
    Arch.sm_100: GPUTarget("cuda", 100, 32),
    Arch.gfx942: GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {
    Arch.sm_80: 163 * 1024, Arch.sm_89: 99 * 1024, Arch.sm_90: 227 * 1024,
    Arch.sm_100: 227 * 1024, Arch.gfx942: 64 * 1024,
}  # fmt: skip
"""Bytes of shared memory that one block may have (CUDA programming guide; MI300X ISA: LDS)."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A GPU as its data sheet has it."""

    name: str
    arch: Arch
    teraflops: float
    """Of dense bf16 products."""
    terabytes_per_s: float
    source: str


CHIPS = (
    Chip(name="A100 80 GB SXM", arch=Arch.sm_80, teraflops=312, terabytes_per_s=2.039,
         source="NVIDIA A100 Tensor Core GPU data sheet"),
    Chip(name="H100 SXM", arch=Arch.sm_90, teraflops=989.5, terabytes_per_s=3.35,
         source="NVIDIA H100 Tensor Core GPU data sheet (1,979 TFLOPS with sparsity)"),
    Chip(name="H200 SXM", arch=Arch.sm_90, teraflops=989.5, terabytes_per_s=4.8,
         source="NVIDIA H200 Tensor Core GPU data sheet (1,979 TFLOPS with sparsity)"),
    Chip(name="B200", arch=Arch.sm_100, teraflops=2250, terabytes_per_s=8.0,
         source="NVIDIA Blackwell architecture brief, HGX B200 (4.5 PFLOPS with sparsity)"),
    Chip(name="MI300X", arch=Arch.gfx942, teraflops=1307.4, terabytes_per_s=5.3,
         source="AMD Instinct MI300X data sheet"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiler made of one kernel."""

    name: str
    arch: Arch
    registers: int
    """A thread's; on AMD vector registers, those of accumulators included."""
    spilled: int
    """Bytes a thread stores to and loads from local memory for want of registers; on AMD the
    number of registers that went there."""
    shared_bytes: int
    num_warps: int
    num_stages: int

    @property
    def cell(self) -> str:
        """Warps x stages, then registers, spills and KiB of shared memory, for the table."""
        launch = f"{self.num_warps}x{self.num_stages}"
        return f"{launch}: {self.registers}, {self.spilled}, {self.shared_bytes / 1024:.1f}"


def specimens(arch: Arch) -> list[Specimen]:
    """Give every kernel as an architecture would run it."""
    modules = [importlib.import_module(f"dflash_kernels.{name}") for name in OPS]
    return [each for module in modules for each in module.kernels_to_compile(arch)]


def all_work() -> list[Work]:
    """Give what every pass of every op does at Qwen3-8B's shapes."""
    modules = [importlib.import_module(f"dflash_kernels.{name}") for name in OPS]
    return [each for module in modules for each in module.work()]


def compile_specimen(specimen: Specimen, arch: Arch) -> Compiled:
    """Compile one kernel without a device."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True  # the only place that tells of spills,
        knobs.compilation.always_compile = True  # and kept results do not have it
        kernel = triton.compile(
            _source(specimen),
            target=TARGETS[arch],
            options={
                "num_warps": specimen.config.num_warps,
                "num_stages": specimen.config.num_stages,
            },
        )
    assert isinstance(kernel, CompiledKernel)
    is_amd = TARGETS[arch].backend == "hip"
    registers, spilled = _amd_usage(kernel) if is_amd else _nvidia_usage(log.getvalue())
    return Compiled(
        name=specimen.name,
        arch=arch,
        registers=registers,
        spilled=spilled,
        shared_bytes=kernel.metadata.shared,
        num_warps=specimen.config.num_warps,
        num_stages=specimen.config.num_stages,
    )


def _source(specimen: Specimen) -> ASTSource:
    """Give the kernel with its argument types, as a launch would find them out."""
    constexprs = {**specimen.constexprs, **specimen.config.tiles}
    names = specimen.kernel.arg_names
    wanted = set(names) - set(constexprs)
    assert wanted == set(specimen.signature), f"{specimen.name}: {wanted ^ set(specimen.signature)}"
    signature, attrs = {}, {}
    for place, name in enumerate(names):
        kind = specimen.signature.get(name, "constexpr")
        for path, text in _leaves(kind, (place,)):
            if text.endswith(":16"):
                attrs[path] = [["tt.divisibility", 16]]
        signature[name] = _bare(kind)
    return ASTSource(specimen.kernel, signature, constexprs, attrs)


def _leaves(
    kind: str | tuple[str, ...], path: tuple[int, ...]
) -> Iterable[tuple[tuple[int, ...], str]]:
    """Give each type of an argument with its path: an argument may be a tuple of them."""
    if isinstance(kind, str):
        return [(path, kind)]
    return [((*path, place), each) for place, each in enumerate(kind)]


def _bare(kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(kind, str):
        return kind.removesuffix(":16")
    return tuple(each.removesuffix(":16") for each in kind)


def _nvidia_usage(log: str) -> tuple[int, int]:
    """Read ptxas's report: registers, and bytes of spill stores and loads."""
    (registers,) = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(registers), sum(int(stored) + int(loaded) for stored, loaded in spills)


def _amd_usage(kernel: CompiledKernel) -> tuple[int, int]:
    """Read the metadata at the end of AMD's assembly text."""
    text = kernel.asm["amdgcn"]

    def of(name: str) -> int:
        (found,) = re.findall(rf"\.{name}:\s+(\d+)", text)
        return int(found)

    return of("vgpr_count"), of("vgpr_spill_count") + of("sgpr_spill_count")


def compile_all(only: str = "") -> list[Compiled]:
    """Compile all kernels whose names hold a text, for every architecture."""
    return [
        compile_specimen(specimen, arch)
        for arch in TARGETS
        for specimen in specimens(arch)
        if only in specimen.name
    ]


def compile_table(found: list[Compiled]) -> str:
    """Give what compilers made of the kernels, in Markdown: a column an architecture."""
    cells = {(each.name, each.arch): each.cell for each in found}
    rows = ["| kernel | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
    for name in dict.fromkeys(each.name for each in found):
        rows.append(f"| {name} | " + " | ".join(cells[name, arch] for arch in TARGETS) + " |")
    return "\n".join(rows)


def work_table() -> str:
    """Give the counts of every pass beside their bounds, in Markdown."""
    rows = [
        "| pass | GFLOP | of the least | MB moved, no cache | MB at least |",
        "|---|---:|---:|---:|---:|",
    ]
    for each in all_work():
        ratio = f"{each.flops / each.bound_flops:.3f}" if each.bound_flops else "-"
        rows.append(
            f"| {each.name} | {each.flops / 1e9:,.1f} | {ratio} | {each.num_bytes / 1e6:,.0f} | "
            f"{each.bound_bytes / 1e6:,.0f} |"
        )
    return "\n".join(rows)


def roofline_ms(work: Work, chip: Chip) -> float:
    """Give the milliseconds that no kernel undercuts: the least products, or the least bytes."""
    return _ms(work.bound_flops, work.bound_bytes, chip)


def schedule_ms(work: Work, chip: Chip) -> float:
    """Give the milliseconds of this schedule at peak rates if no load ever met a cache."""
    return _ms(work.flops, work.num_bytes, chip)


def _ms(flops: int, num_bytes: int, chip: Chip) -> float:
    products, memory = chip.teraflops * 1e12, chip.terabytes_per_s * 1e12
    return 1e3 * max(flops / products, num_bytes / memory)


def roofline_table() -> str:
    """Give computed times by chip, in Markdown: the roofline, then this schedule's worst."""
    rows = ["| pass | " + " | ".join(chip.name for chip in CHIPS) + " |"]
    rows.append("|---|" + "---:|" * len(CHIPS))
    for each in all_work():
        times = [
            f"{roofline_ms(each, chip):.3f} .. {schedule_ms(each, chip):.3f}" for chip in CHIPS
        ]
        rows.append(f"| {each.name} | " + " | ".join(times) + " |")
    return "\n".join(rows)


def chip_table() -> str:
    """Give the data sheets' figures, in Markdown."""
    rows = ["| chip | dense bf16, TFLOPS | memory, TB/s | source |", "|---|---:|---:|---|"]
    rows += [
        f"| {chip.name} | {chip.teraflops:g} | {chip.terabytes_per_s:g} | {chip.source} |"
        for chip in CHIPS
    ]
    return "\n".join(rows)


COUNTED = {"work": work_table, "roofline": roofline_table, "chips": chip_table}
"""Tables that need no compiler, by their marks in the README."""


def written(text: str, name: str) -> str:
    """Give what a README has between `<!-- NAME -->` and `<!-- /NAME -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, f"{README} has no marks of {name}"
    return found.group(1)


def with_tables(text: str, tables: dict[str, str]) -> str:
    """Put tables between their marks in a README."""
    for name, table in tables.items():
        before = f"<!-- {name} -->\n{written(text, name)}\n"
        text = text.replace(before, f"<!-- {name} -->\n{table}\n")
    return text


def main() -> None:
    """Print all tables, and write them into kernels/README.md if asked; or compile for one chip."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into kernels/README.md")
    parser.add_argument(
        "--compile", type=Arch, choices=list(TARGETS), metavar="ARCH",
        help="compile for one architecture only; print a line of JSON for each kernel",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="kernels whose names hold this, as bf16")
    options = parser.parse_args()
    if options.compile is not None:
        for specimen in specimens(options.compile):
            if options.only in specimen.name:
                print(json.dumps(asdict(compile_specimen(specimen, options.compile))), flush=True)
        return
    tables = {name: table() for name, table in COUNTED.items()}
    tables["compiled"] = compile_table(compile_all(options.only or "bf16"))
    for table in tables.values():
        print(table, end="\n\n")
    if options.write:
        README.write_text(with_tables(README.read_text(), tables))


if __name__ == "__main__":
    main()
