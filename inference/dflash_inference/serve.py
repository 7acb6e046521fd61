"""The endpoint on a port, for trying a drafter and for recording traffic; not for production.

One process, one decoder, no keys and no limits per client: it listens on this machine alone unless
a host is given. SIGINT and SIGTERM end running requests with the finish reason `cancelled`, after
which the log is complete. If the decoder itself fails, all clients are told, and the process ends
with a traceback and exit code 1: a supervisor may start it again, this process would not.
"""

import ipaddress
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from dflash_inference.decoder import SpeculativeDecoder
from dflash_inference.endpoint.app import Endpoint
from dflash_inference.endpoint.request_log import RequestLog
from dflash_inference.endpoint.requests import ServingDefaults
from dflash_inference.engine import Engine
from dflash_inference.scheduler import Scheduler
from dflash_train.config import RecipeConfig, ServeConfig, UnavailableError, require

NEUTRAL_PENALTIES = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
"""Penalties, and the values that change nothing: the decoder knows no others."""
FAREWELL_S = 10
"""Seconds that clients have to read their last words at shutdown."""


class Server(uvicorn.Server):
    """A server whose first signal ends the requests and whose second ends the process.

    It ends with its engine, too.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        """Take the engine that a signal stops."""
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End all requests, then stop; unlike uvicorn's own, a wanted end is no failure."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._engine.stop()

    async def on_tick(self, counter: int) -> bool:
        """Say, ten times a second, whether to end."""
        return await super().on_tick(counter) or not self._engine.is_running


def serve(decoder: SpeculativeDecoder, config: RecipeConfig) -> None:
    """Serve until a signal comes.

    Raises:
        ValueError: The recipe's sampling or limits cannot be served.
        UnavailableError: The port is taken, or the log cannot be written.
        RuntimeError: The decoder has failed; its cause is the error.
    """
    defaults = serving_defaults(decoder, config)
    listening = _listen(config.serve)
    log = _open_log(config.serve)
    engine = Engine(
        Scheduler(
            decoder,
            token_budget=config.serve.token_budget,
            most_requests=config.serve.most_requests,
        )
    )
    endpoint = Endpoint(engine, target=decoder.target, defaults=defaults, log=log)
    settings = uvicorn.Config(
        endpoint.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=FAREWELL_S,
    )
    for line in startup_lines(config.serve, model=defaults.model, port=listening.getsockname()[1]):
        print(f"dflash-train serve: {line}", file=sys.stderr, flush=True)
    try:
        Server(settings, engine).run(sockets=[listening])
    finally:
        engine.close()
        if log is not None:
            log.close()
    if engine.failure is not None:
        raise RuntimeError(
            "The decoder has failed, which is an error in this program; all running requests were "
            "ended. Please report the lines above, and start the server again."
        ) from engine.failure


def serving_defaults(decoder: SpeculativeDecoder, config: RecipeConfig) -> ServingDefaults:
    """Give what requests may leave open: the recipe's sampling, the target's own limits.

    Raises:
        ValueError: The recipe samples with penalties, which the decoder does not know.
    """
    target, sampling = decoder.target, config.data.serving_sampling
    for name, neutral in NEUTRAL_PENALTIES.items():
        value = getattr(sampling, name)
        require(
            value == neutral,
            f"data.serving_sampling.{name} (={value}) is not supported by this decoder. Set it to "
            f"{neutral}, or serve with vLLM.",
        )
    return ServingDefaults(
        model=config.serve.model_name or model_name(target.name),
        sampling=sampling,
        max_new_tokens=config.serve.max_new_tokens,
        max_positions=target.model.config.get_text_config().max_position_embeddings,
        stop_token_ids=target.stop_token_ids,
    )


def model_name(target_name: str) -> str:
    """Give the name that clients ask for: a hub id, or what a folder or a wheel is called."""
    if target_name.startswith("wheel:"):
        return target_name.removeprefix("wheel:").partition("==")[0]
    return Path(target_name).resolve().name if Path(target_name).is_dir() else target_name


def startup_lines(config: ServeConfig, *, model: str, port: int) -> list[str]:
    """Give what a person should know: where it listens, what it is for, what it writes down."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    logged = f"requests are logged to {config.log}" if config.log else "requests are not logged"
    lines = [
        f"{model} on http://{host}:{port}/v1, for trying and recording, not for production; "
        f"{logged}"
    ]
    if not _is_loopback(config.host):
        lines.append(
            f"serve.host (={config.host}) lets other machines in, and nobody is asked for a key"
        )
    return lines


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=128)
    except OSError as error:
        raise UnavailableError(
            f"serve.host (={config.host}) and serve.port (={config.port}) cannot be listened on: "
            f"{error.strerror}. Set serve.port to another number; 0 takes a free one."
        ) from error


def _open_log(config: ServeConfig) -> RequestLog | None:
    if config.log is None:
        return None
    try:
        return RequestLog(Path(config.log))
    except OSError as error:
        raise UnavailableError(
            f"serve.log (={config.log}) cannot be written: {error.strerror}. Give another file."
        ) from error
