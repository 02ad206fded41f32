"""The configuration of a run: what may be said, within which bounds.

The models are frozen and forbid unknown keys. Types are strict: "8" is not a number and 1 is not true.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import pairwise
from math import prod
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic.fields import FieldInfo

from experiments.plan_config import CapacityConfig, PlanConfig
from experiments.section import CaseAxis, Count, NotNegative, Positive, Section, whole_number
from policies.elastic import ElasticSettings
from policies.priorities import PRIORITIES, installed_priorities
from policies.routers import ROUTERS
from policies.scheduler import SchedulerSettings
from policies.settings import PRESETS

_POLICY = SchedulerSettings()  # its defaults are ours
_ELASTIC = ElasticSettings()


Dtype = Literal["bf16", "fp8", "fp32"]
Statistic = Literal["mean", "p50", "p90", "p99"]
Allowed = Positive | Annotated[dict[Statistic, Positive], Field(min_length=1)]
Latency = Literal["ttft_s", "tpot_s", "tbt_s", "e2e_s"]
_JUDGED_STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p99")
_JUDGED: tuple[Latency, ...] = ("ttft_s", "tpot_s")
MAX_CASES = 1000
NOT_VARIED = ("name", "sweep", "plan", "capacity")  # by a sweep, a case or a policy


class HostConfig(Section):
    """Seconds that the host adds to each iteration; ``root_s`` times the root of its requests, ``prefill_s``
    to one with prompt tokens, ``ranks_s`` to one that several ranks execute, ``stage_s`` to each hand-over
    between stages."""

    base_s: NotNegative = 0.0
    per_request_s: NotNegative = 0.0
    root_s: NotNegative = 0.0
    prefill_s: NotNegative = 0.0
    per_prefill_token_s: NotNegative = 0.0
    ranks_s: NotNegative = 0.0
    stage_s: NotNegative = 0.0


class StepsConfig(Section):
    """``seconds`` that an engine's step takes, attention aside, with so many ``tokens`` in its batch, under
    tensor parallelism of degree ``tp``."""

    tokens: Annotated[list[Count], Field(min_length=1, max_length=1000)]
    seconds: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    tp: Count = 1

    @model_validator(mode="after")
    def _is_a_curve(self) -> StepsConfig:
        if len(self.tokens) != len(self.seconds):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.seconds)} seconds")
        if any(late <= early for early, late in pairwise(self.tokens)):
            raise ValueError("tokens must rise")
        return self


class PredictorConfig(Section):
    """Where kernel times come from. ``profile`` is a profile folder of the user's own. ``steps``, which a
    calibration found in an engine's log, takes the place of both kernels and host; attention is left to the
    data sheet.

    ``cuda_graphs`` is the largest batch, in tokens, that runs as a CUDA graph made for a few sizes (vLLM's),
    so that a smaller one is padded; 0 for none. ``factors`` multiply the times of operators, as a calibration
    found them.
    """

    source: Literal["auto", "measured", "imported", "roofline"] = "auto"
    profile: str | None = None
    host: HostConfig | None = None
    cuda_graphs: Annotated[int, BeforeValidator(whole_number), Field(ge=0, le=65536)] = 0
    factors: dict[str, NotNegative] = Field(default_factory=dict)
    steps: StepsConfig | None = None


class DecodeConfig(Section):
    """Replicas that only decode. ``tp`` is that of the others if it isn't given; ``transfer`` says when KV
    caches move: after the prefill, over the links, or hidden behind it."""

    replicas: Annotated[Count, Field(le=100_000)] = 1
    tp: Count | None = None
    spp: Count = 1
    kvp: Count = 1
    kvp_tokens_per_group: Count = 524288
    transfer: Literal["after", "hidden"] = "after"


class ElasticConfig(Section):
    """Replicas that prefill together: at most ``max_cp``, and some of them kept for short prompts."""

    max_cp: Count = _ELASTIC.max_cp
    reserved_replicas: Annotated[int, BeforeValidator(whole_number), Field(ge=0)] = _ELASTIC.reserved_replicas
    reserved_below_tokens: Count = _ELASTIC.reserved_below_tokens


class ParallelConfig(Section):
    """How many GPUs, and how a model is spread over them. With ``decode``, the replicas only prefill."""

    replicas: Annotated[Count, Field(le=100_000)] = 1
    tp: Count = 1
    spp: Count = 1
    kvp: Count = 1
    pipeline: Literal["stream", "microbatch"] = "stream"
    kvp_tokens_per_group: Count = 524288
    cp: Count = 1
    ring: Literal["striped", "contiguous"] = "striped"
    ring_merge: Literal["end", "step", "eager"] = "step"
    elastic: ElasticConfig | None = None
    decode: DecodeConfig | None = None

    @property
    def shape(self) -> dict[str, Any]:
        """How its own replicas are parallel, as ``ParallelSpec`` takes it."""
        return self.model_dump(exclude={"elastic", "decode"})


class KvConfig(Section):
    """The paged KV cache: tokens per block, the share of blocks that admission leaves free, whether
    prefixes that prompts share are computed once, and whether somebody may be admitted before a request that
    goes first and doesn't fit."""

    block_tokens: Annotated[Count, Field(le=65536)] = _POLICY.block_tokens
    watermark: Annotated[float, Field(ge=0, lt=1)] = _POLICY.watermark
    prefix_caching: bool = _POLICY.prefix_caching
    admission: Literal["in_order", "pass_over"] = _POLICY.admission


class SchedulerConfig(Section):
    """The scheduling policy of every replica, and the router before them.

    ``chunk_tokens`` belongs to static chunks; ``length_threshold_tokens`` and ``long_replicas`` to the
    router length_partitioned. They may stand there unused, so that a sweep can vary the policy.
    ``preset`` names what a real engine does: defaults for all the keys that aren't given.
    """

    preset: str | None = None
    priority: str = _POLICY.priority
    chunking: Literal["whole", "static", "adaptive"] = _POLICY.chunking
    chunk_tokens: Count = _POLICY.chunk_tokens
    packing: Literal["decode_first", "prefill_first"] = _POLICY.packing
    max_batch_requests: Annotated[Count, Field(le=65536)] = _POLICY.max_batch_requests
    max_batch_tokens: Annotated[Count, Field(le=2**24)] = _POLICY.max_batch_tokens
    max_chunk_tokens: Annotated[Count, Field(le=2**24)] = _POLICY.max_chunk_tokens
    target_iteration_s: Positive = _POLICY.target_iteration_s
    space_sharing: bool = _POLICY.space_sharing
    lars_normalization: Literal["work", "deadline"] = _POLICY.lars_normalization
    long_request_tokens: Count = _POLICY.long_request_tokens
    max_yield_fraction: Annotated[float, Field(ge=0, lt=1)] = _POLICY.max_yield_fraction
    max_skips: Count = _POLICY.max_skips
    async_scheduling: bool = _POLICY.async_scheduling
    router: str = "least_loaded"
    length_threshold_tokens: Count = 8192
    long_replicas: Count = 1
    kv: KvConfig = KvConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset_sets_defaults(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(name := value.get("preset"), str):
            return value
        preset = PRESETS[known_name(name, tuple(PRESETS), "preset")]
        kv = value.get("kv", {})
        both = {"kv": {**preset["kv"], **kv}} if isinstance(kv, Mapping) else {}
        return {**preset, **value, **both}

    @field_validator("priority")
    @classmethod
    def _priority_is_known(cls, name: str) -> str:
        # A module:Class is looked for when the run is built: reading a configuration imports nothing.
        if ":" in name or name in PRIORITIES:
            return name
        return known_name(name, (*PRIORITIES, *installed_priorities()), "priority")

    @field_validator("router")
    @classmethod
    def _router_is_known(cls, name: str) -> str:
        return known_name(name, ROUTERS, "router")

    @model_validator(mode="after")
    def _chunks_fit_batches(self) -> SchedulerConfig:
        if self.chunking == "static" and self.chunk_tokens > self.max_batch_tokens:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} is more than max_batch_tokens {self.max_batch_tokens}; "
                "raise max_batch_tokens or take smaller chunks"
            )
        return self


