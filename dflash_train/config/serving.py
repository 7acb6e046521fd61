"""How a drafter is tried out: `serve` on a port, `generate` in a terminal."""

from dataclasses import dataclass

from dflash_train.config.checks import require


@dataclass(kw_only=True)
class ServeConfig:
    """The endpoint of `serve`, and the decoder that `generate` shares with it.

    Sampling settings that a request leaves out are those of `data.serving_sampling`.
    """

    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine alone, 0.0.0.0 lets all others in, without
    a key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    model_name: str | None = None
    """Name that clients ask for; None takes the target's."""
    log: str | None = None
    """File that gets a JSON line for each served call, with texts and token ids, as `ingest` reads
    it; None logs nothing."""
    token_budget: int = 16_384
    """Cache rows that running requests may hold together: prompt and generation budget of each, in
    tokens. What does not fit waits."""
    most_requests: int = 16
    """Requests that are decoded at once, at most."""
    max_new_tokens: int = 512
    """Budget of a request that names none, in tokens."""
    fast: bool = True
    """On a CPU, pack weights and compile layers: much faster after some seconds at the start, needs
    a C++ compiler, and rounds sums in another order, so a near-tie may turn."""
    adaptive: bool = True
    """Let each step draft, copy from the text before, or do neither, whichever promises most tokens
    per second here; the first start measures this machine for some seconds. The text stays the
    target's own. Where drafts are sampled (DFlash 2, DSpark), what a seed gives then depends on the
    requests before it: false verifies every draft, and a seed always gives the same."""

    def __post_init__(self) -> None:
        require(
            bool(self.host),
            "serve.host (=) must be an address. Set it to 127.0.0.1 for this machine alone.",
        )
        require(
            0 <= self.port <= 65_535,
            f"serve.port (={self.port}) must lie in 0..65535. Set it to 8000.",
        )
        for name in ("token_budget", "most_requests", "max_new_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"serve.{name} (={value}) must be at least 1.")
        require(
            self.max_new_tokens < self.token_budget,
            f"serve.max_new_tokens (={self.max_new_tokens}) must be below serve.token_budget "
            f"(={self.token_budget}), which holds the prompt too. Lower it to 512.",
        )
