"""The process of one rank: ``python -m runtime.worker``, started by the engine or by torchrun.

Its place in the world comes from the environment, in torchrun's words (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). It calls the engine, is told what to run, and then executes plan after plan. When
the line to the engine breaks it ends at once, whatever it is doing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from queue import SimpleQueue

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from runtime.channel import KEY_VARIABLE, LIFELINE_VARIABLE, STORE_ADDRESS, STORE_KEY, Channel, Failure, Ready
from runtime.cores import keep_to_own_cores
from runtime.distributed import Mesh
from runtime.plan import Plan
from runtime.runner import Runner, RunnerSpec
from specs.errors import InputError

START_TIMEOUT_S = 600.0  # for reading weights and for meeting the others


def main() -> None:
    """Run this process's rank to the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    if LIFELINE_VARIABLE in os.environ:
        threading.Thread(target=_follow_the_engine, daemon=True).start()
    rank = int(os.environ["RANK"])
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # Without it gloo takes the address of the host's name, which need not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=START_TIMEOUT_S),
    )
    host, _, port = store.get(STORE_ADDRESS).decode().rpartition(":")
    key = os.environ.get(KEY_VARIABLE) or store.get(STORE_KEY).decode()
    channel = Channel.to((host, int(port)), bytes.fromhex(key))
    channel.send(rank)
    spec: RunnerSpec = channel.receive()
    try:
        _work(rank, spec, store, channel)
    except InputError as error:
        _give_up(channel, Failure(str(error), is_input=True))
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        _give_up(channel, Failure(f"{type(error).__name__}: {text}", is_input=False))


def _work(rank: int, spec: RunnerSpec, store: Store, channel: Channel) -> None:
    if spec.device == "cuda":
        spec = replace(spec, device=f"cuda:{os.environ['LOCAL_RANK']}")
    if spec.device == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        keep_to_own_cores(int(os.environ["LOCAL_RANK"]), here, spec.threads)
    mesh = Mesh(spec.parallel, rank)
    runner = Runner(spec, mesh)
    mesh.connect(PrefixStore("ranks", store), runner.device, spec.timeout_s)
    channel.send(Ready(rank))
    plans: SimpleQueue[Plan | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, plans), daemon=True).start()
    while (plan := plans.get()) is not None:
        channel.send(runner.run(plan))
    mesh.disconnect()


def _follow_the_engine() -> None:
    """End when standard input does, as it does with the engine; above all before there is a line to it."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _listen(channel: Channel, plans: SimpleQueue[Plan | None]) -> None:
    """Put plans in the queue as they come; None ends it."""
    try:
        while True:
            plan: Plan | None = channel.receive()
            plans.put(plan)
            if plan is None:
                return
    except (EOFError, OSError):
        os._exit(1)  # the engine is gone, and the main thread may be waiting for a rank that is, too


def _give_up(channel: Channel, failure: Failure) -> None:
    """Tell the engine, and end without waiting for threads of torch that may never finish."""
    try:
        channel.send(failure)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
