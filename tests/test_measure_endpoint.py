"""``convoy measure`` against a small server that speaks OpenAI's streaming API."""

from __future__ import annotations

import asyncio
import csv
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from experiments.measure import prompts_of
from experiments.measured import read_measured
from traces.workload import PrefixBlocks, Workload

web = pytest.importorskip("aiohttp.web", reason="aiohttp isn't installed")

PREFILL_S, TOKEN_S = 0.05, 0.004
CONFIG = """
model: tiny-llama
device: cpu
workload:
  lengths: {distribution: uniform, prompt_tokens: [5, 50], output_tokens: [2, 8]}
  arrivals: {process: poisson, rate_rps: 400}
  num_requests: 120
"""


class FakeServer:
    """Answers every prompt with as many tokens as are asked for: the first after ``PREFILL_S`` seconds, one
    every ``TOKEN_S`` from there. Notes what was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most_open = 0
        self.fails = 0  # so many requests more are refused
        self.models = ["served"]
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _models(self, _: Any) -> Any:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _complete(self, request: Any) -> Any:
        body = await request.json()
        self.bodies.append(body)
        if self.fails:
            self.fails -= 1
            return web.json_response({"error": "too many"}, status=429)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await asyncio.sleep(PREFILL_S)
        for _ in range(body["max_tokens"]):
            await answer.write(b'data: {"choices": [{"text": "a"}]}\n\n')
            await asyncio.sleep(TOKEN_S)
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        await answer.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        self.open -= 1
        return answer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(CONFIG)
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "requests.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_request_is_sent_as_asked_and_timed(tmp_path: Path, config: Path, server: FakeServer) -> None:
    out = tmp_path / "out"
    measure = ["measure", "--endpoint", server.url, "--config", str(config), "--out", str(out), "--quiet"]
    assert main(measure) == 0
    rows = rows_of(out)
    assert len(rows) == len(server.bodies) == 120
    asked = sorted((len(body["prompt"]), body["max_tokens"]) for body in server.bodies)
    assert asked == sorted((int(row["prompt_tokens"]), int(row["output_tokens"])) for row in rows)
    assert all(body["stream"] and body["ignore_eos"] and body["model"] == "served" for body in server.bodies)
    assert server.most_open > 8  # 400 a second, each at least 58 ms: 23 on average
    for row in rows:
        tokens, ttft_s, e2e_s = int(row["output_tokens"]), float(row["ttft_s"]), float(row["e2e_s"])
        assert row["status"] == "finished"
        assert int(row["received_tokens"]) == tokens
        assert ttft_s >= PREFILL_S  # the server sleeps as long
        assert e2e_s >= max(PREFILL_S + (tokens - 1) * TOKEN_S, ttft_s)
        if tokens > 1:
            assert float(row["tpot_s"]) == pytest.approx((e2e_s - ttft_s) / (tokens - 1), abs=1e-6)
    run = read_measured(out)
    assert len(run.prompt_tokens) == 120
    assert not run.from_notice
    assert not np.isnan(run.latencies_s["ttft_s"]).any()


def test_what_was_measured_calibrates_and_is_replayed(
    tmp_path: Path, config: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, learned = tmp_path / "out", tmp_path / "learned.yaml"
    few = ["--set", "workload.num_requests=30", "--set", "predictor.source=roofline"]
    assert main(["measure", "--endpoint", server.url, "--config", str(config), "--out", str(out), *few]) == 0
    assert main(["calibrate", str(out), "--config", str(config), "--out", str(learned), *few]) == 0
    assert "predictor.host" in capsys.readouterr().out
    found = tmp_path / "found"
    status = main(["validate", str(learned), "--replay", str(out), "--out", str(found), "--quiet"])
    assert status in (0, 1)
    assert json.loads((found / "summary.json").read_text())["requests"]


def test_a_closed_loop_keeps_so_many_open(tmp_path: Path, config: Path, server: FakeServer) -> None:
    out = tmp_path / "out"
    closed = "workload.arrivals={process: closed_loop, concurrency: 7}"
    measure = [
        "measure",
        "--endpoint",
        f"{server.url}/v1",
        "--config",
        str(config),
        "--out",
        str(out),
        "--quiet",
    ]
    assert main([*measure, "--set", closed, "--set", "workload.num_requests=20"]) == 0
    assert server.most_open == 7
    assert len(rows_of(out)) == 20


def test_failures_are_told_and_kept_apart(
    tmp_path: Path, config: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fails = 3
    out = tmp_path / "out"
    measure = ["measure", "--endpoint", server.url, "--config", str(config), "--out", str(out)]
    assert main([*measure, "--set", "workload.num_requests=10"]) == 1
    assert "3 failed; the first: status 429" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["status"] for row in rows].count("rejected") == 3
    assert all(row["ttft_s"] == "" for row in rows if row["status"] == "rejected")
    assert np.isnan(read_measured(out).latencies_s["ttft_s"]).sum() == 3


@pytest.mark.parametrize(
    ("endpoint", "more", "message"),
    [
        ("localhost:8000", [], "must begin with http://"),
        ("http://127.0.0.1:9", [], "Connect"),
        ("{url}", ["--model", "other"], "the server has served, more"),
        ("{url}", [], "say which"),
    ],
)
def test_bad_addresses_and_models(
    tmp_path: Path,
    config: Path,
    server: FakeServer,
    capsys: pytest.CaptureFixture[str],
    endpoint: str,
    more: list[str],
    message: str,
) -> None:
    server.models = ["served", "more"]
    out = tmp_path / "out"
    where = endpoint.format(url=server.url)
    assert main(["measure", "--endpoint", where, "--config", str(config), "--out", str(out), *more]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_requests_that_share_blocks_share_tokens() -> None:
    prefix = PrefixBlocks(np.array([0, 2, 4]), np.array([5, 6, 5, 7], dtype=np.int32), 4)
    workload = Workload(np.array([10, 7]), np.array([1, 1]), prefix=prefix)
    one, other = (prompts_of(workload, 3, 4096)(index) for index in (0, 1))
    assert (len(one), len(other)) == (10, 7)
    assert one[:4] == other[:4]
    assert one[4:7] != other[4:7]
    assert prompts_of(workload, 3, 4096)(0) == one
    assert prompts_of(workload, 4, 4096)(0) != one
    assert all(512 <= each < 4096 for each in one + other)
