"""A run of 60 requests, its configuration as data to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.keys import merged

RUN: dict[str, Any] = {
    "name": "small",
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "workload": {
        "lengths": {
            "distribution": "lognormal",
            "prompt_tokens": {"median": 300, "sigma": 0.5},
            "output_tokens": {"median": 20, "sigma": 0.5},
        },
        "arrivals": {"process": "poisson", "rate_rps": 8},
        "num_requests": 60,
    },
    "slo": {"tpot_s": 0.05},
    "seed": 7,
}


def write(folder: Path, data: Any) -> str:
    """Write a configuration, as data, text or bytes, and return the file's name."""
    path = folder / "C.yaml"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path.name


def run_with(**changes: Any) -> dict[str, Any]:
    """``RUN`` with other values; ``a__b`` stands for the key ``a.b``."""
    data = RUN
    for path, value in changes.items():
        data = merged(data, path.replace("__", "."), value)
    return data
