"""Text that a log holds as token ids: the scrubber must see all of it, or the ids must go.

Serving engines may log ids beside no text. Ids are text to whoever has the tokenizer, and a
scrubber of texts is blind to them. So before scrubbing, the ids of such a record are decoded into
its messages; whatever is found there takes the ids with it, as in any record.

Ids say nothing of which tokenizer they belong to. Decoded with another one they give a garbled
text, which is as readable as the ids to whoever has the right one. So the target's must prove to be
theirs: the decoded answer is the logged one, or ends with it. Where the answer is not logged, the
record must be on-policy: then the recipe says that the target wrote it. All others are dropped.

The prompt becomes one raw user message, control tokens included: the ids rule, not the text.

Ids beside a text may say more than it does: servers take reasoning out of an answer and leave it in
the ids, and a template prints what stands in no message. So ids stay only if a use of them is left,
the target's tokenizer shows that they are its own, and nothing private is found in their text.
"""

from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from dflash_data.drops import DropReason
from dflash_data.privacy.detectors import find_private
from dflash_train.records.conversation import Conversation, Turn

FORMATS_WITH_IDS = frozenset(("sglang", "vllm_log", "openai", "openai_batch"))
"""Formats whose lines may hold ids, in place of text or beside it."""
CONTEXT_IDS = 8
"""Prompt ids decoded before an answer, for tokenizers that drop a space at a text's start."""
PROVING_CHARACTERS = 16
"""Length from which the end of an answer proves whose tokenizer its ids are."""
CUT_CHARACTER = "\ufffd"
"""What stands for a character whose last bytes were cut off."""


class IdsFate(Enum):
    """What became of the token ids of a record that came with some."""

    kept = "kept"
    redacted = "redacted"
    """The text held something private."""
    off_policy = "off_policy"
    """The target answers again, so nothing reads them."""
    undecoded = "undecoded"
    """The target's tokenizer is not at hand, so nobody could look into them."""
    foreign = "foreign"
    """They do not hold the answer with the target's tokenizer."""
    stripped = "stripped"
    """They hold more of the answer than the log shows, such as its reasoning."""
    hidden_text = "hidden_text"
    """Something private stands in them and not in the text."""


def has_ids(record: Conversation) -> bool:
    """Say whether a record has token ids of its prompt or its answer."""
    return record.prompt_token_ids is not None or record.output_token_ids is not None


def hides_text(record: Conversation) -> bool:
    """Say whether a record has token ids of a prompt or an answer whose text it has not."""
    if not has_ids(record):
        return False
    answer = record.answer
    return answer is None or not _says_anything([answer]) or not _says_anything(record.prompt)


