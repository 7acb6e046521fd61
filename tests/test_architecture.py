"""The layer rules of the house, read from the syntax trees of its files.

Each rule is a function from one module's source to sentences that say what is wrong, so the same
function judges the real files and the planted violations below.
"""

import ast
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("kernels", "inference", "data_pipelines")
PACKAGES = {
    "dflash_train": ROOT / "dflash_train",
    "dflash_data": ROOT / "data_pipelines" / "dflash_data",
    "dflash_inference": ROOT / "inference" / "dflash_inference",
    "dflash_kernels": ROOT / "kernels" / "dflash_kernels",
}

# Library -> the only modules or packages that may import it.
THIRD_PARTY = {
    "accelerate": (
        "dflash_train.launch",
        "dflash_train.training.accelerator",
        "dflash_train.training.stage",
        "dflash_train.training.trainer",
        "dflash_train.training.state",
    ),
    "datasets": ("dflash_data", "dflash_inference.eval_sets", "dflash_train.features.store"),
    "datatrove": ("dflash_data",),
    "deepspeed": ("dflash_train.training.accelerator",),  # accelerate loads it, too
    "huggingface_hub": (
        "dflash_train.release.hub",
        "dflash_train.release.resolve",
        "dflash_train.features.target_folder",  # looks into the local cache, never asks the Hub
    ),
    "hydra": ("dflash_train.cli", "dflash_train.config"),
    "omegaconf": ("dflash_train.cli", "dflash_train.config"),
    "triton": (
        "dflash_kernels",
        "dflash_inference.serve_check.vllm_worker",  # in vLLM's environment
    ),
    "vllm": (  # in an environment of its own
        "dflash_data.collect.vllm_capture",
        "dflash_inference.serve_check.vllm_worker",
    ),
    "wandb": ("dflash_train.training.tracking",),
}

# Package -> what it may import of ours, beside itself.
NEIGHBOURS = {
    "dflash_data": (
        "dflash_train.config",
        "dflash_train.records",
        "dflash_train.features",
        "dflash_train.training.accelerator",
    ),
    "dflash_inference": (
        "dflash_train.config",
        "dflash_train.records",
        "dflash_train.features",
        "dflash_train.drafter",
        "dflash_train.ops",
        "dflash_train.release.formats",
        "dflash_train.training.replay",  # its statistics are what the report prints
    ),
    "dflash_kernels": (),
}

# Rooms of dflash_train that may reach into a neighbour, inside functions only.
SEAMS = {
    "dflash_train.stages": ("dflash_data", "dflash_inference"),
    "dflash_train.ops": ("dflash_kernels",),
}

# The rooms of dflash_train, top to bottom: a room imports only from the rooms below it.
LADDER = ("cli", "stages", "release", "training", "drafter", "features", "records", "config")
BESIDE = {"ops": ("drafter", "training")}  # shares the place of these rooms


@dataclass(frozen=True)
class Import:
    """One imported name, absolute, and whether it is imported only when a function runs."""

    name: str
    line: int
    in_function: bool


