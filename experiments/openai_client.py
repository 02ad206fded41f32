"""Requests to an OpenAI-compatible server, streamed and timed by the wall clock: thousands open at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specs.errors import InputError

_HOW_TO_INSTALL = "measuring a server needs aiohttp; in Convoy's folder: pip install -e '.[measure]'"
_DATA = b"data:"


@dataclass(slots=True)
class Timed:
    """One request as it went. Seconds since the run began; NaN where it didn't get that far.

    Attributes:
        due_s: when it should have been sent.
        tokens: output tokens the server counted, or pieces of text it sent if it doesn't count.
        failure: why it failed, in one line; empty if it didn't.
    """

    due_s: float
    sent_s: float = float("nan")
    first_token_s: float = float("nan")
    last_token_s: float = float("nan")
    tokens: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go: the address up to `/v1`, the name of the model, and a key if one is needed."""

    base: str
    model: str
    key: str | None = None
    timeout_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {"Content-Type": "application/json"} | key


def base_of(endpoint: str) -> str:
    """The address up to `/v1`.

    Raises:
        InputError: it isn't one of HTTP.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise InputError(f"--endpoint {endpoint}: must begin with http:// or https://")
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


async def find_model(base: str, wanted: str | None, key: str | None) -> str:
    """The name of the model that a server has: the one wanted, or the only one.

    Raises:
        InputError: the server can't be reached, doesn't answer as it should, or has no such model.
    """
    aiohttp = _aiohttp()
    url = f"{base}/models"
    try:
        async with (
            aiohttp.ClientSession(
                headers=Server(base, "", key).headers, timeout=aiohttp.ClientTimeout(total=30)
            ) as session,
            session.get(url) as answer,
        ):
            answer.raise_for_status()
            names = [str(each["id"]) for each in (await answer.json())["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise InputError(f"--endpoint {url}: {type(error).__name__}: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"--endpoint {url}: doesn't answer with a list of models, as OpenAI's API does"
        ) from None
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"--model {wanted}: the server has {', '.join(names) or 'none'}")
        return wanted
    if len(names) != 1:
        raise InputError(f"--model: the server has {', '.join(names) or 'none'}; say which")
    return names[0]


class Client:
    """Sends prompts as token ids and notes when tokens come back.

    Args:
        server: where to.
        prompts: called with a request's index, gives its token ids.
        output_tokens: of each request; the server is asked for exactly so many.
        done: called after each request.
    """

    def __init__(
        self,
        server: Server,
        prompts: Callable[[int], Sequence[int]],
        output_tokens: Sequence[int],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._prompts, self._output_tokens = server, prompts, output_tokens
        self._done = done
        self._session: Any = None
        self._began_s = 0.0
        self._ready: dict[int, bytes] = {}
        self.timed: dict[int, Timed] = {}

    def prepare(self, requests: int) -> None:
        """Make the bodies of the first requests before the clock starts."""
        self._ready = {index: self._body(index) for index in range(requests)}

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._began_s

    async def open_loop(self, arrival_s: Sequence[float]) -> None:
        """Send each request at its time, whatever the server does."""
        async with self._connected():
            await asyncio.gather(*(self._at(index, due_s) for index, due_s in enumerate(arrival_s)))

    async def closed_loop(self, concurrency: int, think_time_s: float, until_s: float | None) -> None:
        """Clients that each send the next request a think time after their last answer."""
        left = iter(range(len(self._output_tokens)))

        async def client() -> None:
            for index in left:
                if until_s is not None and self.now_s >= until_s:
                    return
                await self._send(index, self.now_s)
                await asyncio.sleep(think_time_s)

        async with self._connected():
            await asyncio.gather(*(client() for _ in range(concurrency)))

    def _connected(self) -> Any:
        aiohttp = _aiohttp()
        timeout = aiohttp.ClientTimeout(total=None, sock_read=self._server.timeout_s, sock_connect=60)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._server.headers, timeout=timeout, read_bufsize=1 << 20
        )
        self._began_s = time.perf_counter()
        return self._session

    async def _at(self, index: int, due_s: float) -> None:
        await asyncio.sleep(max(due_s - self.now_s, 0.0))
        await self._send(index, due_s)

    async def _send(self, index: int, due_s: float) -> None:
        aiohttp = _aiohttp()
        timed = self.timed[index] = Timed(due_s)
        body = self._ready.pop(index, None) or self._body(index)
        timed.sent_s = self.now_s
        try:
            async with self._session.post(f"{self._server.base}/completions", data=body) as answer:
                if answer.status != 200:
                    text = " ".join((await answer.text())[:200].split())
                    timed.failure = f"status {answer.status}: {text}"
                    return
                await self._read(answer.content, timed)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            timed.failure = " ".join(f"{type(error).__name__}: {error}".split())
        finally:
            self._done()
        if not timed.failure and timed.tokens == 0:
            timed.failure = "no token came back"

    def _body(self, index: int) -> bytes:
        tokens = self._output_tokens[index]
        body = {
            "model": self._server.model,
            "prompt": list(self._prompts(index)),
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    async def _read(self, lines: AsyncIterator[bytes], timed: Timed) -> None:
        """Note the times of a stream of server-sent events."""
        pieces = 0
        async for line in lines:
            if not line.startswith(_DATA):
                continue
            data = line[len(_DATA) :].strip()
            if data == b"[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                timed.failure = f"the server says: {str(event['error'])[:200]}"
                return
            if event.get("choices"):
                now_s = self.now_s
                if pieces == 0:
                    timed.first_token_s = now_s
                timed.last_token_s = now_s
                pieces += 1
            if event.get("usage"):
                timed.tokens = int(event["usage"].get("completion_tokens", 0))
        timed.tokens = timed.tokens or pieces


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise InputError(_HOW_TO_INSTALL) from None
    return aiohttp
