"""The parts of the configuration that say what serves: kernel times, replicas, scheduling."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from experiments.keys import known_name
from experiments.section import Count, NotNegative, Positive, Section, whole_number
from policies.elastic import ElasticSettings
from policies.priorities import PRIORITIES, installed_priorities
from policies.routers import ROUTERS
from policies.scheduler import SchedulerSettings
from policies.settings import PRESETS

_POLICY = SchedulerSettings()  # its defaults are ours
_ELASTIC = ElasticSettings()


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
