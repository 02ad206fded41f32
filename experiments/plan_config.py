"""The parts of the configuration that ``convoy plan`` and ``convoy capacity`` read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from experiments.section import CaseAxis, Count, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]
Degree = Annotated[Count, Field(le=4096)]
Degrees = Annotated[list[Degree], Field(min_length=1, max_length=64)]


class PlanConfig(Section):
    """``convoy plan``: which deployments come into question, and what is asked of them.

    What is left out of ``tp``, ``spp``, ``kvp``, ``replicas`` and ``policies`` is filled in by
    :mod:`experiments.deployments`. ``decode`` are numbers of replicas that only decode. ``prices`` are USD
    per GPU and hour, over those of the devices' files. ``traffic`` are the factors for which the answer is
    looked for again; ``parts`` the shares of the workload on which deployments are sifted, ``keep`` how many
    at most are simulated on all of it.
    """

    gpus: Degree = 8
    devices: Annotated[list[str], Field(min_length=1, max_length=16)] | None = None
    tp: Degrees | None = None
    spp: Degrees | None = None
    kvp: Degrees | None = None
    replicas: Degrees | None = None
    decode: Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: [0]
    )
    policies: Annotated[CaseAxis, Field(max_length=32)] | None = None
    prices: dict[str, Positive] = Field(default_factory=dict)
    attainment: Share = 0.99
    traffic: Annotated[list[Annotated[float, Field(gt=1, le=100)]], Field(max_length=8)] = Field(
        default_factory=lambda: [1.25, 1.5]
    )
    parts: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(max_length=8)] = Field(
        default_factory=lambda: [1 / 32, 1 / 8]
    )
    keep: Annotated[Count, Field(ge=2, le=1000)] = 12


class CapacityConfig(Section):
    """``convoy capacity``: up to which load the SLOs hold for ``attainment`` of the requests of each class.

    At each load at least ``min_seeds`` and at most ``max_seeds`` runs are made, until it is settled with
    ``confidence``; the search ends when the load is known to within ``precision``, relative.
    """

    attainment: Share = 0.99
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9
    min_seeds: Annotated[Count, Field(ge=2, le=100)] = 3
    max_seeds: Annotated[Count, Field(ge=2, le=100)] = 8
    precision: Annotated[float, Field(ge=0.001, le=1)] = 0.05
    max_load: Annotated[float, Field(gt=0, le=1e6)] = 64.0

    @model_validator(mode="after")
    def _seeds_are_a_range(self) -> CapacityConfig:
        if self.max_seeds < self.min_seeds:
            raise ValueError(f"max_seeds ({self.max_seeds}) must not be below min_seeds ({self.min_seeds})")
        return self
