"""What becomes of logs: sources, privacy, splits, answers, features."""

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import Enum
from urllib.parse import urlsplit

from dflash_train.config.checks import require


class FeaturesDtype(Enum):
    """Number formats of stored target features."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float8_e4m3fn = "float8_e4m3fn"
    """8 bits, with one float32 scale per token and tap layer."""


class EndpointApi(Enum):
    """Which of the OpenAI-compatible interfaces answers prompts."""

    completions = "completions"
    chat = "chat"


class Regenerate(Enum):
    """What becomes of a logged answer that the target did not write under the serving sampling."""

    auto = "auto"
    """The target answers the prompt again."""
    never = "never"
    """The call is dropped as `off_policy`."""


class CollectEngine(Enum):
    """What runs the target in `collect`."""

    transformers = "transformers"
    """This process, or all processes of an `accelerate launch`."""
    vllm = "vllm"
    """One vLLM under a Python of its own, `data.vllm_python`."""


class FeaturesFrom(Enum):
    """Where training takes the target's features from."""

    stored = "stored"
    """The disk, where `regenerate` and `collect` leave them."""
    online = "online"
    """The target, which reads rows again each time they are trained on; stages leave token ids."""


@dataclass(kw_only=True)
class OnlineSettings:
    """How the target runs beside the drafter where `data.features` is online.

    None of it changes what is trained on, rounding on another device apart.
    """

    device: str | None = None
    """Device of the target, such as cuda:4; of several processes on a machine, process r takes the
    r-th device from there. None puts it beside its drafter."""
    prefetch: int | None = None
    """Micro-batches that a thread makes ahead while the drafter learns; 0 makes each when it is
    due. None: 2 on a GPU or with vLLM, 0 on a CPU, where both want the same cores."""
    kept_bytes: int = 2 * 2**30
    """Main memory of each process for features of validation and test rows, in bytes; rows beyond
    it are read again each time."""

    def __post_init__(self) -> None:
        require(
            self.device is None or re.fullmatch(r"cpu|cuda:\d+", self.device) is not None,
            f"data.online.device (={self.device}) must be cuda:NUMBER or cpu. Set it to cuda:1, or "
            "to null for the drafter's own.",
        )
        for name in ("prefetch", "kept_bytes"):
            value = getattr(self, name)
            require(
                value is None or value >= 0,
                f"data.online.{name} (={value}) must not be negative. Set it to 0 for none.",
            )


