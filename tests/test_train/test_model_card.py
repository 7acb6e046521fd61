import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import orjson
import pytest
from huggingface_hub import ModelCard, ModelCardData

from dflash_train.drafter.config import DrafterConfig
from dflash_train.drafter.metadata import CheckpointMetadata
from dflash_train.features.target import Target
from dflash_train.records.manifest import file_hash
from dflash_train.release.evaluation_results import evaluation_of, read_evaluation
from dflash_train.release.hub import card_with_header
from dflash_train.release.model_card import CardFacts, card_header, card_text
from dflash_train.release.run_record import RunRecord, read_record, told_command
from dflash_train.release.serve_commands import ServeCommand, ServedModel, serve_commands
from dflash_train.testing import tiny_drafter
from tests.test_train.finished_run import PLACE, build_run

SLIDING, FULL = "sliding_attention", "full_attention"
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 5}
MODEL = ServedModel(target="some/target", target_revision=None, drafter="some/drafter")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def facts(run_dir: Path, target32: Target) -> CardFacts:
    weights_hash = file_hash(run_dir / "checkpoint" / "best" / "model.safetensors")
    hardware = {"processor": "Some processor", "cores": 8, "accelerator": "Some GPU"}
    metadata = CheckpointMetadata(thinking=False, provenance={"hardware": hardware})
    return CardFacts(
        repo_id="somebody/tiny-drafter",
        license_id="apache-2.0",
        base_model="somebody/tiny-target",
        config=tiny_drafter(target32).config,
        num_parameters=12_400_000,
        dtype="bfloat16",
        metadata=metadata,
        record=read_record(run_dir, metadata, weights_hash=weights_hash),
        evaluation=read_evaluation(run_dir / "report" / "report.json", weights_hash=weights_hash),
        weights_hash=weights_hash,
        has_data_card=False,
    )


def by_engine(config: DrafterConfig, model: ServedModel = MODEL) -> dict[str, ServeCommand]:
    return {each.engine: each for each in serve_commands(config, model)}


def speculation(entry: ServeCommand) -> dict[str, Any]:
    """Give what vLLM would read from its command."""
    words = shlex.split(entry.command or "")
    return orjson.loads(words[words.index("--speculative-config") + 1])


def test_each_engine_is_told_the_block_in_its_own_count(target32: Target) -> None:
    served = by_engine(tiny_drafter(target32, block_size=8).config)
    assert speculation(served["vLLM"]) == {
        "method": "dflash",
        "num_speculative_tokens": 7,
        "model": "some/drafter",
    }
    assert "--speculative-num-draft-tokens 8" in (served["SGLang"].command or "")
    assert "--spec-draft-n-max 7 " in (served["llama.cpp"].command or "")
    assert "--draft some/drafter" in (served["Transformers"].command or "")


def test_dspark_drafts_from_its_first_slot(target32: Target) -> None:
    served = by_engine(tiny_drafter(target32, block_size=8, markov_rank=4).config)
    assert speculation(served["vLLM"])["num_speculative_tokens"] == 8
    assert speculation(served["vLLM"])["method"] == "dspark"


@pytest.mark.parametrize(
    ("variant", "engines", "reason"),
    [
        ({}, "vLLM SGLang llama.cpp Transformers", ""),
        ({"layer_types": [SLIDING, FULL], "sliding_window": 6}, "vLLM SGLang Transformers", "mask"),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 3, "is_causal": False},
         "vLLM Transformers", "mask"),
        (DFLASH2, "vLLM Transformers", "DFlash 2"),
        ({"markov_rank": 4}, "vLLM", "DSpark"),
        ({"draft_vocab_size": 100}, "", "reduced vocabulary"),
    ],
)  # fmt: skip
def test_an_engine_that_would_serve_it_otherwise_gets_a_reason_and_no_command(
    target32: Target, variant: dict[str, Any], engines: str, reason: str
) -> None:
    served = by_engine(tiny_drafter(target32, **variant).config)
    assert [name for name, entry in served.items() if entry.command] == engines.split()
    assert all(reason in entry.remark for entry in served.values() if entry.command is None)


def test_a_factor_on_embeddings_is_not_served_where_it_is_not_read(target32: Target) -> None:
    config = dataclasses.replace(tiny_drafter(target32).config, input_embedding_scale=5.0)
    served = by_engine(config)
    assert [name for name, each in served.items() if each.command] == ["llama.cpp", "Transformers"]
    assert "factor 5" in served["vLLM"].remark


