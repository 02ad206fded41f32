"""Kernel times of one device, from the best source there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from numpy.typing import ArrayLike

from profiler.coverage import mismatch, part_used
from profiler.cpu_operators import is_cpu
from profiler.estimate import Estimate, FloatArray
from profiler.lookup import LookupKernels
from profiler.overheads import HostOverhead, LayerCorrection, ServingOverhead
from profiler.predictor import load_predictor
from profiler.roofline_kernels import RooflineKernels
from profiler.tables import PROFILES, Profile, read_profile
from profiler.trained_kernels import TrainedKernels
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.models import ModelSpec

__all__ = [
    "Estimate",
    "Kernels",
    "RooflineKernels",
    "Source",
    "TrainedKernels",
    "Wanted",
    "find_profile",
    "list_profiles",
    "load_kernels",
    "profile_info",
]

Source = Literal["auto", "measured", "imported", "roofline"]


class Kernels(Protocol):
    """What an iteration is made of. Arguments are scalars or arrays that broadcast together.

    Attributes:
        activation_bytes: bytes of an activation's element.
        host: measured host overhead; None if it wasn't measured.
        layer: what whole layers take beyond their operators; None if it wasn't measured.
        serving: what iterations take in a running engine beyond both; None if it wasn't measured.
        stage_gap: what a later pipeline stage takes between two batches; None if it wasn't measured.
        kinds: the operators that were measured.
        attention_includes_kv_write: whether the attention that was measured stored the keys as well.
        steps_may_fall: whether a batch of more tokens may take less; else that counts as noise.
        passed_over: measured profiles that don't hold for what was asked, and why, one line each.
    """

    device: DeviceSpec
    activation_bytes: int
    host: HostOverhead | None
    layer: LayerCorrection | None
    serving: ServingOverhead | None
    stage_gap: HostOverhead | None
    kinds: frozenset[str]
    attention_includes_kv_write: bool
    steps_may_fall: bool
    passed_over: tuple[str, ...]

    def perturbed(self, factors: Mapping[str, float]) -> Kernels:
        """The same with the times of each operator multiplied by its factor, where there is one, beyond any
        factors that it was given before."""

    @property
    def operators(self) -> frozenset[str]:
        """The operators whose times a factor can multiply."""

    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]:
        """Of each measured operator, log(measured ÷ predicted) on held-out rows: 5th and 95th percentile."""

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike) -> Estimate:
        """`m` tokens times a weight of `k` inputs and `n` outputs."""

    def prefill_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        """One chunk of `chunk` tokens, causal, over `context` cached tokens; one layer, one rank."""

    def decode_attention(
        self,
        batch: ArrayLike,
        total_context: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
    ) -> Estimate:
        """`batch` decodes whose contexts add up to `total_context` tokens; one layer, one rank."""

    def shard_attention(
        self, chunk: ArrayLike, context: ArrayLike, heads: ArrayLike, kv_heads: ArrayLike, head_dim: ArrayLike
    ) -> Estimate:
        """A chunk over `context` keys of a KV shard that holds none of its own; with its log-sum-exp."""

    def elementwise(
        self, num_bytes: ArrayLike, *, kind: str = "", rows: ArrayLike = 1.0, shards: ArrayLike = 2.0
    ) -> Estimate:
        """A kernel that only moves bytes (read and written counted), over `rows` tokens; `kind` is one of
        `profiler.work.KINDS`, or empty for any; `shards` is how many a KVP merge merges."""

    def all_reduce(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        """Sum of a vector of `num_bytes` over `ranks` devices."""

    def all_gather(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        """A vector of `num_bytes` from each of `ranks` devices of a node to all of them."""

    def send_recv(self, num_bytes: ArrayLike, inter_node: bool) -> Estimate:
        """`num_bytes` from one device to another."""

    def rest_of_layer(self, tokens: FloatArray, tp: int) -> Estimate | None:
        """A layer's share of all that isn't attention or a collective, the LM head included; None if the
        operators were measured one by one."""

    def mixing_s(
        self, chunk: FloatArray, decodes: FloatArray, mean_context: FloatArray, heads: tuple[int, int, int]
    ) -> FloatArray | None:
        """What attention of a mixed batch takes beyond that of its chunks, `chunk` tokens in all, and of its
        decodes alone, in seconds a layer; may be negative. None if nobody knows."""

    def spread_s(self, decodes: FloatArray, heads: tuple[int, int, int], *, mixed: bool) -> FloatArray | None:
        """What attention of `decodes` decodes takes more for each token of standard deviation of their
        contexts, in seconds a layer, alone or beside chunks. None if nobody knows."""


def load_kernels(
    device: DeviceSpec,
    source: Source = "auto",
    *,
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    profile: Path | None = None,
    model: ModelSpec | None = None,
    tp: int = 1,
) -> Kernels:
    """Kernel times of `device`.

    `source` auto takes a measured profile if there is one, else an imported one, else the roofline. A
    measured profile holds for the shapes it was measured for: `model` and `tp` say which are wanted; without
    `model` any will do. `profile` names a profile folder of the user's own and overrides the search. Types
    are fp32 on a CPU and bf16 elsewhere if they aren't given.

    The `passed_over` of what is returned says which measured profiles of the device were not taken, and why.

    Raises:
        InputError: the source asked for doesn't exist for this device, or it was measured for other shapes or
            types; or its files are unsound.
    """
    usual = "fp32" if is_cpu(device) else "bf16"
    weight_dtype, kv_dtype = weight_dtype or usual, kv_dtype or usual
    if source == "roofline" and profile is None:
        return RooflineKernels(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    wanted = Wanted(model, tp, weight_dtype, kv_dtype)
    if profile is not None:
        chosen: Profile | None = read_profile(profile)
        if chosen is not None and (reason := wanted.mismatch(chosen)) is not None:
            raise InputError(f"{profile}: {reason}")
    else:
        chosen = find_profile(device, source, wanted=wanted)
    passed_over = () if chosen is not None and chosen.source == "measured" else _passed_over(device, wanted)
    if chosen is None:
        return RooflineKernels(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype, passed_over=passed_over)
    if chosen.predictor == "lookup":
        return LookupKernels(device, chosen, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    predictor = load_predictor(chosen, device)
    return TrainedKernels(
        part_used(device, chosen.threads),
        predictor,
        source=chosen.source,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
    )


def _passed_over(device: DeviceSpec, wanted: Wanted) -> tuple[str, ...]:
    """Why each measured profile of the device doesn't hold, one line each."""
    found = []
    for profile in list_profiles(of=device):
        if (reason := wanted.mismatch(profile)) is not None:
            found.append(f"{profile.name} {reason}")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a profile has to hold for."""

    model: ModelSpec | None = None
    tp: int = 1
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"

    def mismatch(self, profile: Profile) -> str | None:
        """Why a profile doesn't hold for it; None if it does."""
        return mismatch(profile, self.model, self.tp, self.weight_dtype, self.kv_dtype)