@dataclass(kw_only=True)
class VllmSettings:
    """Arguments of `vllm.LLM` that decide speed and memory, and features only within rounding.

    None leaves vLLM's own value.
    """

    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that vLLM takes for weights and cache."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step; longer prompts are read in several."""
    max_num_seqs: int | None = None
    """Rows of one step."""
    tensor_parallel_size: int | None = None
    """GPUs that share each layer."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        require(
            share is None or 0 < share <= 1,
            f"data.vllm_settings.gpu_memory_utilization (={share}) must be above 0 and at most 1. "
            "Set it to 0.9.",
        )
        for name in ("max_num_batched_tokens", "max_num_seqs", "tensor_parallel_size"):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"data.vllm_settings.{name} (={value}) must be at least 1. Leave it out.",
            )


@dataclass(kw_only=True)
class ServingSampling:
    """How the target is sampled in production: what logged answers are compared with.

    Engines read some values as off: top_k 0 or -1, top_p 1, min_p 0, penalties 0, and 1 for the
    repetition penalty. Temperature 0, or top_k 1, is greedy whatever the other cuts say.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Probability mass that is sampled from; 1 is all of it."""
    top_k: int = 0
    """Tokens that are sampled from; 0 is all of them."""
    min_p: float = 0.0
    """Least probability, relative to the likeliest token's; 0 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer already holds."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the answer already holds the token."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or answer hold; 1 changes nothing."""
    enable_thinking: bool | None = None
    """Whether a target with this switch thinks before it answers; None: it has no such switch."""
    reasoning_effort: str | None = None
    """How long a target with such levels thinks, for example medium; None: it has none."""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, is_in_range in ranges.items():
            require(
                is_in_range,
                f"data.serving_sampling.{name} (={getattr(self, name)}) is out of range. Set it to "
                f"what the server uses, {ServingSampling.__dataclass_fields__[name].default} by "
                "default.",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def thinks(self) -> bool:
        """Whether reasoning stands before each answer."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        return self.reasoning_effort not in (None, "none")


@dataclass(kw_only=True)
class SampleTrafficConfig:
    """The simulated fleet that stands in for logs when `data.logs` is not set."""

    requests: int = 600
    """Usable requests; the dirt of real logs comes on top."""
    seed: int = 0
    """Seed of the fleet: the same seed gives the same log on one machine."""

    def __post_init__(self) -> None:
        require(
            self.requests >= 1,
            f"data.sample.requests (={self.requests}) must be at least 1. Set it to 600.",
        )


@dataclass(kw_only=True)
class EndpointsConfig:
    """Servers of the target with OpenAI's API (vLLM, SGLang, llama.cpp, TGI) that answer for it."""

    urls: list[str] = field(default_factory=list)
    """Addresses such as http://host:8000/v1, all of the same model; empty answers in process."""
    model: str | None = None
    """Name under which the servers know the target; None asks them, if they serve one only."""
    api: EndpointApi = EndpointApi.completions
    """`completions` sends the prompt as token ids of our own rendering; `chat` sends messages, for
    servers that take no ids."""
    api_key_env: str | None = None
    """Environment variable that holds the servers' key; None sends none."""
    concurrency: int = 64
    """Requests in flight at once, over all servers."""
    max_retries: int = 8
    """Further tries of a request that met a busy, broken or silent server."""
    retry_wait_s: float = 0.5
    """Seconds before the second try; they double from try to try up to 60, with jitter, unless the
    server names its own."""
    timeout_s: float = 600.0
    """Seconds after which a server that says nothing counts as silent; an answer comes whole, so
    it must hold the longest one."""

    def __post_init__(self) -> None:
        for url in self.urls:
            parts = urlsplit(url)
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                f"data.endpoints.urls (={_without_login(url)}) must be addresses that begin with "
                "http:// or https://, such as http://localhost:8000/v1.",
            )
            require(
                "@" not in parts.netloc,
                f"data.endpoints.urls (={_without_login(url)}) holds a password, and recipes never "
                "do. Take it out and name an environment variable in data.endpoints.api_key_env.",
            )
        require(
            len(set(self.urls)) == len(self.urls),
            f"data.endpoints.urls (={self.urls}) names a server twice. Name each once.",
        )
        for name in ("retry_wait_s", "timeout_s", "concurrency"):
            value = getattr(self, name)
            require(value > 0, f"data.endpoints.{name} (={value}) must be above 0.")
        require(
            self.max_retries >= 0,
            f"data.endpoints.max_retries (={self.max_retries}) must not be negative. Set it to 8.",
        )


def _without_login(url: str) -> str:
    return url.rsplit("@", 1)[-1]