def test_a_commit_of_the_named_target_is_pinned(facts: CardFacts) -> None:
    commit = "0123456789" * 4
    target = {"name": "somebody/tiny-target", "revision": commit, "dtype": "bfloat16"}
    card = card_text(dataclasses.replace(facts, record=RunRecord(target=target)))
    assert f"vllm serve somebody/tiny-target --revision {commit}" in card
    assert f"--revision {commit}" not in card_text(facts)


def test_the_hub_reads_licence_target_and_results_from_the_header(
    facts: CardFacts, run_dir: Path
) -> None:
    card = ModelCard(card_with_header(card_header(facts), card_text(facts)).decode())
    report = orjson.loads((run_dir / "report" / "report.json").read_bytes())
    assert isinstance(card.data, ModelCardData)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "somebody/tiny-target")
    results = card.data.eval_results
    assert results is not None
    assert [each.dataset_type for each in results] == ["traffic", "humaneval"]
    length = report["acceptance_length"]
    assert results[0].metric_value == pytest.approx(length["pooled"], abs=1e-4)
    assert results[0].metric_args is not None
    assert results[0].metric_args["interval_95"] == pytest.approx(length["interval"], abs=1e-4)


def test_the_tables_show_the_report(facts: CardFacts, run_dir: Path) -> None:
    card = card_text(facts)
    report = orjson.loads((run_dir / "report" / "report.json").read_bytes())
    for measured in (report, report["eval_sets"]["humaneval"]):
        length = measured["acceptance_length"]
        low, high = length["interval"]
        shown = f"| **{length['pooled']:.2f}** ({low:.2f} to {high:.2f}) |"
        assert f"| {length['num_requests']} | {length['num_steps']:,} {shown}" in card
    shares = " | ".join(f"{share:.0%}" for share in report["positions"]["joint"])
    assert f"| kept with all before it | {shares} |" in card


def test_every_table_row_has_as_many_cells_as_its_head(facts: CardFacts) -> None:
    card = card_text(facts)
    tables = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({line.rstrip().count("|") for line in table.splitlines()}) == 1, table
    assert "None" not in card
    assert "\n\n\n" not in card


def test_the_card_tells_how_it_was_trained_and_keeps_places_and_customers_to_itself(
    facts: CardFacts, run_dir: Path
) -> None:
    card = card_text(facts)
    for words in (
        "`dflash-train run recipe=smollm2 training.minutes=3`", "Steps: 1,200",
        "about 0.1 hours", "Some GPU (Some processor, 8 cores)", "640 logged calls read, 588 kept",
        "| train | 420 | 147,000 | 25,200 |", "simulated fleet", "commit `0000", "without thinking",
        "`tiny-target`, revision `folder-1`, float32", facts.weights_hash,
    ):  # fmt: skip
        assert words in card, words
    report = orjson.loads((run_dir / "report" / "report.json").read_bytes())
    secrets = ["private-bucket", PLACE, str(run_dir), *report["labels"]]
    secrets += [each["id"] for each in report["live_check"]["requests"]]
    assert [secret for secret in secrets if secret in card and secret != "humaneval"] == []


def test_a_drafter_of_unknown_origin_says_so(facts: CardFacts) -> None:
    bare = dataclasses.replace(
        facts,
        base_model=None,
        metadata=None,
        record=read_record(None, None, weights_hash=facts.weights_hash),
        evaluation=None,
    )
    card = card_text(bare)
    assert "Not recorded: another program trained it." in card
    assert "vllm serve TARGET" in card
    assert "None" not in card
    assert "base_model" not in card_with_header(card_header(bare), card).decode()


def test_a_run_does_not_claim_the_training_of_weights_that_it_only_measured(
    run_dir: Path,
) -> None:
    record = read_record(run_dir, None, weights_hash="sha256:of others")
    assert record == RunRecord(target=None, is_simulated=True)


def test_a_repeated_command_names_no_place() -> None:
    command = "dflash-train run recipe=qwen3 data.logs=gs://b runs_dir=/x drafter.block_size=8 "
    told = told_command(command + "evaluate.datasets_dir=/y evaluate.seed=3 name=acme")
    assert told == "dflash-train run recipe=qwen3 drafter.block_size=8 evaluate.seed=3"


def test_a_set_without_a_verify_step_has_no_row(run_dir: Path) -> None:
    report = orjson.loads((run_dir / "report" / "report.json").read_bytes())
    report["eval_sets"]["humaneval"] |= {"acceptance_length": None, "prompt_lookup": None}
    assert [row.key for row in evaluation_of(report).rows] == ["traffic"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b'{"format": "other"}', r"must be dflash-train/report, version 1"),
    ],
)
def test_a_report_of_another_kind_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_evaluation(tmp_path / "report.json", weights_hash="sha256:0")
