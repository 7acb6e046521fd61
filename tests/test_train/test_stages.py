from pathlib import Path

from dflash_train.config import compose, to_plain
from dflash_train.stages.inputs import log_inputs
from dflash_train.stages.table import BLEND, SAMPLE_TRAFFIC, STAGES, TUNE
from dflash_train.stages.workshop import Workshop


def call(question: str) -> str:
    return f'{{"messages": [{{"role": "user", "content": "{question}"}}]}}\n'


def test_a_changed_log_is_seen_although_another_folder_has_its_name(tmp_path: Path):
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "requests.jsonl").write_text(call(folder))
    workshop = Workshop(compose([f"data.logs={tmp_path}"]))
    before = log_inputs(workshop)
    for folder in ("monday", "tuesday"):
        path = tmp_path / folder / "requests.jsonl"
        content = path.read_text()
        path.write_text(call("another"))
        assert log_inputs(workshop) != before
        path.write_text(content)
    assert log_inputs(workshop) == before


def test_every_key_of_a_recipe_belongs_to_a_stage_or_is_known_to_change_no_result():
    harmless = {
        "name", "runs_dir",  # where a run lies
        "checkpoint", "checkpoint_revision",  # its weights are an input of evaluate, by hash
        "init", "init_revision",  # its weights are an input of train, by hash
        "tracking",  # where curves go
        "data.logs", "data.hmac_key_file",  # inputs of ingest, by content
        "executor",  # where ingest runs
        "data.endpoints",  # where answers come from; what of it decides them, stages name
        "data.collect_engine",  # an input of collect, by name
        "data.vllm_python", "data.vllm_settings",  # where that engine is, how fast it runs
        "serve",  # how the endpoint runs; no stage reads it
        "evaluate.datasets_dir",  # where evaluation sets are, each at its pinned revision
        "evaluate.concurrency", "evaluate.cost_tables",  # inputs of report, by content
        "target.shapes",  # what a plan takes where the target is out of reach
        "plan.gpu", "plan.num_gpus", "plan.sharding", "plan.row_tokens",  # what a plan is for
        "data.features", "data.online",  # inputs of collect, and by it of train
        "drift",  # how served acceptance is watched; no stage reads it
        "tune.registry",  # its drafters are inputs, by hash
        "tune.replay_from", "tune.replay_share",  # inputs of train, by content
        "tune.lr_factor", "tune.patience",  # become optim.lr and training.patience
    }  # fmt: skip
    known = harmless.union(*(stage.settings for stage in (SAMPLE_TRAFFIC, *STAGES, BLEND, TUNE)))
    recipe = to_plain(compose(["recipe=smollm2"]))
    keys = {
        f"{group}.{key}" if isinstance(value, dict) else group
        for group, value in recipe.items()
        for key in (value if isinstance(value, dict) else {group})
    }
    forgotten = {key for key in keys if not {key, key.split(".")[0]} & known}
    assert not forgotten
