"""The configuration of a run: what may be said, within which bounds.

The models are frozen and forbid unknown keys. Types are strict: "8" is not a number and 1 is not true.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from experiments.keys import check_key, names_beside
from experiments.plan_config import CapacityConfig, PlanConfig
from experiments.section import CaseAxis, Count, NotNegative, Positive, Section, whole_number
from experiments.serving_config import (
    ParallelConfig,
    PredictorConfig,
    SchedulerConfig,
    StepsConfig,
)
from experiments.swept_config import RangeConfig, SweptValues, check_rows
from experiments.tolerances import (
    SPEEDS,
    MeasuredTolerance,
    QuantileTolerance,
    RequestTolerance,
    Speed,
    Statistic,
)

__all__ = [
    "MAX_CASES",
    "NOT_VARIED",
    "SPEEDS",
    "CapacityConfig",
    "Config",
    "MeasuredTolerance",
    "ParallelConfig",
    "PlanConfig",
    "PredictorConfig",
    "QuantileTolerance",
    "RangeConfig",
    "RequestTolerance",
    "SchedulerConfig",
    "SloClassConfig",
    "Speed",
    "Statistic",
    "StepsConfig",
    "ValidateConfig",
    "check_path",
    "dump",
    "field_names",
]

Dtype = Literal["bf16", "fp8", "fp32"]
MAX_CASES = 1000
NOT_VARIED = ("name", "sweep", "plan", "capacity")  # by a sweep, a case or a policy


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
                check_rows(names, len(keys), values)
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


def check_path(path: str) -> None:
    """Check that a dotted path names a key that a configuration may hold.

    Raises:
        ValueError: it doesn't; suggests the nearest key.
    """
    check_key(Config, path)


def field_names(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Keys of the section in which the last part of ``location`` stands."""
    return names_beside(Config, location)


def dump(config: Config) -> dict[str, Any]:
    """The configuration with all its defaults, as plain data that :mod:`experiments.load` reads again."""
    data = config.model_dump(mode="json", exclude_none=True, by_alias=True)
    # In full, so that what a class took from the promise to all stays what it was.
    classes = {name: config.slo.of_class(name).model_dump(mode="json") for name in config.slo.classes}
    data["slo"] |= {"classes": classes}
    return data
