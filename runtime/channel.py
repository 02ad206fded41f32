"""The line between the engine and its ranks: pickled messages over TCP, both ends holding the same key."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping
from multiprocessing import BufferTooShort
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NamedTuple

KEY_VARIABLE = "CONVOY_KEY"  # the shared key, in hexadecimal
LIFELINE_VARIABLE = "CONVOY_LIFELINE"  # set if the end of a rank's standard input is the end of its engine
STORE_ADDRESS = "convoy/engine"  # where the engine listens, in the ranks' common store
STORE_KEY = "convoy/key"  # the shared key, for ranks that another launcher started


class Failure(NamedTuple):
    """A rank gives up: bad input, or an error of another kind."""

    message: str
    is_input: bool


class Ready(NamedTuple):
    """A rank has its weights and has met the others."""

    rank: int


class Channel:
    """One end of a line. Messages arrive whole and in order; a lost line raises EOFError or OSError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # Without it a small message may wait 40 ms for the acknowledgement of the one before.
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @staticmethod
    def to(address: tuple[str, int], key: bytes) -> Channel:
        """Call the engine that listens at ``address``."""
        return Channel(Client(address, family="AF_INET", authkey=key))

    @staticmethod
    def accept(listener: Listener) -> Channel:
        """Wait for a call."""
        connection = listener.accept()
        assert isinstance(connection, Connection)
        return Channel(connection)

    def send(self, message: Any) -> None:
        self.send_packed(pickle.dumps(message))

    def send_packed(self, message: bytes | memoryview) -> None:
        """Send what ``pickle.dumps`` made of a message; or bytes, for :meth:`receive_into`."""
        self._connection.send_bytes(message)

    def receive(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def receive_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes that were sent as they are."""
        try:
            received = self._connection.recv_bytes_into(buffer)
        except BufferTooShort as error:
            received = len(error.args[0])
        if received != len(buffer):
            raise OSError(f"{received} bytes came where {len(buffer)} were due")

    def close(self) -> None:
        self._connection.close()

    @staticmethod
    def ready(channels: Mapping[int, Channel], timeout_s: float | None) -> list[int]:
        """The ranks whose channels hold a message, or are broken; none after ``timeout_s``."""
        found = set(wait([channel._connection for channel in channels.values()], timeout_s))
        return [rank for rank, channel in channels.items() if channel._connection in found]
