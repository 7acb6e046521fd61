"""Which server gets the next request: the least busy of those that work."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

from dflash_train.config import UnavailableError

SET_ASIDE_AFTER = 3
"""Failures in a row after which a server gets no more requests, if another one still does."""


@dataclass
class Endpoint:
    """One server and how it has been doing."""

    url: str
    num_open: int = 0
    """Requests in flight."""
    num_failures: int = 0
    """In a row."""
    last_problem: str = ""
    """Empty since it last answered."""
    is_set_aside: bool = False


class Roster:
    """All servers of a run."""

    def __init__(self, urls: Iterable[str]) -> None:
        """Trust all of them at first."""
        self.endpoints = [Endpoint(url.rstrip("/")) for url in urls]
        self.num_answers = 0
        """Replies of good form so far."""

    def least_busy(self) -> Endpoint:
        """Give the server for the next request."""
        working = [endpoint for endpoint in self.endpoints if not endpoint.is_set_aside]
        return min(working, key=lambda endpoint: endpoint.num_open)

    def note_success(self, endpoint: Endpoint) -> None:
        """Forget a server's failures."""
        endpoint.num_failures, endpoint.last_problem = 0, ""

    def note_failure(self, endpoint: Endpoint, problem: str) -> None:
        """Count a failure; the one too many sets the server aside if another one works."""
        endpoint.num_failures += 1
        endpoint.last_problem = problem
        others_work = any(e is not endpoint and not e.is_set_aside for e in self.endpoints)
        if endpoint.num_failures >= SET_ASIDE_AFTER and others_work and self.num_answers:
            self.set_aside(endpoint)

    def set_aside(self, endpoint: Endpoint) -> None:
        """Give a server no more requests, and say so."""
        if not endpoint.is_set_aside:
            endpoint.is_set_aside = True
            tqdm.write(
                f"warning: {endpoint.url} is set aside ({endpoint.last_problem}); the other "
                "servers of data.endpoints.urls go on",
                file=sys.stderr,
            )

    def none_left(self) -> UnavailableError:
        """Give the error for the case that no server answers any more."""
        problems = "; ".join(
            f"{endpoint.url}: {endpoint.last_problem or 'busy'}" for endpoint in self.endpoints
        )
        return UnavailableError(
            f"no server of data.endpoints.urls answers any more ({problems}). What they have "
            "answered is kept: bring one up and run the same command again."
        )
