"""Private values of every kind, from two sources: our own dice and the library `faker`.

All values are made at run time from a seed, so that no scanner takes a file for a leak.
"""

import base64
import random
import string
from collections.abc import Callable

from faker import Faker

LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "it_IT", "es_ES", "ja_JP", "pt_BR")

ALNUM = string.ascii_letters + string.digits
URL_SAFE = ALNUM + "-_"
UPPER = string.ascii_uppercase + string.digits
Dice = random.Random
Make = Callable[[Dice, Faker], str]


def text_of(dice: Dice, alphabet: str, length: int) -> str:
    return "".join(dice.choices(alphabet, k=length))


def digits(dice: Dice, form: str) -> str:
    """Fill `#` with digits and `%` with digits from 2 to 9."""
    return "".join(
        dice.choice(string.digits) if c == "#" else dice.choice("23456789") if c == "%" else c
        for c in form
    )


def luhn(number: str) -> str:
    """Give the digit that makes a number valid."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        twice = int(digit) * 2 if place % 2 == 0 else int(digit)
        total += twice // 10 + twice % 10
    return str(-total % 10)


def _own_email(dice: Dice, _: Faker) -> str:
    local = text_of(dice, string.ascii_lowercase, dice.randint(1, 9))
    local += dice.choice(["", ".", "+", "_", "-"]) + text_of(
        dice, UPPER.lower(), dice.randint(2, 6)
    )
    host = text_of(dice, string.ascii_lowercase, dice.randint(2, 12))
    return f"{local}@{host}.{dice.choice(['com', 'org', 'co.uk', 'example', 'museum', 'io', 'de'])}"


def _faker_email(dice: Dice, fake: Faker) -> str:
    makes = [fake.email, fake.ascii_email, fake.company_email, fake.free_email, fake.safe_email]
    return dice.choice(makes)()


OWN_PHONES = (
    "+1 ### ### ####", "+44 20 #### ####", "+49 30 ######", "+49 (0)89 #######",
    "+33 # ## ## ## ##", "+81-90-####-####", "+34 6## ## ## ##", "+39 0%# #######",
    "+55 11 9####-####", "+48 ### ### ###", "(%##) %##-####", "%##-%##-####", "%##.%##.####",
    "0%0 ######", "0%/#######", "0%%%-######", "00%% % ## ## ## ##", "+1%#########",
    "0%-####-####", "0% ## ## ## ##",
)  # fmt: skip


def _own_phone(dice: Dice, _: Faker) -> str:
    return digits(dice, dice.choice(OWN_PHONES))


def _own_card(dice: Dice, _: Faker) -> str:
    begin, length, groups = dice.choice(
        [
            ("4", 16, (4, 4, 4, 4)), ("5%", 16, (4, 4, 4, 4)), ("37", 15, (4, 6, 5)),
            ("6011", 16, (4, 4, 4, 4)), ("36", 14, (4, 6, 4)), ("35", 16, (4, 4, 4, 4)),
            ("2%2", 16, (4, 4, 4, 4)), ("62", 16, (4, 4, 4, 4)),
        ]
    )  # fmt: skip
    begin = "2345" if begin == "2%2" else begin.replace("%", dice.choice("12345"))
    number = begin + text_of(dice, string.digits, length - len(begin) - 1)
    number += luhn(number)
    gap = dice.choice(["", "", " ", "-"])
    return gap.join(_split(number, groups)) if gap else number


def _faker_card(dice: Dice, fake: Faker) -> str:
    number = fake.credit_card_number()
    return (
        " ".join(_split(number, (4, 4, 4, 4)))
        if len(number) == 16 and dice.random() < 0.5
        else number
    )


def _split(text: str, sizes: tuple[int, ...]) -> list[str]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [text[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _own_iban(dice: Dice, _: Faker) -> str:
    country, form = dice.choice(
        [("DE", "#" * 18), ("GB", "AAAA" + "#" * 14), ("NL", "AAAA" + "#" * 10), ("BE", "#" * 12),
         ("FR", "#" * 10 + "A" * 11 + "##"), ("NO", "#" * 11), ("MT", "AAAA" + "#" * 5 + "A" * 18)]
    )  # fmt: skip
    account = digits(dice, "".join(dice.choice(UPPER) if c == "A" else c for c in form))
    rest = "".join(str(int(character, 36)) for character in f"{account}{country}00")
    return _grouped(f"{country}{98 - int(rest) % 97:02d}{account}", dice)


def _grouped(iban: str, dice: Dice) -> str:
    if dice.random() < 0.5:
        return iban
    return " ".join(iban[place : place + 4] for place in range(0, len(iban), 4))


def _own_ssn(dice: Dice, _: Faker) -> str:
    area = dice.choice([number for number in range(1, 900) if number != 666])
    return f"{area:03d}-{dice.randint(1, 99):02d}-{dice.randint(1, 9999):04d}"


def _ipv4(dice: Dice, _: Faker) -> str:
    first = dice.choice([n for n in range(1, 255) if n != 127])
    return f"{first}.{dice.randint(0, 255)}.{dice.randint(0, 255)}.{dice.randint(0, 255)}"


def _ipv6(dice: Dice, _: Faker) -> str:
    groups = [f"{dice.randint(1, 0xFFFF):x}" for _ in range(8)]
    first = f"{dice.choice([0x2001, 0x2A02, 0xFE80, 0xFD12]):x}"
    if dice.random() < 0.5:
        kept = dice.randint(1, 5)
        return f"{first}:{':'.join(groups[:kept])}::{dice.randint(1, 0xFFFF):x}"
    return ":".join([first, *groups[1:]])


def _jwt(dice: Dice, _: Faker) -> str:
    head = f'{{"alg":"{dice.choice(["HS256", "RS256", "ES384"])}","typ":"JWT"}}'
    body = (
        f'{{"sub":"{dice.randint(1, 10**9)}","name":"{text_of(dice, ALNUM, dice.randint(3, 40))}"}}'
    )
    parts = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in (head, body)]
    return ".".join([*parts, text_of(dice, URL_SAFE, dice.choice([43, 86]))])


def _pem(dice: Dice, _: Faker) -> str:
    name = dice.choice(["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "EC PRIVATE KEY"])
    lines = [text_of(dice, ALNUM + "+/", 64) for _ in range(dice.randint(1, 5))]
    return "\n".join([f"-----BEGIN {name}-----", *lines, f"-----END {name}-----"])


def _github(dice: Dice, _: Faker) -> str:
    if dice.random() < 0.3:
        return f"github_pat_{text_of(dice, ALNUM, 22)}_{text_of(dice, ALNUM, 59)}"
    return f"gh{dice.choice('pousr')}_{text_of(dice, ALNUM, 36)}"


def _openai(dice: Dice, _: Faker) -> str:
    begin, length = dice.choice(
        [("sk-", 48), ("sk-proj-", 64), ("sk-ant-api03-", 93), ("sk-svcacct-", 74)]
    )
    return (
        begin
        + text_of(dice, ALNUM if begin == "sk-" else URL_SAFE, length - 1)
        + dice.choice(ALNUM)
    )


def _own_credentials(dice: Dice, _: Faker) -> str:
    name = text_of(dice, string.ascii_lowercase, dice.randint(2, 10))
    return (
        f"{name}:{text_of(dice, ALNUM + '.!$&*+;=~%^_-@', dice.randint(6, 20))}{dice.choice(ALNUM)}"
    )


def _faker_credentials(dice: Dice, fake: Faker) -> str:
    password = fake.password(length=dice.randint(8, 24), special_chars=False)
    return f"{fake.user_name()}:{password}"


def _random(dice: Dice, _: Faker) -> str:
    alphabet = dice.choice([ALNUM, ALNUM + "+/", URL_SAFE, string.ascii_lowercase + string.digits])
    return dice.choice(ALNUM) + text_of(dice, alphabet, dice.randint(26, 62)) + dice.choice(ALNUM)


def _faker_random(dice: Dice, fake: Faker) -> str:
    return fake.password(length=dice.randint(28, 64), special_chars=False)


MAKES: dict[str, tuple[Make, Make]] = {
    "EMAIL": (_own_email, _faker_email),
    "PHONE": (_own_phone, lambda _, fake: fake.phone_number()),
    "IPV4": (_ipv4, lambda _, fake: fake.ipv4_public()),
    "IPV6": (_ipv6, lambda _, fake: fake.ipv6()),
    "IBAN": (_own_iban, lambda dice, fake: _grouped(fake.iban(), dice)),
    "CARD": (_own_card, _faker_card),
    "SSN": (_own_ssn, lambda _, fake: fake.ssn()),
    "JWT": (_jwt, _jwt),
    "AWS_KEY": (
        lambda dice, _: dice.choice(["AKIA", "ASIA"]) + text_of(dice, UPPER, 16),
        lambda _, fake: fake.bothify("AKIA????????????????", letters=UPPER),
    ),
    "GCP_KEY": (
        lambda dice, _: "AIza" + text_of(dice, URL_SAFE, 35),
        lambda _, fake: fake.bothify("AIza" + "?" * 35, letters=URL_SAFE),
    ),
    "GITHUB_KEY": (_github, _github),
    "OPENAI_KEY": (_openai, _openai),
    "HF_KEY": (
        lambda dice, _: "hf_" + text_of(dice, ALNUM, 34),
        lambda _, fake: "hf_" + fake.password(length=34, special_chars=False),
    ),
    "PEM": (_pem, _pem),
    "URL_CREDENTIALS": (_own_credentials, _faker_credentials),
    "HIGH_ENTROPY": (_random, _faker_random),
}
"""Our own maker and faker's of each kind."""
LOCALE_OF = {"SSN": "en_US"}
"""The American form is the kind; other countries number their people in other ways."""


def make_plant(kind: str, dice: Dice, fakes: dict[str, Faker]) -> str:
    """Make a value of a kind; one in two comes from faker, in a locale of the eight."""
    return make_sourced_plant(kind, dice, fakes)[0]


def make_sourced_plant(kind: str, dice: Dice, fakes: dict[str, Faker]) -> tuple[str, str]:
    """Make a value and say where it comes from: `own`, or `faker` where that knows the kind."""
    own, fakers = MAKES[kind]
    make = dice.choice((own, fakers))
    value = make(dice, fakes[LOCALE_OF.get(kind, dice.choice(LOCALES))])
    return value, "own" if make is own else "faker"


def seeded_fakes(seed: int) -> dict[str, Faker]:
    """Give a faker per locale, each with a seed of its own."""
    fakes: dict[str, Faker] = {}
    for place, locale in enumerate(LOCALES):
        fakes[locale] = Faker(locale)
        fakes[locale].seed_instance(seed * 100 + place)
    return fakes