class WorkloadConfig(Section):
    """Which requests come, and when. ``traces.build`` knows the keys of lengths and arrivals."""

    lengths: dict[str, Any]
    arrivals: dict[str, Any]
    num_requests: Annotated[Count, Field(le=100_000_000)] | None = None
    duration_s: Positive | None = None


class TtftConfig(Section):
    """The first token is due max(multiplier · C[prompt], floor_s) seconds after arrival."""

    multiplier: NotNegative = 1.5
    floor_s: NotNegative = 0.5

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_the_same_for_all(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"multiplier": 0.0, "floor_s": value}
        return value

    @model_validator(mode="after")
    def _asks_for_something_possible(self) -> TtftConfig:
        if self.multiplier == 0 and self.floor_s == 0:
            raise ValueError("a time to first token of 0 s can't be met; give a positive number of seconds")
        return self


class SloClassConfig(Section):
    """What one class of requests was promised."""

    ttft: TtftConfig = TtftConfig()
    tpot_s: Positive | None = None


class SloConfig(SloClassConfig):
    """The promise to all requests, and the exceptions by class; what a class leaves out is as for all."""

    classes: dict[str, SloClassConfig] = Field(default_factory=dict)

    def of_class(self, name: str) -> SloClassConfig:
        """The promise to requests of the class ``name``."""
        own = self.classes.get(name)
        given = {} if own is None else {key: getattr(own, key) for key in own.model_fields_set}
        return SloClassConfig(**({"ttft": self.ttft, "tpot_s": self.tpot_s} | given))


