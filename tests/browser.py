"""A headless Chromium, driven over its debugging pipe: what a page does and looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 60.0


def find_browser() -> str | None:
    """The path of a browser, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was loaded: requests by URL but for data: and itself, and all complaints."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Browser:
    """Use as a context manager; ``open`` a file, then ``evaluate`` in it."""

    def __init__(self, folder: Path) -> None:
        path = find_browser()
        assert path is not None
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def take_pipes() -> None:
            os.dup2(os.dup(to_browser), 3)
            os.dup2(os.dup(from_browser), 4)

        # Pipes that could lie on 3 and 4 themselves are moved out of the way first.
        to_browser, from_browser = (_above(each, 10) for each in (to_browser, from_browser))
        self._process = subprocess.Popen(
            [
                path,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                f"--user-data-dir={folder / 'browser'}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            preexec_fn=take_pipes,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        os.set_blocking(self._in, False)
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.seen = Seen()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, page: Path, width: int = 1100, *, mobile: bool = False) -> Seen:
        """Load a file in a window ``width`` pixels wide; says what happened until it had loaded."""
        self.seen = Seen()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        url = page.resolve().as_uri()
        self._loaded = False
        self._call("Page.navigate", url=url)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._loaded:
            self._read(deadline)
        self.seen.requests = [each for each in self.seen.requests if each != url]
        return self.seen

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write a PNG image of the whole page."""
        image = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline and self._process.poll() is None, "the browser doesn't answer"
            try:
                self._buffer += os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, event: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            if not event["request"]["url"].startswith("data:"):
                self.seen.requests.append(event["request"]["url"])
        elif method == "Log.entryAdded":
            self.seen.complaints.append(event["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.seen.complaints.append(event["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.seen.complaints.append(str(event["args"]))


def _above(descriptor: int, lowest: int) -> int:
    import fcntl

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, lowest)
    os.close(descriptor)
    return moved