@dataclass(frozen=True)
class Module:
    """A file as an import name and a syntax tree."""

    name: str
    tree: ast.Module
    is_package: bool = False

    @classmethod
    def of(cls, path: Path, folder: Path) -> "Module":
        parts = list(path.relative_to(folder).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        return cls(name, ast.parse(path.read_text(), str(path)), is_package)

    @property
    def room(self) -> str:
        parts = self.name.split(".")
        if len(parts) == 1:  # dflash_train/__init__.py stands below everything
            return LADDER[-1]
        return {"__main__": "cli", "launch": "cli"}.get(parts[1], parts[1])


def is_within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def imports(module: Module) -> Iterator[Import]:
    """Yield every import, `import_module("x")` included."""
    yield from _imports(module.tree, module, in_function=False)


def _imports(node: ast.AST, module: Module, *, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _imported_names(child, module):
            yield Import(name, getattr(child, "lineno", 0), in_function)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, module, in_function=in_function or is_function)


def _imported_names(node: ast.AST, module: Module) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=source, names=names, level=level):
            package = module.name.split(".")
            above = level - 1 if module.is_package else level
            anchor = package[: len(package) - above] if level else []
            base = ".".join([*anchor, *([source] if source else [])])
            return [f"{base}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def third_party_violations(module: Module) -> list[str]:
    found = []
    for entry in imports(module):
        library = entry.name.split(".")[0]
        if library in THIRD_PARTY and not is_within(module.name, THIRD_PARTY[library]):
            allowed = ", ".join(THIRD_PARTY[library]) or "no module"
            found.append(f"{module.name}:{entry.line} imports {library}; only {allowed} may")
    return found


def package_violations(module: Module) -> list[str]:
    found = []
    package = module.name.split(".")[0]
    for entry in imports(module):
        other = entry.name.split(".")[0]
        if other not in PACKAGES or other == package:
            continue
        if package == "dflash_train":
            allowed = SEAMS.get(f"{package}.{module.room}", ())
            if other not in allowed:
                found.append(f"{module.name}:{entry.line} imports {entry.name}")
            elif not entry.in_function:
                found.append(f"{module.name}:{entry.line} imports {entry.name} outside a function")
        elif not is_within(entry.name, NEIGHBOURS[package]):
            found.append(f"{module.name}:{entry.line} imports {entry.name}")
    return found


def room_violations(module: Module) -> list[str]:
    if module.name.split(".")[0] != "dflash_train" or module.room == "testing":
        return []
    found = []
    for entry in imports(module):
        parts = entry.name.split(".")
        if parts[0] != "dflash_train" or len(parts) == 1 or parts[1].startswith("__version"):
            continue
        if not _may_import(module.room, parts[1]):
            found.append(f"{module.name}:{entry.line} imports {entry.name}, which is not below it")
    return found


def _may_import(room: str, other: str) -> bool:
    if room == other:
        return True
    lower = [LADDER.index(place) for place in BESIDE.get(other, (other,)) if place in LADDER]
    upper = [LADDER.index(place) for place in BESIDE.get(room, (room,)) if place in LADDER]
    if not lower or not upper:
        return False
    shares_a_place = room in BESIDE or other in BESIDE
    return min(upper) < max(lower) or (shares_a_place and min(upper) <= max(lower))


def kernel_violations(module: Module) -> list[str]:
    if not is_within(module.name, ("dflash_kernels",)):
        return []
    allowed = {*sys.stdlib_module_names, "torch", "triton", "dflash_kernels"}
    return [
        f"{module.name}:{entry.line} imports {entry.name}; kernels know torch and triton only"
        for entry in imports(module)
        if entry.name.split(".")[0] not in allowed
    ]


def search_path_violations(module: Module) -> list[str]:
    found = []
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(value=ast.Name(id="sys"), attr="path") as place:
                found.append(f"{module.name}:{place.lineno} touches the module search path")
            case ast.ImportFrom(module="sys", names=names) if "path" in [n.name for n in names]:
                found.append(f"{module.name}:{node.lineno} touches the module search path")
            case ast.Attribute(attr="addsitedir") as place:
                found.append(f"{module.name}:{place.lineno} touches the module search path")
    return found


def name_violations(module: Module) -> list[str]:
    stem = module.name.split(".")[-1]
    forbidden = stem in ("utils", "util", "common", "helpers", "helper", "manager", "base")
    if forbidden or stem.startswith("base_"):
        return [f"{module.name} is named after nothing: a function lives with the noun it serves"]
    return []


LAYER_RULES = (
    third_party_violations,
    package_violations,
    room_violations,
    kernel_violations,
    name_violations,
)


def our_modules() -> list[Module]:
    """Give every module of the packages that exist."""
    return [
        Module.of(path, folder.parent)
        for folder in PACKAGES.values()
        for path in sorted(folder.rglob("*.py"))
    ]


def other_files() -> list[Module]:
    """Give what lies outside the packages: the tests and train.py."""
    paths = [*sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
    return [Module.of(path, ROOT) for path in paths]


def test_every_module_keeps_the_layer_rules() -> None:
    modules = our_modules()
    assert {"dflash_train", "dflash_train.config"} <= {module.name for module in modules}
    found = [text for module in modules for rule in LAYER_RULES for text in rule(module)]
    assert not found, "\n".join(found)


def test_nobody_but_tests_imports_the_testing_module() -> None:
    users = [
        module.name
        for module in our_modules()
        for entry in imports(module)
        if is_within(entry.name, ("dflash_train.testing",))
    ]
    assert users == []


def test_no_file_touches_the_search_path_and_all_names_are_nouns() -> None:
    files = our_modules() + other_files()
    rules = (search_path_violations, name_violations)
    found = [text for file in files for rule in rules for text in rule(file)]
    assert not found, "\n".join(found)


PLANTED = [
    ("dflash_train.stages", "import datatrove", "only dflash_data may"),
    ("dflash_train.training.batching", "from accelerate import Accelerator", "only dflash_train."),
    ("dflash_data.collect.stage", "from accelerate import Accelerator", "imports accelerate"),
    ("dflash_train.training.trainer", "import deepspeed", "only dflash_train."),
    ("dflash_train.drafter.model", "def f():\n    import triton", "only dflash_kernels,"),
    ("dflash_data.executor", "from omegaconf import OmegaConf", "imports omegaconf"),
    ("dflash_train.training.trainer", "import wandb", "imports wandb"),
    ("dflash_train.features.target", "import huggingface_hub", "imports huggingface_hub"),
    ("dflash_train.drafter.model", "import datasets", "imports datasets"),
    ("dflash_train.cli", "import importlib\nimportlib.import_module('wandb')", "imports wandb"),
    ("dflash_data.ingest.stage", "from dflash_inference import verify", "imports dflash_inference"),
    ("dflash_inference.report", "import dflash_data.drops", "imports dflash_data.drops"),
    ("dflash_inference.decoder", "import dflash_train.training.trainer", "training.trainer"),
    (
        "dflash_data.collect.stage",
        "from dflash_train.drafter.model import Drafter",
        "drafter.model",
    ),
    (
        "dflash_train.stages.work",
        "from dflash_data.ingest.stage import ingest",
        "outside a function",
    ),
    ("dflash_train.stages.walk", "class A:\n    import dflash_data", "outside a function"),
    ("dflash_train.cli", "def f():\n    import dflash_data", "imports dflash_data"),
    ("dflash_train.ops", "import dflash_kernels", "outside a function"),
    ("dflash_train.drafter.model", "def f():\n    import dflash_kernels", "dflash_kernels"),
    ("dflash_train.records.manifest", "from dflash_train.features import store", "not below"),
    ("dflash_train.drafter.model", "from ..training import losses", "not below"),
    ("dflash_train.config", "import dflash_train.records", "not below"),
    ("dflash_train.stages", "from dflash_train import cli", "not below"),
    ("dflash_train.ops", "from dflash_train.release import hub", "not below"),
    ("dflash_train.features.target", "from dflash_train import ops", "not below"),
    ("dflash_train.cli", "from dflash_train import testing", "not below"),
    ("dflash_kernels._launch", "import numpy", "torch and triton only"),
    ("dflash_kernels._launch", "from dflash_train import ops", "imports dflash_train.ops"),
    ("dflash_train.training.utils", "", "named after nothing"),
    ("dflash_data.base_adapter", "", "named after nothing"),
]


@pytest.mark.parametrize(("name", "source", "complaint"), PLANTED)
def test_a_planted_violation_is_found(name: str, source: str, complaint: str) -> None:
    module = Module(name, ast.parse(source))
    found = [text for rule in LAYER_RULES for text in rule(module)]
    assert any(complaint in text for text in found), found


LAWFUL = [
    ("dflash_train.stages.work", "def f():\n    from dflash_data.ingest.stage import ingest"),
    ("dflash_train.stages", "def f():\n    from dflash_inference import report"),
    ("dflash_train.ops", "def f():\n    import dflash_kernels"),
    ("dflash_train.ops", "from dflash_train.training.losses import cross_entropy"),
    ("dflash_train.drafter.attention", "from dflash_train.ops import block_attention"),
    ("dflash_train.cli", "from dflash_train.stages.table import STAGES\nimport hydra"),
    ("dflash_train.training.trainer", "import accelerate\nfrom .replay import replay"),
    ("dflash_data.collect.stage", "from dflash_train.training.accelerator import make_accelerator"),
    ("dflash_inference.decoder", "from dflash_train.drafter.model import Drafter\nimport torch"),
    ("dflash_kernels._launch", "import math\nimport torch\nimport triton.language as tl"),
    ("dflash_train.testing", "from dflash_train.training import trainer"),
]


@pytest.mark.parametrize(("name", "source"), LAWFUL)
def test_what_the_rules_allow_passes(name: str, source: str) -> None:
    module = Module(name, ast.parse(source))
    assert [text for rule in LAYER_RULES for text in rule(module)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.path.insert(0, '.')",
        "from sys import path",
        "import site\nsite.addsitedir('.')",
    ],
)
def test_a_planted_edit_of_the_search_path_is_found(source: str) -> None:
    assert search_path_violations(Module("dflash_train.cli", ast.parse(source)))


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_a_source_root_holds_packages_and_no_modules(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).glob("*.py")) == []


