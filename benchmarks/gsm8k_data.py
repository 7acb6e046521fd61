"""The data of protocol gsm8k-1280: questions and answers to features that every training shares.

Two run folders under `$DFLASH_HOME/protocols/gsm8k-1280` hold it, filled by the ordinary stages:

- `answers`: records of all rows; `regenerate` has the target answer those that came without an
  answer. It reads no tap that a drafter needs, so it is done once, whatever is trained.
- `features-<hash>`: the same rows, all answered; `collect` runs them through the target once. The
  hash is of the taps and of `data`, so each choice of taps has a folder of its own.

A training links to the second and brings nothing but its drafter. The rules: docs/protocols/.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dflash_data.token_answers import (
    TokenAnswer,
    answered_record,
    check_on_policy,
    open_record,
    read_questions,
    read_token_answers,
    write_conversations,
)
from dflash_train.config import DrafterSettings, RecipeConfig, require, to_plain
from dflash_train.features.target import Target
from dflash_train.features.target_folder import dflash_home
from dflash_train.records.conversation import Conversation, read_split
from dflash_train.records.manifest import Manifest, content_hash, file_hash
from dflash_train.records.provenance import code_version, command_line, package_versions
from dflash_train.stages.table import stage_named
from dflash_train.stages.walk import run_stage
from dflash_train.stages.workshop import Workshop

QUESTION_FILES = ("gsm8k/train.jsonl", "gsm8k/test.jsonl")
TRAIN_ANSWERS = "gsm8k_smollm2/train-1280.jsonl"
TEST_ANSWERS = "gsm8k_smollm2/test-64.jsonl"
SHARED_STAGES = ("ingest", "regenerate", "collect")
ROWS_CHECKED = 4
"""Stored answers that run through the target to see that it wrote them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many rows the protocol uses, always the first ones of their file."""

    name: str
    train: int
    """Training questions; the `validation` questions behind them choose the best checkpoint."""
    validation: int
    test: int
    """Test questions, all measured."""
    test_file: str = "test"
    """File of the test questions: `train` or `test`."""
    test_first: int = 0
    """Line of the first test question, from 0."""
    stored_test: int
    """The first of them, whose answers may come stored; the target writes the others."""
    train_replayed: int
    """Training rows replayed for the generalisation gap."""
    live: int
    """Test questions decoded live."""


PROTOCOL = Sizes(
    name="gsm8k-1280",
    train=1280,
    validation=64,
    test=256,
    stored_test=64,
    train_replayed=64,
    live=16,
)
SMOKE = Sizes(
    name="gsm8k-smoke",
    train=8,
    validation=2,
    test=6,
    stored_test=4,
    train_replayed=4,
    live=2,
)


def ablation_of(sizes: Sizes) -> Sizes:
    """Give as many questions as the test has from behind the validation questions of train.jsonl.

    Settings are compared on them, so that the test chooses nothing.
    """
    return Sizes(
        name=f"{sizes.name}-ablation",
        train=0,
        validation=0,
        test=sizes.test,
        test_file="train",
        test_first=sizes.train + sizes.validation,
        stored_test=0,
        train_replayed=0,
        live=0,
    )


def row_id(file: str, index: int) -> str:
    """Name the row of a question: `gsm8k-train-0007` is line 7 of train.jsonl, from 0."""
    return f"gsm8k-{file}-{index:04d}"


def input_hashes(gsm8k: Path) -> dict[str, str]:
    """Give the hash of every input file by name; the folder of stored answers may be absent.

    Raises:
        ValueError: A file of questions is missing.
    """
    for name in QUESTION_FILES:
        require(
            (gsm8k / name).is_file(),
            f"--gsm8k (={gsm8k}) must hold {' and '.join(QUESTION_FILES)}, the files of "
            "https://github.com/openai/grade-school-math. Give the folder above gsm8k/.",
        )
    names = (*QUESTION_FILES, TRAIN_ANSWERS, TEST_ANSWERS)
    return {name: file_hash(gsm8k / name) for name in names if (gsm8k / name).is_file()}


def prepare(config: RecipeConfig, gsm8k: Path | None, sizes: Sizes) -> Path:
    """Bring records, answers and features up to date; finished parts are not done again.

    Args:
        config: The recipe; its target, taps and `data` decide.
        gsm8k: Folder of questions and stored answers; None takes what an earlier call prepared.
        sizes: The protocol's rows.

    Returns:
        The run folder that holds the features.

    Raises:
        ValueError: Nothing is prepared and no folder is given, or a file does not fit.
    """
    features = _features_run(config, sizes)
    if gsm8k is None:
        require(
            Manifest.read(features.run_dir / stage_named("collect").folder) is not None,
            f"--gsm8k must be set: {features.run_dir} holds no features for this target and these "
            "taps yet. Give the folder with gsm8k/train.jsonl and gsm8k/test.jsonl.",
        )
        return features.run_dir
    answers = _answers_run(config, sizes)
    _answer(answers, gsm8k, sizes)
    _collect(features, answers)
    return features.run_dir


def link_data(run_dir: Path, data_dir: Path) -> None:
    """Let a training's run folder share the finished stages of a data folder.

    Raises:
        ValueError: The run folder has data of its own.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (stage_named(stage).folder for stage in SHARED_STAGES):
        link = run_dir / name
        require(
            link.is_symlink() or not link.exists(),
            f"name (={run_dir.name}): {link} is the data of another run. Choose another name.",
        )
        link.unlink(missing_ok=True)
        link.symlink_to((data_dir / name).resolve(), target_is_directory=True)


