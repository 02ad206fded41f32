"""Starts a process for each rank, watches over them, and ends them all when one fails.

On one machine the engine starts every rank itself. Under torchrun (on one machine or several) the process of
rank 0 is the engine, starts its own rank, and the other processes become ranks: see :func:`start_executor`.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import torch
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

from runtime import worker
from runtime.channel import KEY_VARIABLE, LIFELINE_VARIABLE, STORE_ADDRESS, STORE_KEY, Channel, Failure, Ready
from runtime.executors import Executor, LocalExecutor, StageDone
from runtime.model import check_model
from runtime.plan import Plan
from runtime.runner import Report, RunnerSpec
from specs.errors import InputError

_GRACE_S = 5.0  # for a process to end by itself
_HEARING_S = 0.5  # for the others to say what they know of a failure


class RankError(RuntimeError):
    """A rank died, hung or gave up; the message is one line."""


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_executor(spec: RunnerSpec, *, port: int = 0) -> Executor:
    """A runner in this process if one rank is enough, else a process for each rank.

    Under torchrun only the process of rank 0 returns from here; the others work for it and then exit.
    """
    if under_torchrun() and int(os.environ["RANK"]) != 0:
        worker.main()
        raise SystemExit(0)
    if spec.ranks == 1 and not under_torchrun():
        return LocalExecutor(spec)
    return RankExecutor(spec, port=port)


class RankExecutor:
    """Executes plans on ranks in processes of their own.

    Args:
        spec: what they run.
        port: for the ranks to meet; 0 takes a free one. Under torchrun it is torchrun's.

    Raises:
        InputError: torchrun started another number of ranks, the port is taken, there are too few GPUs, or a
            rank says that its input is bad.
        RankError: a rank failed to start.
    """

    def __init__(self, spec: RunnerSpec, *, port: int = 0) -> None:
        check_model(spec.model, spec.parallel)
        self.spec = spec
        self.num_stages = spec.parallel.spp
        self._children: dict[int, _Child] = {}
        self._channels: dict[int, Channel] = {}
        self._ranks_of_stage = spec.ranks // self.num_stages
        self._flights: dict[int, _Flight] = {}  # by plan, the oldest first
        self._done: deque[StageDone] = deque()
        try:
            self._start(port)
        except BaseException:
            self._end()
            raise

    # -- what the engine calls --------------------------------------------------------------------------

    def submit(self, plan: Plan) -> None:
        """Send a plan to all ranks."""
        message = pickle.dumps(plan)
        self._flights[plan.id] = _Flight(time.monotonic(), set(self._channels))
        for rank, channel in list(self._channels.items()):
            try:
                channel.send_packed(message)
            except OSError:
                self._lost(rank)

    def wait(self, timeout_s: float | None = None) -> StageDone | None:
        """The next stage that is through with a plan; None after ``timeout_s``."""
        until_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not self._done:
            oldest = next(iter(self._flights.items()), None)
            hung_s = oldest[1].submitted_s + self.spec.timeout_s if oldest is not None else float("inf")
            left_s = max(min(until_s, hung_s) - time.monotonic(), 0.0)
            ready = Channel.ready(self._channels, left_s if left_s < float("inf") else None)
            if not ready and oldest is not None and time.monotonic() >= hung_s:
                self._hung(*oldest)
            if not ready and time.monotonic() >= until_s:
                return None
            for rank in ready:
                self._take(rank, self._receive(rank))
        return self._done.popleft()

    def close(self) -> None:
        """Let the ranks end; those that don't are killed."""
        for channel in self._channels.values():
            with suppress(OSError):
                channel.send(None)
        self._end(grace_s=_GRACE_S)

    # -- start ------------------------------------------------------------------------------------------

    def _start(self, port: int) -> None:
        spec, environment = self.spec, os.environ
        torchrun = under_torchrun()
        world = int(environment["WORLD_SIZE"]) if torchrun else spec.ranks
        if world != spec.ranks:
            raise InputError(
                f"parallel: tp {spec.parallel.tp} × spp {spec.parallel.spp} × kvp {spec.parallel.kvp} needs "
                f"{spec.ranks} ranks, and torchrun started {world}"
            )
        if spec.device == "cuda" and not torchrun and torch.cuda.device_count() < spec.ranks:
            raise InputError(
                f"parallel: {spec.ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}"
            )
        host = environment["MASTER_ADDR"] if torchrun else "127.0.0.1"
        self._store = _store(host, port, torchrun)
        key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET", backlog=world, authkey=key)
        self._store.set(STORE_ADDRESS, f"{host}:{self._listener.address[1]}")
        if torchrun:
            self._store.set(STORE_KEY, key.hex())
        for rank in [0] if torchrun else range(world):
            place: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            place |= {"MASTER_ADDR": host, "MASTER_PORT": self._store.port, KEY_VARIABLE: key.hex()}
            self._children[rank] = _Child(place)
        self._meet(world)

    def _meet(self, world: int) -> None:
        """Wait until every rank has called, and then until it is ready."""
        calls: SimpleQueue[Channel] = SimpleQueue()
        threading.Thread(target=_answer, args=(self._listener, calls), daemon=True).start()
        until_s = time.monotonic() + worker.START_TIMEOUT_S
        packed = pickle.dumps(self.spec)
        while len(self._channels) < world:
            try:
                channel = calls.get(timeout=0.1)
                rank = channel.receive()
                channel.send_packed(packed)
                self._channels[rank] = channel
            except (Empty, EOFError, OSError):
                missing = sorted(set(range(world)) - self._channels.keys())
                for rank in missing:
                    if rank in self._children and self._children[rank].process.poll() is not None:
                        self._lost(rank)
                if time.monotonic() > until_s:
                    self._fail(f"{_names(missing)} did not start within {worker.START_TIMEOUT_S:.0f} s")
        waiting = dict(self._channels)
        while waiting:
            ready = Channel.ready(waiting, max(until_s - time.monotonic(), 0.0))
            if not ready:
                self._fail(f"{_names(sorted(waiting))} not ready within {worker.START_TIMEOUT_S:.0f} s")
            for rank in ready:
                message = self._receive(rank)
                if isinstance(message, Failure):
                    self._gave_up(rank, message)
                assert isinstance(message, Ready)
                del waiting[rank]

    # -- reports ----------------------------------------------------------------------------------------

    def _receive(self, rank: int) -> Any:
        try:
            return self._channels[rank].receive()
        except (EOFError, OSError):
            return self._lost(rank)

    def _take(self, rank: int, message: Report | Failure) -> None:
        if isinstance(message, Failure):
            self._gave_up(rank, message)
            return
        flight = self._flights[message.plan]
        flight.silent.discard(rank)
        flight.reports[rank] = message
        while flight.stage < self.num_stages:  # a later stage may be heard before an earlier one
            ranks = range(flight.stage * self._ranks_of_stage, (flight.stage + 1) * self._ranks_of_stage)
            if not flight.silent.isdisjoint(ranks):
                return
            self._done.append(StageDone.of(flight.stage, [flight.reports[rank] for rank in ranks]))
            flight.stage += 1
        del self._flights[message.plan]

    # -- failures ---------------------------------------------------------------------------------------

    def _gave_up(self, rank: int, failure: Failure) -> None:
        """A rank says why it can't go on. If another one died or had bad input, that is the reason: the
        others only lose their lines to it."""
        failures, lost = {rank: failure}, []
        others = {other: channel for other, channel in self._channels.items() if other != rank}
        until_s = time.monotonic() + _HEARING_S
        while others and (ready := Channel.ready(others, max(until_s - time.monotonic(), 0.0))):
            for other in ready:
                try:
                    message = others[other].receive()
                except (EOFError, OSError):
                    message = None
                    lost.append(other)
                if isinstance(message, Failure):
                    failures[other] = message
                if message is None or isinstance(message, Failure):
                    del others[other]
        for each in failures.values():
            if each.is_input:
                self._end()
                raise InputError(each.message)
        if lost:
            self._lost(lost[0])
        self._fail(f"rank {rank} failed: {failure.message}")

    def _lost(self, rank: int) -> None:
        """The line to a rank is broken."""
        if rank not in self._children:
            self._fail(f"rank {rank} is gone: the line to it broke")
        self._fail(f"rank {rank} died: {self._children[rank].last_words()}")

    def _hung(self, plan: int, flight: _Flight) -> None:
        """The oldest batch takes too long: the first stage that is silent holds it up."""
        first = sorted(rank for rank in flight.silent if rank // self._ranks_of_stage == flight.stage)
        self._fail(f"{_names(first)} gave no answer to batch {plan} within {self.spec.timeout_s:g} s")

    def _fail(self, message: str) -> None:
        self._end()
        raise RankError(message)

    def _end(self, grace_s: float = 0.0) -> None:
        """Leave no process behind."""
        until_s = time.monotonic() + grace_s
        for child in self._children.values():
            child.end(max(until_s - time.monotonic(), 0.0))
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._children.clear()
        listener = getattr(self, "_listener", None)
        if listener is not None:
            listener.close()


@dataclass(slots=True)
class _Flight:
    """A plan under way."""

    submitted_s: float
    silent: set[int]  # ranks that haven't answered
    reports: dict[int, Report] = field(default_factory=dict)
    stage: int = 0  # the first one that isn't through with it


class _Child:
    """The process of a rank on this machine, in a process group of its own."""

    def __init__(self, place: Mapping[str, object]) -> None:
        environment = dict(os.environ) | {name: str(value) for name, value in place.items()}
        environment[LIFELINE_VARIABLE] = "stdin"
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.worker"],
            env=environment,
            stdin=subprocess.PIPE,  # nothing is ever written; it ends when this process does, however that is
            stderr=self._errors,
            start_new_session=True,
        )

    def last_words(self) -> str:
        """How the process ended, in a line."""
        try:
            code = self.process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            return "it closed its line"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit status {code}" + (f" ({lines[-1].strip()})" if lines else "")

    def end(self, grace_s: float) -> None:
        """Wait so long for the process to end, then kill it with all it started."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=grace_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._errors.close()


def _store(host: str, port: int, torchrun: bool) -> TCPStore:
    """Where the ranks meet; hosted here unless torchrun's agent does."""
    if torchrun:
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=not hosted, wait_for_workers=False)
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    except DistNetworkError:
        raise InputError(f"port {port} is in use; name another one, or 0 for any that is free") from None


def _answer(listener: Listener, calls: SimpleQueue[Channel]) -> None:
    """Accept calls until the listener is closed; whoever hasn't the key is turned away."""
    while True:
        try:
            calls.put(Channel.accept(listener))
        except AuthenticationError:
            continue
        except (OSError, EOFError):
            return


def _names(ranks: list[int]) -> str:
    return ("ranks " if len(ranks) != 1 else "rank ") + ", ".join(map(str, ranks))
