"""A trained predictor as plain data: `predictor.npz`, without pickle, bound to the tables it learned from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.coverage import part_used
from profiler.formulas import make_physics
from profiler.operators import MAX_RESIDUAL, LearnedState, OperatorModel
from profiler.overheads import (
    HOST_RATES,
    SERVING_RATES,
    HostOverhead,
    LayerCorrection,
    ServingOverhead,
)
from profiler.physics import Physics
from profiler.tables import Profile, check_hash
from specs.devices import DeviceSpec
from specs.errors import InputError
from specs.input_files import Fields

FORMAT = 1
FILE = "predictor.npz"
MAX_BYTES = 16 << 20  # unpacked; a shipped one is under 100 kB
_QUANTILES = ("p05", "p50", "p95")
_ARRAYS: dict[str, type[np.generic]] = {
    "inducing": np.float32,
    "weights": np.float32,
    "low": np.float64,
    "high": np.float64,
    "families": np.int64,
    "reach": np.float64,
}


@dataclass(frozen=True, slots=True)
class Predictor:
    """Fitted operators of one profile, keyed `<operator>_<dtype>`.

    `residuals` holds, for each, the 5th, 50th and 95th percentile of log(measured ÷ predicted) over
    held-out rows: the stuff of prediction intervals. `host`, `layer`, `serving` and `stage_gap` are there if
    they were measured.
    """

    operators: Mapping[str, OperatorModel]
    residuals: Mapping[str, tuple[float, float, float]]
    host: HostOverhead | None = None
    layer: LayerCorrection | None = None
    serving: ServingOverhead | None = None
    stage_gap: HostOverhead | None = None


def save_predictor(path: Path, profile: Profile, device: DeviceSpec, predictor: Predictor) -> None:
    """Write `path`, reproducibly."""
    header: dict[str, Any] = {
        "format": FORMAT,
        "device": device.name,
        "device_figures": device_figures(device),
        "tables": {info.key: info.sha256 for info in profile.tables},
        "operators": {},
    }
    for name, host in (("host", predictor.host), ("stage_gap", predictor.stage_gap)):
        if host is not None:
            header[name] = {rate: getattr(host, rate) for rate in HOST_RATES}
    if predictor.layer is not None:
        layer = predictor.layer
        header["layer"] = {
            "base_s": layer.base_s,
            "share": layer.share,
            "p05": layer.interval[0],
            "p95": layer.interval[1],
        }
    if predictor.serving is not None:
        header["serving"] = {name: getattr(predictor.serving, name) for name in SERVING_RATES}
    arrays: dict[str, NDArray[Any]] = {}
    for key, model in predictor.operators.items():
        state = model.state_
        header["operators"][key] = {
            "parameters": dict(state.parameters),
            "length_scale": state.length_scale,
            "noise": state.noise,
            "has_prefix": state.has_prefix,
            "residuals": dict(zip(_QUANTILES, predictor.residuals[key], strict=True)),
        }
        for name, dtype in _ARRAYS.items():
            arrays[f"{key}.{name}"] = np.asarray(getattr(state, name), dtype=dtype)
    text = json.dumps(header, sort_keys=True).encode()
    arrays["header"] = np.frombuffer(text, dtype=np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_predictor(profile: Profile, device: DeviceSpec, path: Path | None = None) -> Predictor:
    """Read a profile's predictor (or the one at `path`) and check that it belongs to it.

    Raises:
        InputError: missing, malformed, too large, of another version, device or set of tables.
    """
    path = path or profile.path / FILE
    again = f"run `convoy train {profile.path}`"
    if not path.is_file():
        raise InputError(f"{path}: no predictor; {again}")
    arrays = _read_arrays(path)
    fields = Fields(_read_header(path, arrays), f"{path}: header")
    if (version := fields.integer("format")) != FORMAT:
        raise InputError(
            f"{path}: predictor format {version}; this version of Convoy reads {FORMAT}; {again}"
        )
    if (name := fields.text("device")) != device.name or profile.device != device.name:
        raise InputError(f"{path}: trained for device {name!r}, not for {device.name!r}")
    if fields.text("device_figures") != device_figures(device):
        raise InputError(f"{path}: trained with other data-sheet figures of {device.name}; {again}")
    if fields.mapping("tables") != {info.key: info.sha256 for info in profile.tables}:
        raise InputError(f"{path}: trained on other tables than {profile.path} holds; {again}")
    for info in profile.tables:
        check_hash(profile.path / info.file, info.sha256)
    entries = fields.mapping("operators")
    operators, residuals = {}, {}
    part = part_used(device, profile.threads)
    for info in profile.tables:
        if info.key not in entries:
            continue
        entry = Fields(Fields(entries, str(path)).mapping(info.key), f"{path}: {info.key}")
        model = OperatorModel(make_physics(part, info.operator, info.dtype, profile.cached_bytes))
        model.state_ = _state(path, info.key, entry, model.physics, arrays)
        operators[info.key] = model
        residuals[info.key] = _quantiles(entry, f"{path}: {info.key}")
    return Predictor(
        operators,
        residuals,
        host=_host(fields, "host", path),
        layer=_layer(fields, path),
        serving=_serving(fields, path),
        stage_gap=_host(fields, "stage_gap", path),
    )


def _host(header: Fields, what: str, path: Path) -> HostOverhead | None:
    if not header.has(what):
        return None
    fields = Fields(header.mapping(what), f"{path}: {what}")
    rates = {name: fields.number(name) for name in HOST_RATES if fields.has(name)}
    return HostOverhead(**rates, source="measured")


def _serving(header: Fields, path: Path) -> ServingOverhead | None:
    if not header.has("serving"):
        return None
    fields = Fields(header.mapping("serving"), f"{path}: serving")
    return ServingOverhead(**{name: fields.number(name) for name in SERVING_RATES if fields.has(name)})


def _layer(header: Fields, path: Path) -> LayerCorrection | None:
    if not header.has("layer"):
        return None
    fields = Fields(header.mapping("layer"), f"{path}: layer")
    base_s, share, low, high = (
        fields.number(name, at_least=-1e3) for name in ("base_s", "share", "p05", "p95")
    )
    return LayerCorrection(base_s, share, (low, high))


def device_figures(device: DeviceSpec) -> str:
    """Hash of the data-sheet figures that the formulas use; a price may change without retraining."""
    figures = {
        "peak_flops": dict(sorted(device.peak_flops.items())),
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
        "num_sms": device.num_sms,
        "l2_bytes": device.l2_bytes,
        "kernel_launch_s": device.kernel_launch_s,
        "intra_node": [device.intra_node.bandwidth_bytes_per_s, device.intra_node.latency_s],
    }
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise InputError(f"{path}: unpacks to {size} bytes; a predictor has at most {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a predictor file of plain arrays ({reason})") from None


def _read_header(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    try:
        header = json.loads(arrays["header"].tobytes())
    except (KeyError, ValueError):
        raise InputError(f"{path}: has no readable header, so it is not a predictor") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header must be a mapping")
    return header


def _state(
    path: Path, key: str, entry: Fields, physics: Physics, arrays: Mapping[str, NDArray[Any]]
) -> LearnedState:
    values = Fields(entry.mapping("parameters"), f"{path}: {key}: parameters")
    if missing := [name for name in physics.parameters if not values.has(name)]:
        raise InputError(
            f"{path}: {key} has no parameter {missing[0]}, so it is of an older version; run "
            f"`convoy train {path.parent}`"
        )
    parameters = {name: values.number(name) for name in physics.parameters}
    parts: dict[str, NDArray[Any]] = {}
    for name, dtype in _ARRAYS.items():
        array = arrays.get(f"{key}.{name}")
        if array is None or array.dtype != dtype or not np.all(np.isfinite(array)):
            raise InputError(f"{path}: array '{key}.{name}' is missing or not finite {np.dtype(dtype).name}")
        parts[name] = array
    width = len(parts["low"])
    one_shape = {column: np.ones(1) for column in physics.columns}
    if (
        physics.features(one_shape).shape[1] != width
        or parts["high"].shape != (width,)
        or parts["weights"].ndim != 1
        or parts["inducing"].shape != (len(parts["weights"]), width)
        or parts["families"].ndim != 1
        or len(parts["families"]) == 0
        or parts["reach"].shape != (len(parts["families"]), 2)
    ):
        raise InputError(f"{path}: arrays of '{key}' don't fit together")
    return LearnedState(
        parameters=parameters,
        length_scale=entry.number("length_scale", at_least=1e-3),
        noise=entry.number("noise"),
        has_prefix=entry.boolean("has_prefix"),
        **parts,
    )


def _quantiles(entry: Fields, where: str) -> tuple[float, float, float]:
    quantiles = Fields(entry.mapping("residuals"), f"{where}: residuals")
    low, middle, high = (quantiles.number(name, at_least=-MAX_RESIDUAL * 10) for name in _QUANTILES)
    return low, middle, high