class DtypeConfig(Section):
    """Number formats of the weights and of the KV cache."""

    weight: Dtype = "bf16"
    kv: Dtype = "bf16"


class LiveConfig(Section):
    """How the live runtime executes the model, in the number format ``dtype.weight``.

    ``weights`` is a seed or a local Hugging Face folder; ``device`` is where, if not what the device's name
    says; ``threads`` are torch's in each rank on a CPU; ``timeout_s`` is how long a rank may be silent.
    """

    device: Literal["cpu", "cuda"] | None = None
    weights: Annotated[int, Field(ge=0, lt=2**63)] | str = 0
    attention: str = "auto"
    threads: Annotated[Count, Field(le=1024)] = 1
    timeout_s: Positive = 60.0


class QuantileTolerance(Section):
    """Relative errors that are allowed, at the median and at the 90th percentile."""

    p50: Positive = 0.05
    p90: Positive = 0.15


Speed = Literal["profile", "measured"]


class RequestTolerance(QuantileTolerance):
    """Those of the requests, for the latencies in ``metrics``; ``noise_factor`` times the difference between
    live runs is allowed too, if that is larger.

    ``speed`` says at which pace of the machine the simulation is judged: that of its profile, or the one that
    the batches of the live runs had, as a factor on each kind of batches.
    """

    p90: Positive = 0.10
    noise_factor: NotNegative = 1.5
    speed: Speed = "profile"
    metrics: Annotated[list[Latency], Field(min_length=1)] = Field(default_factory=lambda: list(_JUDGED))


class MeasuredTolerance(Section):
    """Relative errors that are allowed against a measured run of another engine.

    Of the latencies, one number for those of ``statistics``, or one for each statistic that is named; of the
    iterations of a log the median, without the first ``fitted_share`` of each segment, to which something was
    fitted. ``segment`` is that of the workload.
    """

    ttft: Allowed = 0.04
    tpot: Allowed = 0.015
    e2e: Allowed = 0.015
    makespan: Positive = 0.03
    decode: Positive = 0.04
    mixed: Positive = 0.06
    context: Positive = 0.06
    statistics: Annotated[list[Statistic], Field(min_length=1)] = Field(
        default_factory=lambda: list(_JUDGED_STATISTICS)
    )
    segment: str | None = None
    fitted_share: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def of_latency(self, name: str, statistic: Statistic) -> float | None:
        """What is allowed for a statistic of ``ttft``, ``tpot`` or ``e2e``; None if it decides nothing."""
        limit: Allowed = getattr(self, name)
        if isinstance(limit, dict):
            return limit.get(statistic)
        return limit if statistic in self.statistics else None


class ValidateConfig(Section):
    """``convoy validate``: live runs, and what each rung of the ladder tolerates.

    ``cases`` makes several configurations of one. It is a list of axes; each has names, and what a name
    changes, by dotted keys. Every combination of a name from each axis is a case.
    """

    runs: Annotated[Count, Field(le=100)] = 2
    operator: QuantileTolerance = QuantileTolerance()
    iteration: QuantileTolerance = QuantileTolerance()
    request: RequestTolerance = RequestTolerance()
    measured: MeasuredTolerance = MeasuredTolerance()
    cases: Annotated[list[CaseAxis], Field(max_length=8)] = Field(default_factory=list)

    @field_validator("cases")
    @classmethod
    def _cases_change_known_keys(
        cls, axes: list[dict[str, dict[str, Any]]]
    ) -> list[dict[str, dict[str, Any]]]:
        if prod(len(axis) for axis in axes) > MAX_CASES:
            raise ValueError(f"that makes more than {MAX_CASES} cases")
        for path in (path for axis in axes for changes in axis.values() for path in changes):
            check_path(path)
            if path.partition(".")[0] in NOT_VARIED or path.startswith("validate.cases"):
                raise ValueError(f"a case can't change '{path}'")
        return axes


