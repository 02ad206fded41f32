"""The ceilings of a device, measured: how fast it copies, how fast it multiplies, and on a CPU a socket."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time

import torch

from profiler.measure.timing import Call, sample
from specs.devices import DeviceSpec
from specs.models import DTYPE_BYTES

_MESSAGE_BYTES, _MESSAGES = 2 << 20, 300
_PATIENCE_S = 20.0
_RECEIVER = """
import socket, sys
port, size, count = map(int, sys.argv[1:])
with socket.create_connection(("127.0.0.1", port)) as line:
    buffer = memoryview(bytearray(size))
    for _ in range(count):
        received = 0
        while received < size:
            received += line.recv_into(buffer[received:])
        line.sendall(b".")
"""


def measure_ceilings(
    spec: DeviceSpec, device: torch.device, dtype_name: str, dtype: torch.dtype, visit_s: float
) -> dict[str, str]:
    """Bandwidth of a copy that no cache holds (bytes read and written), rate of a large matrix product and,
    on a CPU, bandwidth of a socket between two processes, each with the data sheet's beside it."""
    elements = max(8 * spec.l2_bytes, 1 << 28) // dtype.itemsize
    peak = spec.peak_flops_for(dtype_name)
    size = min(8192, max(1024, 1 << int(math.log2((peak * 0.05) ** (1 / 3)))))
    with torch.inference_mode():
        copy_s = sample(_copy(elements, dtype, device), device, visit_s).time_s
        a = torch.randn(size, size, device=device).to(dtype)
        product_s = sample(lambda i: a @ a, device, visit_s).time_s
    copied = 2.0 * elements * DTYPE_BYTES[dtype_name] / copy_s
    rate = 2.0 * size**3 / product_s
    share = copied / spec.memory_bandwidth_bytes_per_s
    found = {
        "copy": f"{copied / 1e9:.1f} GB/s ({share:.0%} of the data sheet)",
        f"matrix product of {size}³": f"{rate / 1e12:.3f} TFLOP/s ({rate / peak:.0%} of the data sheet)",
    }
    if device.type == "cpu":
        sent, link = socket_bytes_per_s(), spec.intra_node.bandwidth_bytes_per_s
        found["socket"] = f"{sent / 1e9:.1f} GB/s ({sent / link:.0%} of the data sheet)"
    return found


def socket_bytes_per_s() -> float:
    """Bytes a second of the quickest of some messages through a bare TCP socket to another process, until it
    has acknowledged them: what no collective of gloo on one machine can beat."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", _RECEIVER, str(server.getsockname()[1])]
        with subprocess.Popen([*command, str(_MESSAGE_BYTES), str(_MESSAGES)]) as receiver:
            try:
                server.settimeout(_PATIENCE_S)
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(_PATIENCE_S)
                    message, times = bytes(_MESSAGE_BYTES), list[float]()
                    for _ in range(_MESSAGES):
                        began_s = time.perf_counter()
                        connection.sendall(message)
                        connection.recv(1)
                        times.append(time.perf_counter() - began_s)
            finally:
                receiver.kill()
    return _MESSAGE_BYTES / min(times)


def _copy(elements: int, dtype: torch.dtype, device: torch.device) -> Call:
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)
