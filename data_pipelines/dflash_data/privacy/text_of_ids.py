"""Text that a log holds as token ids only: the scrubber must see it, or it must go.

Serving engines may log ids beside no text. Ids are text to whoever has the tokenizer, and a
scrubber of texts is blind to them. So before scrubbing, the ids of such a record are decoded into
its messages; whatever is found there takes the ids with it, as in any record.

Ids say nothing of which tokenizer they belong to. Decoded with another one they give a garbled
text, which is as readable as the ids to whoever has the right one. So the target's must prove to be
theirs: the decoded answer is the logged one. Where the answer is not logged either, the record must
be on-policy: then the recipe says that the target wrote it. All others are dropped.

The prompt becomes one raw user message, control tokens included: the ids rule, not the text.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from dflash_data.drops import DropReason
from dflash_train.records.conversation import Conversation, Turn

FORMATS_WITH_IDS = frozenset(("sglang", "vllm_log"))
"""Formats whose lines may hold ids in place of text."""
CONTEXT_IDS = 8
"""Prompt ids decoded before an answer, for tokenizers that drop a space at a text's start."""
CUT_CHARACTER = "\ufffd"
"""What stands for a character whose last bytes were cut off."""


def hides_text(record: Conversation) -> bool:
    """Say whether a record has token ids of a prompt or an answer whose text it has not."""
    if record.prompt_token_ids is None and record.output_token_ids is None:
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
            if not self._spells(answer, prompt, output, record.sampling.get("stop")):
                return DropReason.ids_mismatch
        elif record.on_policy:
            answer.content = self._decode(output, skips_special=True)
        else:
            return DropReason.content_missing
        if not _says_anything(record.prompt):
            text = self._decode(prompt, skips_special=False)
            record.messages = [Turn(role="user", content=text), answer]
        return DropReason.empty_output if not _says_anything([answer]) else None

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
        ends = ["", *(each for each in stops if isinstance(each, str))]
        return bool(logged) and any(
            text in [logged + end for end in ends] for text in self._outputs(prompt, output)
        )

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


def _says_anything(turns: list[Turn]) -> bool:
    return any(turn.content or turn.reasoning or turn.tool_calls for turn in turns)
