"""What an accelerator is: the figures of its data sheet, its links and its price.

One YAML file a device, with its sources; a user's own file of the same form is read the same way.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specs.errors import InputError, did_you_mean
from specs.input_files import Fields, is_kind, load_mapping
from specs.models import DTYPE_BYTES

_LIBRARY = Path(__file__).parent / "library" / "devices"


@dataclass(frozen=True, slots=True)
class Link:
    """A path between two devices, as one of them sees it: one direction."""

    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """An accelerator. Peaks are the data sheet's dense ones, which no kernel exceeds."""

    name: str
    vendor_name: str
    peak_flops: Mapping[str, float] = field(hash=False)  # FLOP/s by dtype, without sparsity
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    num_sms: int
    l2_bytes: int
    kernel_launch_s: float  # shortest time a kernel takes, however little it does
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    price_usd_per_hour: float  # of one GPU
    price_source: str
    source: str
    send_recv: Link | None = None  # what a send and receive between nodes reaches, if less than its link

    def peak_flops_for(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in `dtype`.

        Raises:
            InputError: the device has no units for this dtype.
        """
        # fp16 runs at the rate of bf16 on every device of the library.
        peak = self.peak_flops.get("bf16" if dtype == "fp16" else dtype)
        if peak is None:
            known = ", ".join(self.peak_flops)
            raise InputError(f"device: {self.name} has no peak rate for {dtype}; it has {known}")
        return peak


def list_devices() -> list[str]:
    """Names of the library's devices, sorted."""
    return sorted(path.stem for path in _LIBRARY.glob("*.yaml"))


def get_device(name: str) -> DeviceSpec:
    """Return a device of the library, or the one described in the YAML file at the path `name`.

    Raises:
        InputError: there is no such device or file, or a figure in the file is missing or impossible.
    """
    names = list_devices()
    if name in names:
        return read_device(_LIBRARY / f"{name}.yaml", name)
    path = Path(name).expanduser()
    if is_kind(path, "file"):
        return read_device(path, path.stem)
    hint = did_you_mean(name, names) or f"; known are {', '.join(names)}"
    raise InputError(f"device: {reprlib.repr(name)} is neither a known device nor a YAML file of one{hint}")


def read_device(path: Path, name: str) -> DeviceSpec:
    """Read a device's YAML file, whose keys are the fields of `DeviceSpec` except `name`.

    Raises:
        InputError: the file is unreadable, a key is missing or unknown, or a value is impossible.
    """
    data = load_mapping(path, "yaml")
    where = str(path)
    fields = Fields(data, where)
    fields.refuse_unknown(key for key in DeviceSpec.__dataclass_fields__ if key != "name")
    return DeviceSpec(
        name=name,
        vendor_name=fields.text("vendor_name"),
        peak_flops=_peaks(fields.mapping("peak_flops"), f"{where}: peak_flops"),
        memory_bytes=fields.integer("memory_bytes"),
        memory_bandwidth_bytes_per_s=fields.number("memory_bandwidth_bytes_per_s", at_least=1.0),
        num_sms=fields.integer("num_sms"),
        l2_bytes=fields.integer("l2_bytes"),
        kernel_launch_s=fields.number("kernel_launch_s"),
        gpus_per_node=fields.integer("gpus_per_node"),
        intra_node=_link(fields.mapping("intra_node"), f"{where}: intra_node"),
        inter_node=_link(fields.mapping("inter_node"), f"{where}: inter_node"),
        price_usd_per_hour=fields.number("price_usd_per_hour"),
        price_source=fields.text("price_source"),
        source=fields.text("source"),
        send_recv=_link(fields.mapping("send_recv"), f"{where}: send_recv") if "send_recv" in data else None,
    )


def _peaks(data: dict[str, Any], where: str) -> dict[str, float]:
    fields = Fields(data, where)
    fields.refuse_unknown(DTYPE_BYTES)
    if "bf16" not in data:
        raise fields.fail("bf16", "is missing: attention and activations are computed in it")
    return {dtype: fields.number(dtype, at_least=1.0) for dtype in data}


def _link(data: dict[str, Any], where: str) -> Link:
    fields = Fields(data, where)
    fields.refuse_unknown(Link.__dataclass_fields__)
    return Link(
        bandwidth_bytes_per_s=fields.number("bandwidth_bytes_per_s", at_least=1.0),
        latency_s=fields.number("latency_s"),
    )
