"""The line between two stages on CPUs: activations over TCP, written and read by the threads that compute.

gloo moves a message only when its receiver waits for it, by threads of its own on both sides. Those get no
core while the rank that sent computes its next batch: activations came 2 to 4 ms late.
"""

from __future__ import annotations

import os
import secrets
import socket
from multiprocessing.connection import Listener

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from runtime.channel import Channel

_LOCAL = ("127.0.0.1", "localhost")


class StageLine:
    """One end of a line, for tensors of any type and shape; the other end has to know both.

    A lost line raises EOFError or OSError.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @staticmethod
    def answer(store: Store, name: str) -> StageLine:
        """Wait for whoever :meth:`call` s by this name."""
        host, key = _own_address(), secrets.token_bytes(16)
        with Listener((host, 0), family="AF_INET", authkey=key) as listener:
            store.set(name, f"{host} {listener.address[1]} {key.hex()}")
            return StageLine(Channel.accept(listener))

    @staticmethod
    def call(store: Store, name: str) -> StageLine:
        """Meet whoever :meth:`answer` s by this name, as soon as it does."""
        host, port, key = store.get(name).decode().split()
        return StageLine(Channel.to((host, int(port)), bytes.fromhex(key)))

    def send(self, x: Tensor) -> None:
        """Send ``x``, which may be overwritten then. Waits only if the system holds too much already that
        hasn't been received."""
        self._channel.send_packed(_bytes(x.contiguous()))

    def receive(self, x: Tensor) -> None:
        """Fill ``x``, which is contiguous, with what was sent next."""
        self._channel.receive_into(_bytes(x))

    def close(self) -> None:
        self._channel.close()


def _bytes(x: Tensor) -> memoryview:
    data: memoryview = x.view(-1).view(torch.uint8).numpy().data
    return data


def _own_address() -> str:
    """The address under which the other ranks reach this machine."""
    master = os.environ.get("MASTER_ADDR", _LOCAL[0])
    if master in _LOCAL:
        return _LOCAL[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing: asks the system which way it would go
        host: str = probe.getsockname()[0]
        return host
