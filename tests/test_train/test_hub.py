import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from dflash_train.cli import main
from dflash_train.config import UnavailableError, compose
from dflash_train.drafter.checkpoint import load_checkpoint, save_checkpoint
from dflash_train.drafter.metadata import read_metadata
from dflash_train.records.conversation import write_shard
from dflash_train.records.manifest import Manifest, file_hash
from dflash_train.release.hub import Destination, HubFile, upload
from dflash_train.release.resolve import resolve_checkpoint
from dflash_train.stages.workshop import Workshop
from dflash_train.testing import save_tiny_target, tiny_drafter, tiny_target
from tests.test_train.finished_run import PLACE, answered, build_run, write_conversations
from tests.test_train.local_hub import TOKEN, LocalHub

REPO = "somebody/tiny-drafter"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub of this test's own, which the client of this process talks to."""
    server = LocalHub()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # another protocol for large files, which this Hub lacks
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target") / "tiny-target")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of this test's own."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "invented"))


@pytest.fixture
def push(run_dir: Path, target_folder: Path) -> Callable[..., int]:
    """Run the command on the run's best drafter and give its exit code."""
    return lambda *words: main(push_command(run_dir, target_folder, *words))


def push_command(run_dir: Path, target_folder: Path, *words: str) -> list[str]:
    checkpoint = f"checkpoint={run_dir / 'checkpoint' / 'best'}"
    target = f"target.name_or_path={target_folder}"
    return ["push", checkpoint, target, f"repo_id={REPO}", "license=apache-2.0", *words]


def test_a_push_is_private_and_read_back_bit_for_bit(
    hub: LocalHub, push: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push() == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/{REPO}/commit/")
    best = run_dir / "checkpoint" / "best"
    local = {name: (best / name).read_bytes() for name in ("config.json", "model.safetensors")}
    local |= {path.name: path.read_bytes() for path in (run_dir / "push").iterdir()}
    assert set(local) == {"config.json", "model.safetensors", "dflash_train.json", "README.md"}
    assert hub.files(REPO) == local
    folder = Path(snapshot_download(REPO))
    assert {name: (folder / name).read_bytes() for name in local} == local
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).repo_info(REPO)


