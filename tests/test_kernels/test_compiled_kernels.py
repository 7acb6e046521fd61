"""Every kernel in every default configuration, compiled without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_tables import README, SHARED_LIMITS, TARGETS, Compiled, specimens, written
from dflash_kernels._launch import Arch

ROOT = Path(__file__).resolve().parents[2]


def uninterpreted(*arguments: str, cache: Path) -> str:
    """Run Python in a process that does not interpret kernels, and give what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search_path = os.pathsep.join(str(ROOT / each) for each in ("", "kernels", "inference"))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": search_path, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(arch: Arch, cache: Path, *, only: str = "") -> list[Compiled]:
    command = ["-m", "benchmarks.kernel_tables", "--compile", arch, "--only", only]
    lines = uninterpreted(*command, cache=cache).splitlines()
    return [Compiled(**json.loads(line)) for line in lines]


def assert_fit(found: list[Compiled], arch: Arch) -> None:
    for each in found:
        assert each.spilled == 0, each
        assert each.registers > 0, each
        assert each.shared_bytes <= SHARED_LIMITS[arch], each


@pytest.mark.parametrize("arch", [Arch.sm_90, Arch.gfx942])
def test_no_bf16_kernel_spills_and_the_readme_has_its_registers(arch: Arch, tmp_path: Path):
    found = compiled(arch, tmp_path, only="bf16")
    assert len(found) == sum("bf16" in each.name for each in specimens(arch)) > 8
    assert_fit(found, arch)
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in written(README.read_text(), "compiled").splitlines()
    )
    column = header.index(arch)
    assert {row[0]: row[column] for row in rows} == {each.name: each.cell for each in found}


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_no_kernel_spills_in_any_number_format(arch: Arch, tmp_path: Path):
    found = compiled(arch, tmp_path)
    assert [each.name for each in found] == [each.name for each in specimens(arch)]
    assert_fit(found, arch)


def test_a_kernel_with_too_many_registers_is_seen_to_spill(tmp_path: Path):
    code = """
from dataclasses import replace
from benchmarks.kernel_tables import compile_specimen
from dflash_kernels._launch import Arch, Config
from dflash_kernels.context_kv import kernels_to_compile
for arch, rows in ((Arch.sm_90, 64), (Arch.gfx942, 128)):
    forward = kernels_to_compile(arch)[0]
    wide = Config(num_warps=1, num_stages=1, tiles={"ROWS": rows})
    one_layer = {**forward.constexprs, "LAYERS": 1}
    crowded = replace(forward, config=wide, constexprs=one_layer)
    print(compile_specimen(crowded, arch).spilled)
"""
    spills = uninterpreted("-c", code, cache=tmp_path).split()
    assert len(spills) == 2
    assert all(int(each) > 0 for each in spills), spills
