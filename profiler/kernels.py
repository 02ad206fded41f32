"""Kernel times of one device, from the best source there is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from numpy.typing import ArrayLike

from profiler.estimate import Estimate
from profiler.predictor import load_predictor
from profiler.roofline_kernels import RooflineKernels
from profiler.tables import PROFILES, Profile, read_profile
from profiler.trained_kernels import TrainedKernels
from specs.devices import DeviceSpec
from specs.errors import InputError

__all__ = [
    "Estimate",
    "Kernels",
    "RooflineKernels",
    "Source",
    "TrainedKernels",
    "find_profile",
    "list_profiles",
    "load_kernels",
    "profile_info",
]

Source = Literal["auto", "measured", "imported", "roofline"]


class Kernels(Protocol):
    """What an iteration is made of. Arguments are scalars or arrays that broadcast together."""

    device: DeviceSpec

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

    def elementwise(self, num_bytes: ArrayLike) -> Estimate:
        """A kernel that only moves bytes (read and written counted): norms, RoPE, activations."""

    def all_reduce(self, num_bytes: ArrayLike, ranks: ArrayLike) -> Estimate:
        """Sum of a vector of `num_bytes` over `ranks` devices."""

    def send_recv(self, num_bytes: ArrayLike, inter_node: bool) -> Estimate:
        """`num_bytes` from one device to another."""


def load_kernels(
    device: DeviceSpec,
    source: Source = "auto",
    *,
    weight_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    profile: Path | None = None,
) -> Kernels:
    """Kernel times of `device`.

    `source` auto takes a measured profile if there is one, else an imported one, else the roofline.
    `profile` names a profile folder of the user's own and overrides the search.

    Raises:
        InputError: the source asked for doesn't exist for this device, or its files are unsound.
    """
    if source == "roofline" and profile is None:
        return RooflineKernels(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    chosen = read_profile(profile) if profile is not None else find_profile(device, source)
    if chosen is None:
        return RooflineKernels(device, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
    predictor = load_predictor(chosen, device)
    return TrainedKernels(
        device, predictor, source=chosen.source, weight_dtype=weight_dtype, kv_dtype=kv_dtype
    )


def find_profile(device: DeviceSpec, source: Source, root: Path = PROFILES) -> Profile | None:
    """The newest shipped profile of `device` from `source`; None if auto finds none.

    Raises:
        InputError: unknown source, or the one asked for doesn't exist.
    """
    wanted = {"auto": ("measured", "imported"), "measured": ("measured",), "imported": ("imported",)}
    if source not in wanted:
        raise InputError(f"predictor.source: {source!r} is not one of auto, measured, imported, roofline")
    profiles = [profile for profile in list_profiles(root) if profile.device == device.name]
    for kind in wanted[source]:
        matching = [profile for profile in profiles if profile.source == kind]
        if matching:
            return max(matching, key=lambda profile: (profile.created, profile.name))
    if source == "auto":
        return None
    have = ", ".join(sorted({profile.source for profile in profiles} | {"roofline"}))
    raise InputError(f"predictor.source: no {source} profile of {device.name}; there is {have}")


def list_profiles(root: Path = PROFILES) -> list[Profile]:
    """Shipped profiles, sorted by device and name."""
    return [read_profile(file.parent) for file in sorted(root.glob("*/*/profile.yaml"))]


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