class TextOfIds:
    """Decodes ids with the target's tokenizer; made anew in each process from its file."""

    def __init__(self, path: Path | None) -> None:
        """Load nothing yet.

        Args:
            path: The target's `tokenizer.json`; None where it is not at hand.
        """
        self._path = path

    def reveal(self, record: Conversation) -> DropReason | None:
        """Put the text of a record's ids where its messages have none.

        Returns:
            None, or why the record must go: `content_missing` without a tokenizer or without a
            proof that it is the right one, `ids_mismatch` where it is not.
        """
        prompt, output = record.prompt_token_ids, record.output_token_ids
        answer = record.answer
        if self._path is None or not prompt or not output or answer is None:
            return DropReason.content_missing
        if not self._known.issuperset(prompt) or not self._known.issuperset(output):
            return DropReason.ids_mismatch
        if _says_anything([answer]):
            stop = record.sampling.get("stop")
            is_theirs = self._spells(answer, prompt, output, stop)
            if not is_theirs and not self._ends_with(answer, prompt, output):
                return DropReason.ids_mismatch
        elif record.on_policy:
            answer.content = self._decode(output, skips_special=True)
        else:
            return DropReason.content_missing
        if not _says_anything(record.prompt):
            text = self._decode(prompt, skips_special=False)
            record.messages = [Turn(role="user", content=text), answer]
        return DropReason.empty_output if not _says_anything([answer]) else None

    def vet(self, record: Conversation) -> IdsFate:
        """Take the ids off a scrubbed record that came with some, unless they may be written.

        Where ids show that the target did not write the answer, or not to this prompt, or not only
        this, the record turns off-policy: the target answers again.
        """
        fate = self._fate(record)
        if fate is not IdsFate.kept:
            record.prompt_token_ids = record.output_token_ids = None
        if fate in _NOT_AS_LOGGED and record.on_policy:
            record.on_policy, record.on_policy_reason = False, _NOT_AS_LOGGED[fate]
        return fate

    def _fate(self, record: Conversation) -> IdsFate:
        prompt, output, answer = record.prompt_token_ids, record.output_token_ids, record.answer
        if not prompt or not output or answer is None:
            return IdsFate.redacted
        if not record.on_policy and not record.has_rendered_prompt:
            return IdsFate.off_policy
        if self._path is None:
            return IdsFate.undecoded
        is_known = self._known.issuperset(prompt) and self._known.issuperset(output)
        if not is_known or not self._holds(answer, prompt, output):
            return IdsFate.foreign
        is_all_content = not (answer.reasoning or answer.tool_calls)
        stop = record.sampling.get("stop")
        if is_all_content and not self._spells(answer, prompt, output, stop):
            return IdsFate.stripped
        texts = [self._decode(ids, skips_special=False) for ids in (prompt, output)]
        unseen = [text for text in texts if text != record.messages[0].content]
        return IdsFate.hidden_text if any(map(find_private, unseen)) else IdsFate.kept

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._path))

    @cached_property
    def _known(self) -> frozenset[int]:
        """Ids that stand for a text; `decode` passes over all others without a word."""
        return frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _spells(self, answer: Turn, prompt: list[int], output: list[int], stop: object) -> bool:
        """Say whether the output is the logged answer, up to a stop token or stop string."""
        logged = (answer.content or "").rstrip(CUT_CHARACTER)
        stops = [each for each in (stop if isinstance(stop, list) else [stop]) if each]
        ends = tuple(logged + each for each in stops if isinstance(each, str))
        # A stop string may end within a token.
        return bool(logged) and any(
            text == logged or text.startswith(ends) for text in self._outputs(prompt, output)
        )

    def _ends_with(self, answer: Turn, prompt: list[int], output: list[int]) -> bool:
        """Say whether the output ends with a logged answer too long to stand there by chance."""
        logged = (answer.content or "").rstrip(CUT_CHARACTER).strip()
        return len(logged) >= PROVING_CHARACTERS and any(
            text.rstrip().endswith(logged) for text in self._outputs(prompt, output)
        )

    def _holds(self, answer: Turn, prompt: list[int], output: list[int]) -> bool:
        """Say whether the output holds all parts of the logged answer."""
        names = [call["name"] for call in answer.tool_calls or ()]
        logged = (answer.content or "").rstrip(CUT_CHARACTER)
        parts = [part.strip() for part in (logged, answer.reasoning or "", *names) if part]
        texts = self._outputs(prompt, output)
        return bool(parts) and any(all(part in text for part in parts) for text in texts)

    def _outputs(self, prompt: list[int], output: list[int]) -> Iterator[str]:
        """Decode an output in each way that servers do."""
        context = prompt[-CONTEXT_IDS:]
        for ids in (output, output[:-1]):
            for skips in (True, False):
                yield self._decode(ids, skips_special=skips)
                before = self._decode(context, skips_special=skips)
                both = self._decode([*context, *ids], skips_special=skips)
                if both.startswith(before):
                    yield both.removeprefix(before)

    def _decode(self, ids: list[int], *, skips_special: bool) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=skips_special)
        return text.rstrip(CUT_CHARACTER)


_NOT_AS_LOGGED = {
    IdsFate.foreign: "other_model",
    IdsFate.stripped: "other_thinking",
    IdsFate.hidden_text: "edited",
}
"""Why an answer is not the target's as logged, by what its ids have shown."""


def _says_anything(turns: list[Turn]) -> bool:
    return any(turn.content or turn.reasoning or turn.tool_calls for turn in turns)
