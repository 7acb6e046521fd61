"""What looks private and is not, from our own dice and from `faker`'s words.

Luhn's sum fits one number in ten, so a "wrong" card is made wrong on purpose: a number whose
sum fits is a card, whoever calls it an order.
"""

import base64
import string
import uuid
from collections.abc import Callable

from faker import Faker

from tests.test_data.privacy_plants import ALNUM, Dice, digits, luhn, text_of

Make = Callable[[Dice, Faker], str]
HEX = "0123456789abcdef"


def _words(dice: Dice, fake: Faker, least: int = 1, most: int = 4) -> list[str]:
    makes = [fake.word, fake.last_name, fake.first_name, fake.city]
    found: list[str] = []
    while len(found) < dice.randint(least, most):
        word = "".join(c for c in dice.choice(makes)().lower() if c in string.ascii_lowercase)
        found += [word] if word else [dice.choice(["index", "value", "request", "layer", "cache"])]
    return found


def _version(dice: Dice, _: Faker) -> str:
    parts = [str(dice.randint(0, 40)) for _ in range(dice.choice([3, 3, 4]))]
    number = ".".join(parts)
    if len(parts) == 3:
        return dice.choice(["v", "", "torch ", "=="]) + number
    return dice.choice(["version ", "Version: ", "firmware ", "v", "Chrome/", "pkg=="]) + number


def _camel(dice: Dice, fake: Faker) -> str:
    words = _words(dice, fake, 3, 7)
    name = words[0] + "".join(word.capitalize() for word in words[1:])
    return name + dice.choice(["", "", str(dice.randint(1, 99)), "V2", "HTTPError"])


def _snake(dice: Dice, fake: Faker) -> str:
    return dice.choice("_-").join([*_words(dice, fake, 3, 8), str(dice.randint(0, 2030))])


def _path(dice: Dice, fake: Faker) -> str:
    folders = "/".join(_words(dice, fake, 3, 7))
    return (
        f"/{folders}/v{dice.randint(1, 9)}/{_camel(dice, fake)}.{dice.choice(['py', 'ts', 'log'])}"
    )


def _scope(dice: Dice, fake: Faker) -> str:
    return "::".join(
        [*_words(dice, fake, 1, 3), dice.choice(["add", "dead", "Face", "vector<int>"])]
    )


ORDERS = (
    "ORD-2026-#####", "order 41##-22##-9###", "PO#######", "invoice #########",
    "article 0%##-####-##", "ticket #%######", "item no. 0%%-#######",
)  # fmt: skip


def _order(dice: Dice, _: Faker) -> str:
    return digits(dice, dice.choice(ORDERS))


def _wrong_card(dice: Dice, _: Faker) -> str:
    number = "4" + text_of(dice, string.digits, 14)
    number += str((int(luhn(number)) + dice.randint(1, 9)) % 10)
    if dice.random() < 0.5:
        return number
    return " ".join(number[place : place + 4] for place in range(0, 16, 4))


def _wrong_iban(dice: Dice, _: Faker) -> str:
    account = text_of(dice, string.digits, 18)
    right = 98 - int(account + "131400") % 97
    return f"DE{right % 97 + 1 if right < 97 else 2:02d}{account}"


TIMES = (
    "12:%#:##", "2026-1#-1#", "2026-1#-1#T08:%#:##Z", "1#.0%.2026", "0%/1#/2026",
    "2026-1#-1# 12:3#:##.######", "17########", "1%/Oct/2026:13:4#:## +0200",
    "Wed, 1# Oct 2026 08:4#:## GMT",
)  # fmt: skip


def _time(dice: Dice, _: Faker) -> str:
    return digits(dice, dice.choice(TIMES))


def _price(dice: Dice, _: Faker) -> str:
    form = dice.choice(
        ["$#,###.##", "# ### ###,## EUR", "%.###.###,##", "1##.## dollars", "%##### %###"]
    )
    return digits(dice, form)


PLACES = (
    "{:.6f}, {:.6f}", "+{:.4f}, {:.4f}", "({:.5f};{:.5f})", "lat={:.7f} lon={:.7f}",
)  # fmt: skip


def _place(dice: Dice, _: Faker) -> str:
    return dice.choice(PLACES).format(dice.uniform(-90, 90), dice.uniform(-180, 180))


def _mac(dice: Dice, _: Faker) -> str:
    groups = [text_of(dice, HEX, 2) for _ in range(dice.choice([3, 6, 6, 8, 20]))]
    return ":".join(groups) if dice.random() < 0.7 else "-".join(groups)


def _image(dice: Dice, _: Faker) -> str:
    begin = dice.choice([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"])
    content = base64.b64encode(begin + dice.randbytes(dice.randint(60, 400))).decode()
    return f"data:image/png;base64,{content}" if dice.random() < 0.7 else content


AT_SIGNS = (
    "@{0}", "{0}@{1}", "{0} @ {1}", "@{0}/{1}", "{0}@4.17.21", "git@github.com:{0}/{1}.git",
    "{0}@2x.png", "@{0}.{1}(x)", "https://{0}.example/@{1}",
)  # fmt: skip


def _not_an_address(dice: Dice, fake: Faker) -> str:
    words = _words(dice, fake, 2, 2)
    return dice.choice(AT_SIGNS).format(*words)


def _slice(dice: Dice, _: Faker) -> str:
    return digits(
        dice, dice.choice(["x[::%]", "x[1##:%##]", "x[%:%#:%]", "a[%###::%]", "[:, ::%]"])
    )


SUMS = (
    "%## + %# * %# = %###", "%### %### %###", "20%% 20%% 20%%", "%,###,### coins", "(%%) %###",
    "%##/%##", "%##-%## items", "3 +45678##",
)  # fmt: skip


def _sum(dice: Dice, _: Faker) -> str:
    forms = SUMS
    return digits(dice, dice.choice(forms))


def _isbn(dice: Dice, _: Faker) -> str:
    return dice.choice(["ISBN ", "isbn: "]) + digits(
        dice, dice.choice(["978-3-16-14####-#", "97800######21", "0-306-4061#-#", "03064061##"])
    )


LOOK_ALIKES: dict[str, Make] = {
    "version": _version,
    "hash": lambda dice, _: text_of(dice, HEX, dice.choice([32, 40, 64])),
    "short git sha": lambda dice, _: "commit " + text_of(dice, HEX, dice.choice([7, 10, 12])),
    "uuid": lambda dice, _: str(uuid.UUID(bytes=dice.randbytes(16), version=4)),
    "order id": _order,
    "time": _time,
    "price": _price,
    "coordinates": _place,
    "isbn": _isbn,
    "hardware address": _mac,
    "wrong card": _wrong_card,
    "wrong iban": _wrong_iban,
    "wrong ssn": lambda dice, _: digits(
        dice, dice.choice(["000-%#-####", "666-%#-####", "9##-00-####"])
    ),
    "image": _image,
    "camel case": _camel,
    "snake case": _snake,
    "file path": _path,
    "c++ scope": _scope,
    "at sign": _not_an_address,
    "slice": _slice,
    "arithmetic": _sum,
    "style class": lambda dice, fake: "sk-" + "-".join(_words(dice, fake, 4, 6)),
    "tool call id": lambda dice, _: f"req-{uuid.UUID(bytes=dice.randbytes(16), version=4)}",
    "etag": lambda dice, _: f'W/"{text_of(dice, ALNUM, 12)}"',
}