def find_profile(
    device: DeviceSpec, source: Source, root: Path = PROFILES, *, wanted: Wanted | None = None
) -> Profile | None:
    """The newest shipped profile of `device` from `source` that fits what is wanted; None if auto finds none.

    Raises:
        InputError: unknown source, or the one asked for doesn't exist or holds for other shapes or types.
    """
    kinds = {"auto": ("measured", "imported"), "measured": ("measured",), "imported": ("imported",)}
    if source not in kinds:
        raise InputError(f"predictor.source: {source!r} is not one of auto, measured, imported, roofline")
    profiles = list_profiles(root, of=device)
    reasons = []
    for kind in kinds[source]:
        matching = [profile for profile in profiles if profile.source == kind]
        for profile in sorted(matching, key=lambda profile: (profile.created, profile.name), reverse=True):
            reason = None if wanted is None else wanted.mismatch(profile)
            if reason is None:
                return profile
            reasons.append(f"{profile.name} {reason}")
    if source == "auto":
        return None
    if reasons:
        raise InputError(f"predictor.source: no {source} profile of {device.name} fits: {'; '.join(reasons)}")
    have = ", ".join(sorted({profile.source for profile in profiles} | {"roofline"}))
    raise InputError(f"predictor.source: no {source} profile of {device.name}; there is {have}")


def list_profiles(root: Path = PROFILES, *, of: DeviceSpec | None = None) -> list[Profile]:
    """Shipped profiles, sorted by device and name; all of them, or those of one device."""
    folders = [folder for folder in sorted(root.glob("*/")) if of is None or folder.name == of.name]
    files = [file for folder in folders for file in sorted(folder.glob("*/profile.yaml"))]
    return [read_profile(file.parent) for file in files]


def profile_info(path: Path) -> dict[str, str]:
    """What `convoy list profiles` and reports say about the profile in the folder `path`."""
    profile = read_profile(path)
    return {
        "device": profile.device,
        "name": profile.name,
        "source": profile.source,
        "created": profile.created,
        "licence": profile.licence,
        "versions": ", ".join(f"{name} {version}" for name, version in profile.versions.items()),
        "tables": ", ".join(f"{info.key} ({info.rows})" for info in profile.tables),
    }
