"""Collectives between ranks in processes of their own: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from profiler.measure.points import Point
from profiler.measure.timing import Samples
from runtime.distributed import Mesh
from specs import ParallelSpec
from specs.errors import InputError

OPERATORS = ("all_reduce", "all_gather", "send_recv")
START_TIMEOUT_S = 60.0
VISIT_TIMEOUT_S = 60.0
_WARM_UP = 3


def possible_ranks(device: torch.device) -> tuple[int, ...]:
    """Numbers of ranks that can be run here: two on CPUs, powers of two up to all GPUs."""
    if not dist.is_available():
        return ()
    if device.type == "cpu":
        return (2,)
    count = torch.cuda.device_count()
    return tuple(2**i for i in range(1, count.bit_length()) if 2**i <= count)


class Ranks:
    """Processes that meet once and then time collectives on command.

    Raises:
        InputError: they didn't come up.
    """

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (rank, count, port, device.type, dtype, there)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            self._connections.append(here)
            self._processes.append(process)
        try:
            self._answers(START_TIMEOUT_S)
        except InputError:
            self.close()
            raise

    def time(self, point: Point, visit_s: float) -> Samples:
        """Seconds of one collective on its slowest rank: the mean over samples.

        Not the median, since an iteration waits for each of many: when ranks have to wake each other, one in
        a few takes several times as long as the others.
        """
        for connection in self._connections:
            connection.send((point.operator, point["num_bytes"], visit_s))
        slowest = np.max(self._answers(VISIT_TIMEOUT_S), axis=0)
        return Samples(float(slowest.mean()), float(slowest.std() / len(slowest) ** 0.5), len(slowest))

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()

    def _answers(self, timeout_s: float) -> list[list[float]]:
        answers = []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(timeout_s):
                    raise InputError(f"rank {rank} gave no answer for {timeout_s:g} s")
                answer = connection.recv()
            except (EOFError, OSError):
                raise InputError(f"rank {rank} ended") from None
            if isinstance(answer, str):
                raise InputError(f"rank {rank}: {answer}")
            answers.append(answer)
        return answers


def _rank_main(rank: int, count: int, port: int, kind: str, dtype: torch.dtype, connection: Any) -> None:
    """A rank: meets the others, answers, and times what it is told to until it is told nothing."""
    try:
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(1)
        mesh = Mesh(ParallelSpec(tp=count), rank)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, count, is_master=rank == 0
        )
        mesh.connect(store, device, START_TIMEOUT_S)
        connection.send([])
        while (command := connection.recv()) is not None:
            operator, num_bytes, visit_s = command
            x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
            connection.send(_time(operator, x, mesh, visit_s))
        mesh.disconnect()
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _time(operator: str, x: Tensor, mesh: Mesh, visit_s: float) -> list[float]:
    """Seconds of each sample on this rank; all ranks take as many."""

    def once() -> None:
        if operator == "all_reduce":
            mesh.all_reduce(x)
        elif operator == "all_gather":
            mesh.gather_columns(x[None])
        else:
            _there_and_back(x, mesh.rank)

    began_s = time.perf_counter()
    for _ in range(_WARM_UP):
        once()
    _wait(x)
    # Rank 0 decides for everybody how often: the clocks of the ranks differ.
    plan = torch.tensor([visit_s / max((time.perf_counter() - began_s) / _WARM_UP, 1e-6)], device=x.device)
    dist.broadcast(plan, 0)
    samples = int(min(max(float(plan), 5.0), 400.0))
    times = []
    for _ in range(samples):
        dist.barrier()
        _wait(x)
        began_s = time.perf_counter()
        once()
        _wait(x)
        times.append((time.perf_counter() - began_s) / (2 if operator == "send_recv" else 1))
    return times


def _there_and_back(x: Tensor, rank: int) -> None:
    """From rank 0 to rank 1 and back; the others look on."""
    if rank == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif rank == 1:
        dist.recv(x, 0)
        dist.send(x, 0)


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
