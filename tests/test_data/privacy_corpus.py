"""A labelled corpus: texts with one private value or one look-alike each, and the score on them.

Texts come in the shapes of real traffic: prose, JSON, code, tables, quotes, the ends of
sentences, and line breaks inside a number. A telephone number without a country or area code
stands behind a word that says what it is; on its own, nobody could tell it from an order.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dflash_data.privacy.detectors import KINDS, find_private
from tests.test_data.privacy_look_alikes import LOOK_ALIKES
from tests.test_data.privacy_plants import make_sourced_plant, seeded_fakes

SHAPES = (
    "Please use {} for this.", "{}", "It is {}.", "Is it {}?", "Yes: {}!",
    "First {}, then the rest.", "value={}, as before", '"{}"', "'{}'", "`{}`", "**{}**",
    "\u201c{}\u201d", "({})", "<{}>", "[{}]", "<note>{}</note>", "| name | {} | 12 |", "a;{};b",
    "before\n{}\nafter", "before\n\n{}", "\t{}\t", 'print("{}")', "x = '{}'  # set by hand",
    "- {}\n- other", "> {}\n> thanks", "{} \u2013 see above", "\u5024\u306f{}\u3067\u3059",
    "C'est {} \u00e0 v\u00e9rifier", "Die Angabe {} stimmt; danke",
)  # fmt: skip
PHONE_SHAPES = (
    "Call me at {}.", "My phone number is {}, thanks", "Tel. {}", "phone: {}",
    "Mobile: {}\nFax: none", '{{"phone": "{}"}}', "You can reach us under {} until five.",
    "| phone | {} |", "WhatsApp {}!", "T\u00e9l\u00e9phone : {}", "Telefon {}",
    "tel\u00e9fono: {}", "\u96fb\u8a71\u756a\u53f7\u306f{}\u3067\u3059", "contact_phone={}",
    "<tel>{}</tel>", "Text me on {}, please",
)  # fmt: skip
NUM_JSON_SHAPES = 3


@dataclass(frozen=True)
class Sample:
    """One text; characters `start` to `end` hold the private value, or the look-alike."""

    text: str
    start: int
    end: int
    kind: str
    """A kind of the detectors, or the name of a look-alike."""
    is_private: bool
    source: str = "own"
    """Whose dice made it: `own` or `faker`."""

    @property
    def value(self) -> str:
        return self.text[self.start : self.end]


@dataclass
class Score:
    """Counts by kind; a find counts as right only where its own kind was planted."""

    planted: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    exact: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    missed: list[Sample] = field(default_factory=list)
    wrong: list[tuple[Sample, str]] = field(default_factory=list)
    planted_by: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Plants by kind and source."""
    caught_by: Counter[tuple[str, str]] = field(default_factory=Counter)

    def recall(self, kind: str) -> float:
        return self.caught[kind] / max(1, self.planted[kind])

    def precision(self, kind: str) -> float:
        return self.right[kind] / max(1, self.found[kind])


def make_corpus(num_plants: int, *, seed: int) -> Iterator[Sample]:
    """Yield as many plants, over all kinds in turn, as look-alikes."""
    dice = random.Random(seed)
    fakes = seeded_fakes(seed)
    names = list(LOOK_ALIKES)
    for number in range(num_plants):
        kind = KINDS[number % len(KINDS)]
        made, source = make_sourced_plant(kind, dice, fakes)
        sample = _in_shape(kind, _broken(kind, made, dice), dice, is_private=True)
        yield replace(sample, source=source)
        name = names[number % len(names)]
        fake = fakes[dice.choice(list(fakes))]
        yield _in_shape(name, LOOK_ALIKES[name](dice, fake), dice, is_private=False)


def score(samples: Iterator[Sample]) -> Score:
    """Run the detectors over a corpus."""
    total = Score()
    for sample in samples:
        findings = find_private(sample.text)
        if sample.is_private:
            total.planted[sample.kind] += 1
            total.exact[sample.kind] += (sample.start, sample.end, sample.kind) in findings
            covered = any(f.start <= sample.start and f.end >= sample.end for f in findings)
            total.caught[sample.kind] += covered
            total.planted_by[sample.kind, sample.source] += 1
            total.caught_by[sample.kind, sample.source] += covered
            total.missed += [] if covered else [sample]
        for finding in findings:
            overlaps = finding.start < sample.end and finding.end > sample.start
            is_right = sample.is_private and overlaps and finding.kind == sample.kind
            total.found[finding.kind] += 1
            total.right[finding.kind] += is_right
            total.wrong += [] if is_right else [(sample, finding.kind)]
    return total


def _broken(kind: str, value: str, dice: random.Random) -> str:
    """Break a line inside a grouped number, now and then."""
    if kind in ("CARD", "IBAN") and " " in value and dice.random() < 0.1:
        place = dice.choice([place for place, character in enumerate(value) if character == " "])
        return f"{value[:place]}\n{value[place + 1 :]}"
    return value


def _in_shape(kind: str, value: str, dice: random.Random, *, is_private: bool) -> Sample:
    shown, offset = value, 0
    if kind == "URL_CREDENTIALS":
        scheme = dice.choice(["https", "postgres", "ftp", "redis", "mongodb+srv", "amqp"])
        shown, offset = f"{scheme}://{value}@db{dice.randint(1, 9)}.internal/x", len(scheme) + 3
    needs_word = kind == "PHONE" and not has_form(value)
    if needs_word or (kind == "PHONE" and dice.random() < 0.6):
        shape = dice.choice(PHONE_SHAPES)
    else:
        shape = dice.choice((*SHAPES, *["JSON"] * NUM_JSON_SHAPES))
    if shape == "JSON":
        text = json.dumps({"field": f"see\n{shown}"}, ensure_ascii=dice.random() < 0.5)
        written = json.dumps(value, ensure_ascii=text.isascii())[1:-1]
        start = text.index(written, text.index("see") + 5)
        return Sample(text, start, start + len(written), kind, is_private)
    before, after = shape.replace("{{", "{").replace("}}", "}").split("{}", 1)
    start = len(before) + offset
    return Sample(before + shown + after, start, start + len(value), kind, is_private)


def has_form(phone: str) -> bool:
    """Say whether a number shows a country or area code, so that it needs no word before it."""
    if phone.startswith("+"):
        return True
    is_grouped = not phone.replace("x", "").isdigit()
    is_american = phone[3:4] in ("-", ".") and len(phone) >= 12
    return is_grouped and (phone[0] == "(" or is_american or bool(re.match("00?[1-9]", phone)))
