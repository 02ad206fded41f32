"""Collectives between ranks in processes of their own: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import math
import multiprocessing
import socket
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from profiler.measure.points import Point
from profiler.measure.timing import CORE, Samples, keep_freed_memory
from runtime.cores import keep_to_own_cores
from runtime.distributed import Mesh
from runtime.stage_line import StageLine
from specs import ParallelSpec
from specs.errors import InputError

OPERATORS = ("all_reduce", "all_gather", "send_recv")
START_TIMEOUT_S = 60.0
VISIT_TIMEOUT_S = 60.0
_WARM_UP = 3
_TOGETHER = 8  # calls between two looks at whether the cores run at their usual speed
_MOST_CALLS = 800


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
        """Seconds of one collective on its slowest rank: the median over calls, as for any other operator.

        The calls count during which every rank's core ran at its usual speed.
        """
        for connection in self._connections:
            connection.send((point.operator, point["num_bytes"], visit_s))
        answers = self._answers(VISIT_TIMEOUT_S)
        calls = np.max([times for times, _ in answers], axis=0).reshape(-1, _TOGETHER)
        quiet = np.all([quiet for _, quiet in answers], axis=0)
        # Disturbances only ever add time, so of disturbed calls the quickest are the nearest to the truth.
        found = calls[quiet].ravel() if np.sum(quiet) >= 3 else np.sort(calls, axis=None)[: calls.size // 2]
        low, high = np.quantile(found, [0.25, 0.75])
        return Samples(float(np.median(found)), float(high - low) / 2, len(found))

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

    def _answers(self, timeout_s: float) -> list[Any]:
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
        else:
            keep_to_own_cores(rank, count)
            keep_freed_memory()
        torch.set_num_threads(1)
        mesh = Mesh(ParallelSpec(tp=count), rank)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, count, is_master=rank == 0
        )
        mesh.connect(store, device, START_TIMEOUT_S)
        line = None
        if kind == "cpu" and rank < 2:
            line = (StageLine.answer if rank else StageLine.call)(store, "send_recv")
        connection.send([])
        while (command := connection.recv()) is not None:
            operator, num_bytes, visit_s = command
            x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
            connection.send(_time(operator, x, mesh, line, visit_s))
        mesh.disconnect()
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _time(
    operator: str, x: Tensor, mesh: Mesh, line: StageLine | None, visit_s: float
) -> tuple[list[float], list[bool]]:
    """Seconds of each call on this rank, all make as many; for every few, whether the core was quiet."""

    def once() -> None:
        if operator == "all_reduce":
            mesh.all_reduce(x)
        elif operator == "all_gather":
            mesh.gather_columns(x[None])
        else:
            _there_and_back(x, mesh.rank, line)

    began_s = time.perf_counter()
    for _ in range(_WARM_UP):
        once()
    _wait(x)
    # Rank 0 decides for everybody how often: the clocks of the ranks differ.
    plan = torch.tensor([visit_s / max((time.perf_counter() - began_s) / _WARM_UP, 1e-6)], device=x.device)
    dist.broadcast(plan, 0)
    groups = math.ceil(min(max(float(plan), 4.0 * _TOGETHER), _MOST_CALLS) / _TOGETHER)
    times, quiet = [], [_is_quiet(x)]
    for i in range(groups * _TOGETHER):
        dist.barrier()
        _wait(x)
        began_s = time.perf_counter()
        once()
        _wait(x)
        times.append((time.perf_counter() - began_s) / (2 if operator == "send_recv" else 1))
        if (i + 1) % _TOGETHER == 0:
            quiet.append(_is_quiet(x))
    return times, [before and after for before, after in pairwise(quiet)]


def _is_quiet(x: Tensor) -> bool:
    return x.device.type == "cuda" or CORE.is_quiet()


def _there_and_back(x: Tensor, rank: int, line: StageLine | None) -> None:
    """From rank 0 to rank 1 and back, as activations go from stage to stage; the others look on."""
    if line is not None and rank == 0:
        line.send(x)
        line.receive(x)
    elif line is not None:
        line.receive(x)
        line.send(x)
    elif rank == 0:
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