def protocol_records(
    gsm8k: Path, sizes: Sizes, target: Target, *, budget: int
) -> list[Conversation]:
    """Give the record of every row; those without a stored answer are open.

    Args:
        gsm8k: Folder of questions and stored answers.
        sizes: The protocol's rows.
        target: Who wrote the stored answers, which is checked.
        budget: Most tokens of an answer.
    """
    num_learned = sizes.train + sizes.validation
    test_lines = range(sizes.test_first, sizes.test_first + sizes.test)
    needed = {"train": num_learned, "test": 0}
    needed[sizes.test_file] = max(needed[sizes.test_file], test_lines.stop)
    questions = {
        file: _questions(gsm8k / f"gsm8k/{file}.jsonl", number) for file, number in needed.items()
    }
    stored = {
        "train": _stored(gsm8k / TRAIN_ANSWERS, sizes.train),
        "test": _stored(gsm8k / TEST_ANSWERS, sizes.stored_test),
    }
    rows = [("train", index, "train") for index in range(sizes.train)]
    rows += [("train", index, "validation") for index in range(sizes.train, num_learned)]
    rows += [(sizes.test_file, index, "test") for index in test_lines]
    records: list[Conversation] = []
    for file, index, split in rows:
        question, name = questions[file][index], row_id(file, index)
        record = open_record(question, record_id=name, source="gsm8k", split=split)
        if index in stored[file]:
            answer = stored[file][index]
            record = answered_record(record, answer, target=target, max_new_tokens=budget)
        records.append(record)
    answered = [record for record in records if record.answer is not None]
    if answered:
        check_on_policy(answered[:ROWS_CHECKED], target)
    return records


def _features_run(config: RecipeConfig, sizes: Sizes) -> RecipeConfig:
    """Give the recipe whose run folder holds the features of this target and these taps."""
    drafter = config.drafter
    decisive = [
        to_plain(config.target), drafter.num_taps, drafter.target_layer_ids, to_plain(config.data)
    ]  # fmt: skip
    digest = content_hash(decisive).removeprefix("sha256:")[:8]
    return replace(config, runs_dir=str(_home(sizes)), name=f"features-{digest}")


def _answers_run(config: RecipeConfig, sizes: Sizes) -> RecipeConfig:
    """Give the recipe that has the target answer: one tap, which is thrown away."""
    one_tap = DrafterSettings(
        mask_token_id=config.drafter.mask_token_id, num_taps=1, target_layer_ids=[0]
    )
    data = replace(config.data, teacher_top_k=0)
    return replace(config, runs_dir=str(_home(sizes)), name="answers", drafter=one_tap, data=data)


def _home(sizes: Sizes) -> Path:
    return dflash_home() / "protocols" / sizes.name


def _answer(config: RecipeConfig, gsm8k: Path, sizes: Sizes) -> None:
    """Write the records of all rows and let `regenerate` answer the open ones."""
    workshop = Workshop(config)
    budget = config.data.max_new_tokens
    manifest = _manifest(config, input_hashes(gsm8k), [asdict(sizes), budget])
    _write(config, manifest, lambda: protocol_records(gsm8k, sizes, workshop.target, budget=budget))
    run_stage(workshop, "regenerate")


def _collect(config: RecipeConfig, answers: RecipeConfig) -> None:
    """Copy the records, all answered by now, and let `collect` read the target's features."""
    workshop = Workshop(config)
    folders = [answers.run_dir / stage_named(stage).folder for stage in ("ingest", "regenerate")]
    manifests = [Manifest.read(folder) for folder in folders]
    inputs = {each.stage: each.hash for each in manifests if each is not None}
    _write(config, _manifest(config, inputs, []), lambda: _answered(*folders))
    run_stage(workshop, "regenerate")  # nothing is open, but `collect` asks for its manifest
    run_stage(workshop, "collect")


def _answered(asked: Path, regenerated: Path) -> list[Conversation]:
    """Give all rows in order, the target's new answers in the place of open records."""
    records: list[Conversation] = []
    for split in ("train", "validation", "test"):
        new = {record.id: record for record in read_split(regenerated, split)}
        records += [new.get(record.id, record) for record in read_split(asked, split)]
    return records


def _manifest(config: RecipeConfig, inputs: dict[str, str], settings: list[object]) -> Manifest:
    return Manifest(
        stage="token-answers",
        recipe_hash=content_hash([to_plain(config.target), settings]),
        inputs=inputs,
        command=command_line(),
        code=dict(code_version()),
        versions=package_versions(),
    )


def _write(
    config: RecipeConfig, manifest: Manifest, build: Callable[[], list[Conversation]]
) -> None:
    """Write the records of a run folder, unless they are there with the same key."""
    folder = config.run_dir / stage_named("ingest").folder
    done = Manifest.read(folder)
    if done is None or done.key != manifest.key or not done.has_outputs(folder):
        write_conversations(folder, build(), manifest)


def _questions(path: Path, number: int) -> list[str]:
    questions = read_questions(path)
    require(
        len(questions) >= number,
        f"{path} has {len(questions)} questions, and the protocol needs {number}. Take the whole "
        "file.",
    )
    return questions


def _stored(path: Path, number: int) -> dict[int, TokenAnswer]:
    """Read the stored answers to the first `number` questions; none if there is no such file."""
    if not path.is_file():
        return {}
    return {index: each for index, each in read_token_answers(path).items() if index < number}
