"""The tenants of the sample fleet: who asks what, how often, and what slips into prompts."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from dflash_data.sample_traffic.library import Library
from dflash_data.sample_traffic.requests import KINDS, Opener

NUM_POPULAR = 12
"""Openers per tenant that many of its users send word for word."""
POPULAR_SHARE = 0.15
"""Share of sessions that begin with a popular opener."""
PRIVATE_SHARE = 0.06
"""Share of other sessions in which the user adds private data nobody asked for."""


@dataclass(frozen=True)
class Tenant:
    """One customer of the served model."""

    name: str
    system: str
    share: float
    """Share of the fleet's sessions."""
    mix: dict[str, float]
    """Weight of each kind of request."""


TENANTS = (
    Tenant(
        "sum-school",
        "You solve word problems. Show each step in plain words and end with the result.",
        0.31,
        {"arithmetic": 0.92, "digest": 0.08},
    ),
    Tenant(
        "code-tour",
        "You explain Python code to new programmers in a few clear sentences.",
        0.25,
        {"explain": 0.80, "digest": 0.14, "arithmetic": 0.06},
    ),
    Tenant(
        "back-office",
        "You turn records into JSON. Answer with one JSON object.",
        0.22,
        {"fields": 0.90, "arithmetic": 0.10},
    ),
    Tenant(
        "doc-digest",
        "You summarise technical text in one or two plain sentences.",
        0.14,
        {"digest": 0.78, "explain": 0.22},
    ),
    Tenant(
        "campus-desk",
        "You are a friendly study partner. Keep every answer short.",
        0.08,
        {"arithmetic": 0.4, "explain": 0.2, "digest": 0.2, "fields": 0.2},
    ),
)


class Desk:
    """Where one tenant's sessions begin: fresh openers and a few popular ones."""

    def __init__(self, tenant: Tenant, rng: Random, library: Library) -> None:
        self.tenant = tenant
        self._rng = rng
        self._library = library
        self._popular = [self._fresh() for _ in range(NUM_POPULAR)]

    def open(self) -> Opener:
        """Give the first message of a session; popular ones recur as 1/rank (Zipf)."""
        if self._rng.random() < POPULAR_SHARE:
            weights = [1 / rank for rank in range(1, NUM_POPULAR + 1)]
            return self._rng.choices(self._popular, weights)[0]
        opener = self._fresh()
        if self._rng.random() < PRIVATE_SHARE:
            aside = self._rng.choice(ASIDES)(self._rng)
            return Opener(opener.kind, f"{opener.text}\n\n{aside}", opener.follow_ups)
        return opener

    def _fresh(self) -> Opener:
        kind = self._rng.choices(list(self.tenant.mix), list(self.tenant.mix.values()))[0]
        return KINDS[kind](self._rng, self._library)


def _random_text(rng: Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def _email(rng: Random) -> str:
    name = _random_text(rng, string.ascii_lowercase, 6)
    return f"Send the answer to {name}{rng.randint(1, 99)}@example.org, please."


def _phone(rng: Random) -> str:
    return f"If it is unclear, call me: +1 202-555-{rng.randint(100, 199):04d}."


def _address(rng: Random) -> str:
    network = rng.choice(("192.0.2", "198.51.100", "203.0.113"))
    return f"(Sent from {network}.{rng.randint(1, 254)}.)"


def _service_key(rng: Random) -> str:
    letters = string.ascii_letters + string.digits
    prefix, length = rng.choice((("sk-proj-", 40), ("ghp_", 36), ("hf_", 34)))
    return f"My key is {prefix}{_random_text(rng, letters, length)}, in case you need it."


def _cloud_key(rng: Random) -> str:
    key = _random_text(rng, string.ascii_uppercase + string.digits, 16)
    return f"The script runs with AKIA{key}."


ASIDES: tuple[Callable[[Random], str], ...] = (_email, _phone, _address, _service_key, _cloud_key)
"""Invented data from ranges reserved for documentation; keys are random."""