def run_at_the_root(code: str, *, search_path: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_the_kernels_folder_is_never_a_module_with_a_file() -> None:
    code = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""
    assert not run_at_the_root(code).startswith(str(ROOT))


def test_an_installed_package_named_kernels_hides_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = "import kernels; print(kernels.__file__)"
    assert run_at_the_root(code, search_path=str(tmp_path)).startswith(str(tmp_path))


def test_transformers_does_not_take_the_folder_for_the_kernels_library() -> None:
    code = """
from importlib import metadata
from transformers.utils.import_utils import is_kernels_available
installed = any(d.metadata["Name"] == "kernels" for d in metadata.distributions())
print(installed or not is_kernels_available())
"""
    assert run_at_the_root(code) == "True"


def test_a_warning_in_our_modules_is_an_error_and_others_are_not() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "store.py", 1, "dflash_train.features.store")
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("theirs", UserWarning, "nn.py", 1, "torch.nn")
    assert [str(entry.message) for entry in seen] == ["theirs"]


def test_the_wheel_holds_our_packages_and_the_recipes_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    build = [
        "wheel",
        source,
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} <= set(PACKAGES)
    recipes = ROOT / "recipes"
    want = {f"dflash_train/recipes/{p.relative_to(recipes)}" for p in recipes.rglob("*.yaml")}
    assert {name for name in names if "/recipes/" in name} == want
    modules = {path.relative_to(f.parent) for f in PACKAGES.values() for path in f.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {str(path) for path in modules}


def test_make_quick_leaves_out_what_exists_and_no_whole_package() -> None:
    lines = (ROOT / "tests" / "not_in_quick.txt").read_text().splitlines()
    left_out = {line.split("=", maxsplit=1)[1] for line in lines}
    for name in left_out:
        path, _, test = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not test or f"def {test}(" in (ROOT / path).read_text(), name
    for package in PACKAGES:
        folder = ROOT / "tests" / package.replace("dflash_", "test_")
        files = {path.relative_to(ROOT).as_posix() for path in folder.glob("test_*.py")}
        assert files - left_out, package
