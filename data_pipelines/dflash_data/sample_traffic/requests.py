"""What the sample fleet asks: four kinds of request, each with follow-ups that make sense.

Templates share style across the fleet, not text: names, things, amounts, functions and
paragraphs vary, so a held-out request is new in content and familiar in form. Everything
is short, because a small target on two cores must answer all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from dflash_data.sample_traffic.library import Library

NAMES = (
    "Ada Amir Anouk Arjun Bea Bruno Carla Chen Dana Diego Elif Emeka Farah Felix Greta Hanna "
    "Hugo Imani Ines Ivan Jonas Jun Kaya Kofi Lena Lior Maja Marta Mateo Mira Nadia Nils Noor "
    "Omar Paula Priya Quentin Rosa Ravi Sana Selma Tariq Tessa Tomas Uma Vera Viktor Wanda Yara Zoe"
).split()
SURNAMES = (
    "Adeyemi Bauer Castillo Dubois Eriksen Fontana Garcia Haddad Ito Jansen Kowalski Lindqvist "
    "Moreau Novak Okafor Petrov Quinn Rossi Santos Tanaka Ueda Varga Weber Xu Yilmaz Zeman"
).split()
THINGS = (
    "apples batteries bolts books bottles bricks buttons candles chairs coins cookies cups eggs "
    "flowers folders jars keys lamps lemons magnets marbles mugs notebooks nails onions pencils "
    "plates posters ribbons seeds shells shirts spoons stamps stickers tickets tiles toys tulips"
).split()
PLACES = "bakery farm school library market museum studio workshop garden factory shop club".split()
CITIES = (
    "Aarhus Bergen Bologna Cork Delft Eugene Fukuoka Ghent Graz Halifax Izmir Jaipur Kumasi Leeds "
    "Lyon Malaga Nagoya Oaxaca Porto Quito Riga Tartu Utrecht Valencia Wroclaw York Zagreb"
).split()
PRODUCTS = (
    "desk lamp, office chair, label printer, phone case, water filter, bike light, hand drill, "
    "coffee grinder, travel mug, keyboard, rain jacket, tent, wall clock, yoga mat, tool box, "
    "garden hose, reading stand, paper shredder, soldering iron, camping stove"
).split(", ")


@dataclass(frozen=True)
class Opener:
    """The first user message of a session and what the user may ask next."""

    kind: str
    text: str
    follow_ups: tuple[str, ...]


RequestKind = Callable[[Random, Library], Opener]


def arithmetic(rng: Random, library: Library) -> Opener:
    """Ask a word problem with whole numbers."""
    name, other = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    few, some, many = rng.randint(2, 12), rng.randint(13, 60), rng.randint(61, 400)
    text = rng.choice(PROBLEMS).format(
        name=name, other=other, thing=thing, place=place, few=few, some=some, many=many
    )
    return Opener(
        "arithmetic",
        text,
        (
            f"And if {name} starts with {few + rng.randint(1, 9)} more {thing}?",
            f"And if every number were doubled, what would {name} get?",
            f"Now suppose {other} gives away {few} {thing}. What changes?",
            "Check the result in another way.",
            "Write only the equation and the result.",
            f"How would you explain this to {other}, who is eight years old?",
        ),
    )


PROBLEMS = (
    "{name} has {some} {thing} and buys {few} boxes of {many}. How many {thing} are there now?",
    "A {place} sells {some} {thing} on Monday and {many} on Tuesday. How many is that in total?",
    "{name} shares {many} {thing} equally among {few} friends. How many does each get?",
    "There are {few} shelves with {some} {thing} each. {other} takes {few} away. How many remain?",
    "{name} saves {few} dollars a day. After how many days are {many} dollars saved?",
    "One of the {thing} costs {few} dollars. {name} pays with {many} dollars for {some} of them. "
    "Is that enough, and what is the difference?",
    "A {place} packs {many} {thing} into bags of {few}. How many full bags are there?",
    "{name} walks {few} kilometers in {some} minutes. How long do {many} kilometers take?",
    "{other} is {some} years old, {few} years older than {name}. How old is {name}?",
    "A {place} had {many} {thing}. It lost {some} and found {few}. How many does it have?",
    "{name} reads {some} pages a day for {few} days, of {many} pages. How many are left?",
    "In one {place}, {few} of every {some} {thing} are red. How many of {many} are red?",
    "{name} and {other} have {many} {thing} together. {name} has {few} more. How many has each?",
    "The floor of a {place} is {some} meters long and {few} meters wide. What is its area?",
    "A {place} raises the price of {thing} from {some} to {many} dollars. What percentage is that?",
    "A tank holds {many} liters and loses {few} liters an hour. What is left after {few} hours?",
)


def explain(rng: Random, library: Library) -> Opener:
    """Ask what a function of the standard library does; its source is in the prompt."""
    function = rng.choice(library.functions)
    question = rng.choice(CODE_QUESTIONS).format(name=function.name, module=function.module)
    about_parameters = [f"What is the parameter {name} for?" for name in function.parameters[:2]]
    return Opener(
        "explain",
        f"{question}\n\n```python\n{function.source}\n```",
        (
            *about_parameters,
            "What does it return?",
            "Say it in one sentence.",
            f"Show a short example that calls {function.name}.",
            "When would it raise an error?",
            "Write a docstring for it.",
        ),
    )


CODE_QUESTIONS = (
    "What does the function {name} from the Python module {module} do?",
    "Explain this code from {module} to a beginner.",
    "Walk me through {name} of the module {module}, line by line.",
    "I found {name} in the standard library ({module}). What is it for?",
    "Explain {name} in two or three sentences.",
    "What are the inputs and the result of {name}?",
)


def fields(rng: Random, library: Library) -> Opener:
    """Ask for some fields of a record as JSON."""
    title, record = rng.choice(RECORDS)(rng)
    asked = rng.sample(list(record), rng.randint(2, 4))
    others = [key for key in record if key not in asked]
    layout = rng.choice(LAYOUTS)
    request = rng.choice(FIELD_REQUESTS).format(title=title, keys=", ".join(asked))
    return Opener(
        "fields",
        f"{request}\n\n{layout(record)}",
        (
            f"Add the field {rng.choice(others)}.",
            f"Now only {asked[0]}.",
            "Give the same as a bullet list.",
            "Use upper-case keys.",
            f"Rename {asked[-1]} to value.",
        ),
    )


FIELD_REQUESTS = (
    "Extract {keys} from this {title} as JSON.",
    "Return a JSON object with the keys {keys} for the {title} below.",
    "From the {title}, give me {keys} as JSON.",
    "Turn this {title} into JSON. Keep only {keys}.",
    "JSON please: {keys}.",
)


def _order(rng: Random) -> tuple[str, dict[str, str]]:
    record = {
        "order_id": f"ORD-{rng.randint(2019, 2026)}-{rng.randint(1, 99999):05d}",
        "customer": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
        "item": rng.choice(PRODUCTS),
        "quantity": str(rng.randint(1, 24)),
        "total": f"{rng.randint(5, 900)}.{rng.randint(0, 99):02d}",
        "city": rng.choice(CITIES),
    }
    return "order", record


def _employee(rng: Random) -> tuple[str, dict[str, str]]:
    name, surname = rng.choice(NAMES), rng.choice(SURNAMES)
    record = {
        "name": f"{name} {surname}",
        "department": rng.choice(("sales", "support", "finance", "logistics", "research")),
        "office": rng.choice(CITIES),
        "since": str(rng.randint(2001, 2026)),
        "email": f"{name}.{surname}@example.{rng.choice(('com', 'org', 'net'))}".lower(),
        "extension": str(rng.randint(100, 999)),
    }
    return "employee record", record


def _delivery(rng: Random) -> tuple[str, dict[str, str]]:
    record = {
        "parcel": f"P{rng.randint(10, 99)}-{rng.randint(100, 999)}",
        "from": rng.choice(CITIES),
        "to": rng.choice(CITIES),
        "weight_kg": f"{rng.randint(1, 40)}.{rng.randint(0, 9)}",
        "status": rng.choice(("in transit", "delivered", "returned", "at customs", "lost")),
        "driver": rng.choice(NAMES),
    }
    return "delivery note", record


def _device(rng: Random) -> tuple[str, dict[str, str]]:
    record = {
        "device": rng.choice(("router", "camera", "sensor", "printer", "thermostat", "scanner")),
        "firmware": f"{rng.randint(1, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 50)}",
        "room": f"{rng.choice('ABCDE')}{rng.randint(1, 40)}",
        "temperature": f"{rng.randint(12, 48)} C",
        "battery": f"{rng.randint(3, 100)} %",
        "last_seen": f"2026-{rng.randint(1, 9):02d}-{rng.randint(1, 28):02d}",
    }
    return "device report", record


def _loan(rng: Random) -> tuple[str, dict[str, str]]:
    record = {
        "reader": f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
        "title": f"The {rng.choice(CITIES)} {rng.choice(PLACES).title()}",
        "due": f"2026-{rng.randint(10, 12)}-{rng.randint(1, 28):02d}",
        "branch": rng.choice(CITIES),
        "renewals": str(rng.randint(0, 3)),
        "fine": f"{rng.randint(0, 9)}.{rng.randint(0, 9)}0",
    }
    return "library loan", record


RECORDS = (_order, _employee, _delivery, _device, _loan)
LAYOUTS: tuple[Callable[[dict[str, str]], str], ...] = (
    lambda record: "\n".join(f"{key}: {value}" for key, value in record.items()),
    lambda record: " | ".join(f"{key}={value}" for key, value in record.items()),
    lambda record: ",".join(record) + "\n" + ",".join(record.values()),
    lambda record: "; ".join(f"the {key} is {value}" for key, value in record.items()) + ".",
)


def digest(rng: Random, library: Library) -> Opener:
    """Ask for a summary of a paragraph of the standard documentation."""
    paragraph = rng.choice(library.paragraphs)
    question = rng.choice(DIGEST_REQUESTS).format(about=paragraph.about)
    return Opener(
        "digest",
        f"{question}\n\n{paragraph.text}",
        (
            "Now as one sentence.",
            "Explain it to a beginner.",
            "Which words are technical terms?",
            "What should a user remember?",
            f"What is {paragraph.module} used for, then?",
        ),
    )


DIGEST_REQUESTS = (
    "Summarise this paragraph of the Python documentation of {about}.",
    "What does the documentation of {about} say here?",
    "Summarise in your own words:",
    "Give the main point of this text about {about}.",
    "Shorten this paragraph to half its length.",
)

KINDS: dict[str, RequestKind] = {
    "arithmetic": arithmetic,
    "explain": explain,
    "fields": fields,
    "digest": digest,
}
