"""A chat in a terminal that shows which tokens came as accepted drafts.

Accepted drafts are coloured by who proposed them, the drafter or a copy of earlier text; the
target's own (the first token and each bonus token) are not. Colours follow the terminal: none where
stdout is none, or NO_COLOR is set.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.incremental_text import IncrementalText
from dflash_inference.request import RequestState
from dflash_inference.sampling import SamplingParams
from dflash_train.config import ServingSampling, require
from dflash_train.records.chat_template import render_request
from dflash_train.records.conversation import Conversation, Turn

ACCEPTED_STYLES = {"drafter": "green", "lookup": "cyan"}
FIGURES_STYLE = "dim"
COMMANDS = {"/exit": "leave", "/clear": "forget the conversation"}
PROMPT_SIGN = "> "
_CONTROLS = {code: "\u2423" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a model writes must not steer the terminal."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A bit of an answer as it is shown."""

    text: str
    source: str | None
    """Who drafted the token that completed it: `drafter`, `lookup`, or None: the target's own."""


@dataclass(kw_only=True)
class Chat:
    """A conversation with the target, turn by turn."""

    decoder: SpeculativeDecoder
    sampling: ServingSampling
    max_new_tokens: int
    seed: int = 0
    turns: list[Turn] = field(default_factory=list)
    last: RequestState | None = None
    """The request of the newest answer."""

    def clear(self) -> None:
        """Forget everything that was said."""
        self.turns.clear()

    def answer(self, question: str) -> Generator[Piece]:
        """Put a question and yield the answer while it is written.

        An answer that is not read to its end, as after Ctrl-C, stays in the conversation as far as
        it came.

        Raises:
            ValueError: The conversation has grown longer than the target's positions.
        """
        self.turns.append(Turn(role="user", content=question))
        tokenizer = self.decoder.target.tokenizer
        text = IncrementalText(tokenizer)
        self.last = self.decoder.new_request(self._prompt_ids(), self._params)
        try:
            yield from self._pieces(self.last, text)
        finally:
            self.turns.append(Turn(role="assistant", content=text.text))

    @property
    def _params(self) -> SamplingParams:
        sampling = self.sampling
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if sampling.is_greedy else sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=self.seed + len(self.turns),
        )

    def _prompt_ids(self) -> list[int]:
        moment = datetime.now(UTC).isoformat()
        record = Conversation(id="", source="generate", messages=self.turns, ts=moment)
        target = self.decoder.target
        ids = render_request(target.tokenizer, record, serving=self.sampling)
        most = target.model.config.get_text_config().max_position_embeddings
        if len(ids) + self.max_new_tokens > most:
            self.turns.pop()
            require(
                False,
                f"The conversation (={len(ids)} tokens) and serve.max_new_tokens "
                f"(={self.max_new_tokens}) exceed the {most} positions of the target. Type /clear, "
                "or lower serve.max_new_tokens.",
            )
        return ids

    def _pieces(self, request: RequestState, text: IncrementalText) -> Iterator[Piece]:
        """Decode step by step; each token's text is shown for itself."""
        while request.finish_reason is None:
            num_before, num_steps = len(request.token_ids), len(request.steps)
            self.decoder.step([request])
            new_ids = request.token_ids[num_before:]
            sources = [
                step.source for step in request.steps[num_steps:] for _ in range(step.num_accepted)
            ]
            for place, token in enumerate(new_ids):
                source = sources[place] if place < len(sources) else None
                yield Piece(text=text.push([token]), source=source)
        yield Piece(text=text.finish(), source=None)


def figures(request: RequestState) -> str:
    """Say in one line what an answer took; speed without the prefill and its token."""
    num_tokens, steps = len(request.output_ids), request.steps
    told = [f"{num_tokens} tokens"]
    if steps:
        length = sum(step.acceptance_length for step in steps) / len(steps)
        seconds = sum(step.draft_s + step.verify_s + step.bookkeeping_s for step in steps)
        told.append(f"acceptance length {length:.2f}")
        told.append(f"{(num_tokens - 1) / seconds:.1f} tokens/s")
    told.append(f"prefill {request.prefill_s:.2f} s")
    if request.finish_reason == "length":
        told.append("cut off at serve.max_new_tokens")
    return f"[{', '.join(told)}]"


def greet(console: Console) -> None:
    """Say what colours and commands mean."""
    legend = Text.assemble(
        "Accepted drafts: ", ("from the drafter", ACCEPTED_STYLES["drafter"]), ", ",
        ("copied from the text before", ACCEPTED_STYLES["lookup"]), "; all else is the target's.\n",
        " ".join(f"{name}: {what}." for name, what in COMMANDS.items()),
    )  # fmt: skip
    console.print(legend, soft_wrap=True)
    console.print()


def show_answer(chat: Chat, question: str, console: Console) -> None:
    """Stream one answer, then its figures; Ctrl-C ends the answer and no more.

    Raises:
        ValueError: The conversation has grown too long.
    """
    pieces = chat.answer(question)
    try:
        for piece in pieces:
            style = "" if piece.source is None else ACCEPTED_STYLES[piece.source]
            shown = Text(piece.text.translate(_CONTROLS), style=style)
            console.print(shown, end="", soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()
    console.print()
    assert chat.last is not None
    console.print(Text(figures(chat.last), style=FIGURES_STYLE), soft_wrap=True)


def converse(chat: Chat, questions: Iterable[str], console: Console) -> None:
    """Answer questions until they end or `/exit`; a question that cannot be put says why."""
    for question in questions:
        command = question.strip()
        if not command:
            continue
        if command == "/exit":
            return
        if command == "/clear":
            chat.clear()
        elif not command.startswith("/"):
            try:
                show_answer(chat, question, console)
            except ValueError as error:
                console.print(Text(str(error)), soft_wrap=True)
            console.print()
        else:
            known = ", ".join(f"{name} ({what})" for name, what in COMMANDS.items())
            console.print(Text(f"{command} is not a command. Known: {known}."), soft_wrap=True)


def typed_questions() -> Iterator[str]:
    """Yield what a person types, line by line; Ctrl-D and Ctrl-C end it."""
    while True:
        try:
            yield input(PROMPT_SIGN)
        except (EOFError, KeyboardInterrupt):
            print()
            return