def test_a_hub_id_works_where_a_folder_does(
    hub: LocalHub,
    push: Callable[..., int],
    run_dir: Path,
    target_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert push("revision=older") == 0
    command = ["doctor", f"checkpoint={REPO}", f"target.name_or_path={target_folder}"]
    assert main([*command, "checkpoint_revision=older"]) == 0
    assert main([*command, "checkpoint_revision=newer"]) == 2
    assert "checkpoint_revision (=newer) is no branch" in capsys.readouterr().err
    loaded = load_checkpoint(resolve_checkpoint(REPO, revision="older")).state_dict()
    for name, tensor in load_checkpoint(run_dir / "checkpoint" / "best").state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (resolve_checkpoint(REPO, revision="older") / "config.json").is_file()
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        resolve_checkpoint("somebody/else")


def test_the_published_metadata_names_the_target_and_not_its_folder(
    hub: LocalHub, push: Callable[..., int], run_dir: Path
) -> None:
    mine = read_metadata(run_dir / "checkpoint" / "best")
    assert mine is not None
    assert mine.target is not None
    assert push("base_model=somebody/tiny-target") == 0
    assert not any(PLACE.encode() in content for content in hub.files(REPO).values())
    renamed = mine.target | {"name": "somebody/tiny-target"}
    published = read_metadata(resolve_checkpoint(REPO))
    assert published == dataclasses.replace(mine, target=renamed)


def test_a_copy_of_a_drafter_is_still_bound_to_its_run(
    hub: LocalHub,
    run_dir: Path,
    target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(run_dir / "checkpoint" / "best", tmp_path / "copy")
    command = push_command(run_dir, target_folder, f"checkpoint={copy}")
    command += ["name=invented", f"runs_dir={run_dir.parent}", "--dry-run"]
    assert main(command) == 0
    assert "Steps: 1,200" in (run_dir / "push" / "README.md").read_text()
    leave_unscrubbed(run_dir)
    assert main(command) == 2
    assert "privacy.scrubbed=false" in capsys.readouterr().err


def test_a_branch_leaves_the_default_branch_alone(hub: LocalHub, push: Callable[..., int]) -> None:
    assert push("revision=trial") == 0
    assert "model.safetensors" in hub.files(REPO, "trial")
    assert hub.files(REPO, "main") == {}


def test_a_second_push_sends_nothing_and_commits_nothing(
    hub: LocalHub, push: Callable[..., int]
) -> None:
    assert push() == push() == 0
    assert len(hub.received) == 1
    assert len(hub.repositories[REPO].summaries) == 2  # the Hub's own first commit, and ours


def test_the_data_card_goes_along_only_when_asked(
    hub: LocalHub, push: Callable[..., int], run_dir: Path
) -> None:
    assert push() == 0
    assert "data_card.md" not in hub.files(REPO)
    assert push("data_card=true") == 0
    files = hub.files(REPO)
    assert files["data_card.json"] == (run_dir / "conversations" / "data_card.json").read_bytes()
    assert b"[data_card.md](data_card.md)" in files["README.md"]


def test_a_dry_run_lists_files_and_card_and_asks_nobody(
    hub: LocalHub, push: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "checkpoint" / "best" / "notes.txt").write_text("mine")
    assert push("--dry-run") == 0
    printed = capsys.readouterr().out
    assert push("dry_run=true") == 0
    assert capsys.readouterr().out == printed
    size = (run_dir / "checkpoint" / "best" / "model.safetensors").stat().st_size
    card = run_dir / "push" / "README.md"
    for words in ("private", f"{size:,}  model.safetensors", "not uploaded: notes.txt", str(card)):
        assert words in printed
    assert card.read_text().startswith("---\nlicense: apache-2.0\n")
    assert hub.repositories == {}


def leave_unscrubbed(run_dir: Path) -> None:
    write_conversations(run_dir, scrubbed=False)


def regenerate_unscrubbed(run_dir: Path) -> None:
    record = answered("train", scrubbed=False)
    write_shard(run_dir / "regenerated" / "train-00000.jsonl.gz", [record])


def lose_conversations(run_dir: Path) -> None:
    (run_dir / "conversations" / "manifest.json").unlink()


def ingest_otherwise(run_dir: Path) -> None:
    features = Manifest(stage="collect", recipe_hash="", inputs={"ingest": "sha256:other"})
    features.write(run_dir / "features")


def move_taps(run_dir: Path) -> None:
    path = run_dir / "checkpoint" / "best" / "config.json"
    content = orjson.loads(path.read_bytes())
    content["num_target_layers"] = 7
    path.write_bytes(orjson.dumps(content))


def lose_report(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "report")


def speak_another_dialect(run_dir: Path) -> None:
    path = run_dir / "checkpoint" / "best" / "config.json"
    path.write_bytes(orjson.dumps({"speculators_model_type": "dflash"}))


def train_further(run_dir: Path) -> None:
    save_checkpoint(tiny_drafter(tiny_target(), seed=1), run_dir / "checkpoint" / "best")


@pytest.mark.parametrize(
    ("spoil", "words", "sentence"),
    [
        (None, ["license="], "license (=unset) must be a licence"),
        (None, ["repo_id=nobody"], "repo_id (=nobody) must be OWNER/NAME"),
        (None, ["private=yes"], "private (=yes) must be true or false"),
        (leave_unscrubbed, [], "record 0 of conversations/train has privacy.scrubbed=false"),
        (regenerate_unscrubbed, [], "record 0 of regenerated/train has privacy.scrubbed=false"),
        (lose_conversations, [], "nothing shows that the training data was scrubbed"),
        (ingest_otherwise, [], "is not what the features of this run were made from"),
        (move_taps, [], "num_target_layers (=7) must be the target's 6"),
        (lose_report, [], "add without_report=true"),
        (speak_another_dialect, [], "is of the dialect speculators"),
        (train_further, [], "measured another drafter"),
    ],
)
def test_what_must_not_be_published_is_refused_by_name(
    hub: LocalHub, push: Callable[..., int], run_dir: Path, capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None] | None, words: list[str], sentence: str,
) -> None:  # fmt: skip
    if spoil is not None:
        spoil(run_dir)
    assert push(*words) == 2
    assert sentence in capsys.readouterr().err
    assert hub.repositories == {}


def test_a_drafter_without_a_report_goes_when_it_is_said(
    hub: LocalHub, push: Callable[..., int], run_dir: Path
) -> None:
    lose_report(run_dir)
    assert push("without_report=true") == 0
    card = hub.files(REPO)["README.md"].decode()
    assert "model-index" not in card
    assert "it was published without a report" in card


def test_nothing_becomes_public_by_itself(
    hub: LocalHub, push: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    HfApi().create_repo(REPO, private=False)
    assert push() == 2
    assert f"repo_id (={REPO}) is public" in capsys.readouterr().err
    assert hub.files(REPO) == {}
    assert hub.received == []
    assert push("private=false") == 0
    assert "model.safetensors" in hub.files(REPO)


def test_a_user_without_write_access_is_told(
    hub: LocalHub,
    push: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    assert push() == 2
    assert "token with write access" in capsys.readouterr().err


def test_what_arrives_damaged_is_noticed(hub: LocalHub) -> None:
    hub.corrupts = True
    file = HubFile(name="README.md", content=b"---\nlicense: mit\n---\n")
    with pytest.raises(UnavailableError, match=r"README\.md of commit \w+ are not what was sent"):
        upload([file], Destination(repo_id=REPO), message="a card")


def test_an_upload_whose_client_is_killed_goes_on(
    hub: LocalHub, target_folder: Path, tmp_path: Path
) -> None:
    """The file is larger than what sockets buffer, so the kill leaves the server with a part."""
    run_dir = build_run(tmp_path / "runs", intermediate_size=40_000)
    weights = run_dir / "checkpoint" / "best" / "model.safetensors"
    assert weights.stat().st_size > 20 * 2**20
    command = push_command(run_dir, target_folder)
    client = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    hub.stall_after = 2**20
    with subprocess.Popen(
        [sys.executable, "-m", "dflash_train", *command],
        env=os.environ | client | settings,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert hub.stalled.wait(timeout=60)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
    hub.go_on.set()
    assert hub.cut.wait(timeout=10)
    assert (hub.cut_uploads, hub.received, hub.files(REPO)) == (1, [], {})
    assert main(command) == 0
    sha256 = file_hash(weights).removeprefix("sha256:")
    assert hub.received == [(sha256, weights.stat().st_size)]
    assert (Path(snapshot_download(REPO)) / weights.name).read_bytes() == weights.read_bytes()
    assert hub.repositories[REPO].private


@pytest.mark.parametrize("reference", ["nowhere", "./no/where", "a/b/c", "somebody/--", "../a/b"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_asked_for(
    hub: LocalHub, reference: str
) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        resolve_checkpoint(reference)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="goes with a Hub id"):
        resolve_checkpoint(str(tmp_path), revision="main")
    with pytest.raises(ValueError, match=r"^init_revision \(=main\) goes with a Hub id, and init "):
        resolve_checkpoint(str(tmp_path), revision="main", key="init")


def test_training_starts_from_a_revision_of_a_hub_id(
    hub: LocalHub, push: Callable[..., int], run_dir: Path, target_folder: Path
) -> None:
    assert push("revision=older") == 0
    target = f"target.name_or_path={target_folder}"
    config = compose(["recipe=smollm2", target, f"init={REPO}", "init_revision=older"])
    folder = Workshop(config).initial_folder(REPO)
    weights = folder / "model.safetensors"
    assert weights.read_bytes() == (run_dir / "checkpoint/best/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"^init_revision \(=newer\) is no branch"):
        Workshop(dataclasses.replace(config, init_revision="newer")).initial_folder(REPO)


def test_pickled_weights_are_never_downloaded(hub: LocalHub) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "training_state.pt": b"pickle"}
    HfApi().create_repo(REPO)
    for name, content in files.items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)
    folder = resolve_checkpoint(REPO)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