@dataclass(kw_only=True)
class DataConfig:
    """From log files to rows of token ids and target features."""

    logs: str | None = None
    """Log file, folder, glob, address (s3://, gs://, hf://) or hub dataset (hub:ID); None plays the
    simulated fleet of `data.sample`."""
    sample: SampleTrafficConfig = field(default_factory=SampleTrafficConfig)
    """The simulated fleet."""
    hmac_key_file: str | None = None
    """File with the secret key of the hashes that stand for sessions and tenants, 16 bytes or more;
    None reads the environment variable DFLASH_HMAC_KEY, else makes a key for this run folder."""
    format: str | None = None
    """Format of every file, such as openai or litellm; None tells that of each by its content."""
    excluded_tenants: list[str] = field(default_factory=list)
    """Customers who opted out, named as in the log: their calls are dropped as `excluded_tenant`
    before anything else. No output holds these names."""
    max_age_days: int | None = None
    """Calls older than this, counted back from `data.retention_date`, and calls without a time
    are dropped as `expired`; None keeps all."""
    retention_date: str | None = None
    """The day from which ages count, such as 2026-10-31, not the day of the run: the same recipe
    gives the same data on any day."""
    max_answers_per_prefix: int = 4
    """Different answers of the target kept for one prompt in train, and in validation; later ones
    are dropped as `duplicate`."""
    max_per_cluster: int = 8
    """Near-duplicates (similar in last question and answer) kept of each cluster in train, and in
    validation; the others are dropped as `cluster_cap` and add to the weight of one that stays."""
    validation_days: float | None = None
    """Length in days of the window before the test window, whose sessions choose the best
    checkpoint; None takes `validation_share`."""
    test_days: float | None = None
    """Length in days of the newest window, held out for the report; None takes `test_share`."""
    validation_share: float = 0.10
    """Share of the time range, before the test window, whose sessions choose the best
    checkpoint."""
    test_share: float = 0.18
    """Share of the time range, the newest, that is held out for the report."""
    max_drop_share: float = 0.5
    """A stage that drops more than this share of its calls for one reason stops and names it; calls
    of `excluded_tenants` and those older than `max_age_days` do not count."""
    max_prompt_tokens: int = 1024
    """Tokens of the longest prompt, history included; longer ones are dropped as `too_long`."""
    max_new_tokens: int = 64
    """Longest answer that the target writes in `regenerate`, in tokens; a longer one is cut."""
    batch_size: int = 64
    """Rows that the target processes at once in `regenerate` and `collect`; servers batch for
    themselves."""
    endpoints: EndpointsConfig = field(default_factory=EndpointsConfig)
    """Servers of the target that write its answers in `regenerate`, in place of this process."""
    target_aliases: list[str] = field(default_factory=list)
    """Names under which the log knows the target, in full: NAME for any of its revisions, or
    NAME@REVISION for one; where a LoRA adapter answered, its name counts. Empty: no logged answer
    is the target's, all are written again."""
    served_model: str | None = None
    """The model whose server wrote logs that name none (SGLang's, and vLLM's where no request body
    was logged), as `data.target_aliases` calls it; None: their answers count as another model's."""
    target_valid_from: str | None = None
    """First moment at which those names meant these weights, such as 2026-10-01T00:00:00Z (UTC
    unless it says else); None: they always did."""
    target_valid_until: str | None = None
    """First moment at which those names meant other weights; None: they still mean these."""
    serving_sampling: ServingSampling = field(default_factory=ServingSampling)
    """How the target is sampled in production: logged answers are compared with it, and
    `regenerate` samples like it."""
    trust_unknown_sampling: bool = False
    """Take sampling settings that the log does not show for the serving ones. A setting that a
    client leaves out is the server's own default, which is often not the neutral one."""
    regenerate: Regenerate = Regenerate.auto
    """Whether off-policy calls are answered again (auto) or dropped (never)."""
    features_dtype: FeaturesDtype = FeaturesDtype.bfloat16
    """Number format of target features, stored or online: the rounding is the same."""
    features: FeaturesFrom = FeaturesFrom.stored
    """Where training takes features from: the disk (stored), or the target as rows are trained on
    (online), which costs a target pass per row and epoch and no disk."""
    online: OnlineSettings = field(default_factory=OnlineSettings)
    """How the target runs where features are online."""
    shard_bytes: int = 512 * 2**20
    """Largest feature shard that `collect` writes, in bytes; a row beyond that has its own."""
    collect_engine: CollectEngine = CollectEngine.transformers
    """What runs the target in `collect`, and in `train` where features are online: this Python
    (`transformers`), or `vllm` in another one.
    Both give the same features within rounding; vllm keeps no teacher and takes one process."""
    vllm_python: str | None = None
    """Interpreter of the environment that holds vLLM 0.32, such as /opt/vllm/bin/python; read where
    `collect_engine` is vllm."""
    vllm_settings: VllmSettings = field(default_factory=VllmSettings)
    """Speed and memory of that vLLM."""
    teacher_top_k: int = 0
    """k, 0 .. V: keep the target's k most probable tokens at each answer token, for losses against
    its distribution, at 8 * k bytes per token; 0 keeps none."""

    def __post_init__(self) -> None:
        _check_validity(self.target_valid_from, self.target_valid_until)
        require(
            self.served_model != "",
            "data.served_model (=) must not be empty. Set it to a name of data.target_aliases, or "
            "to null if the server was not the target's.",
        )
        require(
            bool(self.target_aliases) or self.regenerate is not Regenerate.never,
            f"data.target_aliases (={self.target_aliases}) names nothing, so data.regenerate "
            "(=never) would drop every call. Name the target as the log does, or set "
            "data.regenerate to auto.",
        )
        for name in (
            "max_prompt_tokens", "max_new_tokens", "batch_size", "max_answers_per_prefix",
            "max_per_cluster",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"data.{name} (={value}) must be at least 1.")
        require(
            self.shard_bytes >= 4096,
            f"data.shard_bytes (={self.shard_bytes}) must be at least 4096. Set it to 536870912.",
        )
        require(
            self.teacher_top_k >= 0,
            f"data.teacher_top_k (={self.teacher_top_k}) must not be negative. Set it to 0 to keep "
            "none, or to 8.",
        )
        self._check_engine()
        for name in ("max_age_days", "validation_days", "test_days"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name} (={value}) must be above 0.")
        require(
            (self.max_age_days is None) == (self.retention_date is None),
            f"data.max_age_days (={self.max_age_days}) and data.retention_date "
            f"(={self.retention_date}) go together: add data.retention_date=YYYY-MM-DD, the day "
            "from which ages count, or leave out both.",
        )
        require(
            self.retention_date is None or _is_day(self.retention_date),
            f"data.retention_date (={self.retention_date}) must be a day. Write it as 2026-10-31.",
        )
        for name in ("validation_share", "test_share", "max_drop_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"data.{name} (={value}) must be above 0 and at most 1.")
        require(
            self.validation_share + self.test_share < 1,
            f"data.validation_share (={self.validation_share}) and data.test_share "
            f"(={self.test_share}) leave nothing to train on. Lower them to 0.1 and 0.18.",
        )

    def _check_engine(self) -> None:
        is_vllm = self.collect_engine is CollectEngine.vllm
        require(
            not is_vllm or self.vllm_python is not None,
            "data.collect_engine (=vllm) needs data.vllm_python (=None), the Python of an "
            "environment that has vLLM 0.32. Set it to /opt/vllm/bin/python, for example.",
        )
        require(
            not is_vllm or self.teacher_top_k == 0,
            f"data.teacher_top_k (={self.teacher_top_k}) needs the target's distributions, and "
            "data.collect_engine (=vllm) gives hidden states only. Set data.collect_engine to "
            "transformers, or data.teacher_top_k to 0.",
        )


def parse_moment(text: str) -> datetime:
    """Give the moment of an RFC 3339 text, or of a date: its first; UTC where no zone stands.

    Raises:
        ValueError: It is neither.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _check_validity(valid_from: str | None, valid_until: str | None) -> None:
    moments: list[datetime] = []
    named = {"target_valid_from": valid_from, "target_valid_until": valid_until}
    for name, text in named.items():
        if text is None:
            continue
        try:
            moments.append(parse_moment(text))
        except ValueError as error:
            raise ValueError(
                f"data.{name} (={text}) must be a date or an RFC 3339 time. Set it to "
                "2026-10-01T00:00:00Z, for example."
            ) from error
    require(
        len(moments) < 2 or moments[0] < moments[1],
        f"data.target_valid_until (={valid_until}) must lie after data.target_valid_from "
        f"(={valid_from}). Swap them, or set one to null.",
    )


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