class RangeConfig(Section):
    """Numbers from ``start`` to ``stop``, both included: ``step`` apart, or ``count`` of them, evenly spread
    or with ``log`` in equal ratios."""

    start: float
    stop: float
    step: Positive | None = None
    count: Annotated[int, BeforeValidator(whole_number), Field(ge=1, le=100_000)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeConfig:
        if (self.step is None) == (self.count is None):
            raise ValueError("a range has a step or a count, one of them")
        if self.stop < self.start:
            raise ValueError(f"stop ({self.stop:g}) must not be below start ({self.start:g})")
        if self.step is not None and (self.stop - self.start) / self.step > 100_000:
            raise ValueError("that makes more than 100,000 values")
        if self.log and (self.start <= 0 or self.step is not None):
            raise ValueError("log needs a count and a start above 0")
        return self


def _range_or_list(values: Any) -> str:
    return "range" if isinstance(values, Mapping | RangeConfig) else "list"


SweptValues = Annotated[
    Annotated[list[Any], Tag("list")] | Annotated[RangeConfig, Tag("range")], Discriminator(_range_or_list)
]


class Config(Section):
    """One experiment. ``sweep`` maps dotted keys to the values they take, for ``convoy sweep``; keys joined
    by commas take theirs together, from lists as long as there are keys."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+=,@-]{0,99}$")]
    model: str
    device: str
    dtype: DtypeConfig = DtypeConfig()
    memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    predictor: PredictorConfig = PredictorConfig()
    parallel: ParallelConfig = ParallelConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    workload: WorkloadConfig
    slo: SloConfig = SloConfig()
    seed: Annotated[int, BeforeValidator(whole_number), Field(ge=0, lt=2**63)] = 0
    stop_s: Positive | None = None
    live: LiveConfig = LiveConfig()
    # Not `validate`, which is a method of pydantic's models.
    validation: Annotated[ValidateConfig, Field(alias="validate")] = ValidateConfig()
    sweep: dict[str, SweptValues] | None = None
    plan: PlanConfig | None = None
    capacity: CapacityConfig | None = None

    @field_validator("sweep")
    @classmethod
    def _sweeps_known_keys(
        cls, sweep: dict[str, list[Any] | RangeConfig] | None
    ) -> dict[str, list[Any] | RangeConfig] | None:
        seen: set[str] = set()
        for names, values in (sweep or {}).items():
            keys = [name.strip() for name in names.split(",")]
            for key in keys:
                check_path(key)
                if key.partition(".")[0] in NOT_VARIED:
                    raise ValueError(f"a sweep can't vary '{key}'")
                if key in seen:
                    raise ValueError(f"'{key}' is there twice")
                seen.add(key)
            if not values:
                raise ValueError(f"{names} has no values")
            if len(keys) > 1:
                _check_rows(names, len(keys), values)
        return sweep

    @field_validator("plan")
    @classmethod
    def _policies_change_known_keys(cls, plan: PlanConfig | None) -> PlanConfig | None:
        for path in (path for changes in ((plan and plan.policies) or {}).values() for path in changes):
            check_path(path)
            if path.partition(".")[0] in (*NOT_VARIED, "model", "device", "workload", "slo", "seed"):
                raise ValueError(f"a policy can't change '{path}'")
        return plan

    @model_validator(mode="after")
    def _a_ring_takes_whole_prompts(self) -> Config:
        if self.parallel.cp > 1 and self.scheduler.chunking != "whole":
            raise ValueError(
                f"parallel.cp: a prefill holds the {self.parallel.cp} ranks of its ring to the end, so "
                f"scheduler.chunking must be whole, and is {self.scheduler.chunking}"
            )
        return self

    @model_validator(mode="after")
    def _elastic_replicas_take_whole_prompts_in_turn(self) -> Config:
        parallel, scheduler = self.parallel, self.scheduler
        elastic = parallel.elastic
        if elastic is None:
            return self
        if parallel.decode is None:
            raise ValueError("parallel.elastic: needs replicas that decode: give parallel.decode as well")
        if max(parallel.spp, parallel.kvp, parallel.cp) > 1:
            raise ValueError("parallel.elastic: goes with tp alone; spp, kvp and cp must be 1")
        if scheduler.chunking != "whole" or scheduler.priority != "fcfs":
            raise ValueError(
                "parallel.elastic: prefills whole prompts, first come, first served: scheduler.chunking must "
                f"be whole and .priority fcfs, not {scheduler.chunking} and {scheduler.priority}"
            )
        if scheduler.kv.prefix_caching:
            raise ValueError("parallel.elastic: keeps no prefixes; scheduler.kv.prefix_caching must be false")
        if elastic.reserved_replicas >= parallel.replicas:
            raise ValueError(
                f"parallel.elastic: {elastic.reserved_replicas} reserved replicas leave none of "
                f"parallel.replicas ({parallel.replicas}) for long prompts"
            )
        return self

    @model_validator(mode="after")
    def _some_replicas_stay_for_short_prompts(self) -> Config:
        scheduler, replicas = self.scheduler, self.parallel.replicas
        if scheduler.router == "length_partitioned" and scheduler.long_replicas >= replicas:
            raise ValueError(
                f"scheduler.router: length_partitioned keeps {scheduler.long_replicas} for long prompts, so "
                f"parallel.replicas must be larger than that, and is {replicas}"
            )
        return self


def _check_rows(names: str, width: int, values: list[Any] | RangeConfig) -> None:
    """Values of several keys at once must be lists of one value for each."""
    rows = values if isinstance(values, list) else [values]
    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"{names}: each value must be a list of {width}, one for each key")


def known_name(name: str, names: tuple[str, ...], what: str) -> str:
    """``name`` if it is one of ``names``.

    Raises:
        ValueError: it isn't; suggests the nearest.
    """
    if name in names:
        return name
    raise ValueError(f"'{name}' is not a known {what}{suggestion(name, names)} ({', '.join(names)})")


def suggestion(name: str, names: tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``names``, or nothing."""
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_path(path: str) -> None:
    """Check that a dotted path names a key that a configuration may hold.

    Raises:
        ValueError: it doesn't; suggests the nearest key.
    """
    annotation: Any = Config
    parts = path.split(".")
    for depth, part in enumerate(parts):
        section = _section_in(annotation)
        if section is not None and part not in _fields(section):
            key = ".".join(parts[: depth + 1])
            names = tuple(_fields(section))
            raise ValueError(f"'{key}' is not a key of the configuration{suggestion(part, names)}")
        if section is None and _values_of(annotation) is None:
            raise ValueError(f"'{'.'.join(parts[:depth])}' is a value, so '{path}' is not a key")
        annotation = _below(annotation, part)


def field_names(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Keys of the section in which the last part of ``location`` stands."""
    annotation: Any = Config
    for part in location[:-1]:
        annotation = _below(annotation, str(part))
    section = _section_in(annotation)
    return tuple(_fields(section)) if section is not None else ()


def _below(annotation: Any, part: str) -> Any:
    """The annotation of what stands under the key ``part``."""
    section = _section_in(annotation)
    return _fields(section)[part].annotation if section is not None else _values_of(annotation)


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in a configuration."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class in an annotation such as ``HostConfig | None``."""
    kinds = [annotation] if get_origin(annotation) is None else []
    if get_origin(annotation) is UnionType:
        kinds = list(get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _values_of(annotation: Any) -> Any:
    """The annotation of a dict's values; None if it isn't a dict. What is below ``Any`` is free."""
    if annotation is Any:
        return Any
    kinds = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), None)


def dump(config: Config) -> dict[str, Any]:
    """The configuration with all its defaults, as plain data that :mod:`experiments.load` reads again."""
    data = config.model_dump(mode="json", exclude_none=True, by_alias=True)
    # In full, so that what a class took from the promise to all stays what it was.
    classes = {name: config.slo.of_class(name).model_dump(mode="json") for name in config.slo.classes}
    data["slo"] |= {"classes": classes}
    return data


def merged(data: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``data`` with the value at the dotted ``path`` replaced; numbers index lists.

    Raises:
        ValueError: something on the way isn't a mapping or a list, or an index is out of range.
    """
    head, _, rest = path.partition(".")
    if not rest:
        return {**data, head: value}
    below = data.get(head)
    if isinstance(below, list):
        return {**data, head: _merged_list(below, head, rest, value)}
    if below is not None and not isinstance(below, Mapping):
        raise ValueError(f"'{head}' is a value ({below!r}), so it has no '{rest}'")
    return {**data, head: merged(below or {}, rest, value)}


def _merged_list(items: list[Any], head: str, path: str, value: Any) -> list[Any]:
    index, _, rest = path.partition(".")
    if not index.isdecimal() or int(index) >= len(items):
        raise ValueError(f"'{head}' is a list of {len(items)}, so '{index}' must be 0 to {len(items) - 1}")
    item = items[int(index)]
    if rest and not isinstance(item, Mapping):
        raise ValueError(f"'{head}.{index}' is a value ({item!r}), so it has no '{rest}'")
    new = merged(item, rest, value) if rest else value
    return [*items[: int(index)], new, *items[int(index) + 1 :]]
