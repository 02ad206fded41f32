"""Under which conditions something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def versions() -> dict[str, str]:
    """Versions of what the times depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def gpu_state(index: int = 0) -> dict[str, str]:
    """Clocks, temperature and power of a GPU now; empty where `nvidia-smi` isn't."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", f"--id={index}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY, (value.strip() for value in answer.split(",")), strict=False))


def cpu_state() -> dict[str, str]:
    """Name and clock of the processor, and the load of the machine, now; what can't be read is absent."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "cpu MHz"):
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if hasattr(os, "getloadavg"):
        found["load average"] = f"{os.getloadavg()[0]:.2f}"
    return found


def state(device: torch.device) -> dict[str, str]:
    """What can be read of the device's condition now."""
    return gpu_state(device.index or 0) if device.type == "cuda" else cpu_state()


def git_commit() -> str | None:
    """The commit of the source that measures, with + if it was changed; None outside a repository."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def today() -> str:
    """The date, as profiles have it."""
    return datetime.now(UTC).date().isoformat()


def describe(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_state().get("model name", platform.processor() or platform.machine())
