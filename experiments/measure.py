"""``convoy measure``: a configuration's workload, sent to a running server that speaks OpenAI's API.

What comes back is written in the files of a run, so that ``convoy validate --replay`` and ``calibrate``
read it. Prompts are token ids drawn anew for every run, or a server that caches prefixes would know them the
second time; requests that share prefix blocks share their tokens.
"""

from __future__ import annotations

import asyncio
import csv
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.build import errors_from
from experiments.config import Config
from experiments.load import dump_yaml, load_config
from experiments.openai_client import Client, Server, Timed, base_of, find_model
from experiments.output import choose_folder, writing
from experiments.terminal import progress_bar
from experiments.text import number, seconds
from specs.errors import InputError
from specs.models import get_model
from traces.build import build_workload
from traces.metrics import describe_values
from traces.synthesis import ClosedLoop, stream
from traces.workload import PrefixBlocks, Workload

_SPECIAL = 8  # of a vocabulary's first ids one in so many is left out: those with a meaning of their own
_PREPARED_TOKENS = 20_000_000  # of prompts that are made before the clock starts
_LATE_S = 0.05  # behind its time, from which a request makes the client's slowness worth saying
_COLUMNS = (
    "request_id",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "status",
    "first_token_s",
    "finished_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "received_tokens",
    "late_s",
)


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """The options of ``convoy measure``; see ``convoy measure --help``."""

    config: Path
    endpoint: str
    model: str | None = None
    key: str | None = None
    overrides: Sequence[str] = ()
    out: str | None = None
    force: bool = False
    quiet: bool = False


def measure(options: MeasureOptions) -> int:
    """Send, wait, write and show. Returns 0; 1 if a request failed; 130 after Ctrl-C, keeping what finished.

    Raises:
        InputError: the configuration, the server's address or the folder to write; nothing has been written.
    """
    where = str(options.config)
    config = load_config(options.config, options.overrides)
    folder = choose_folder(options.out, f"{config.name}.measured", force=options.force)
    with errors_from(where):
        work = config.workload
        workload, loop = build_workload(
            work.lengths, work.arrivals, work.num_requests, work.duration_s, config.seed, Path()
        )
    base = base_of(options.endpoint)
    server = Server(base, asyncio.run(find_model(base, options.model, options.key)), options.key)
    with progress_bar(workload, None, quiet=options.quiet, live=True) as bar:
        timed, interrupted = _send_all(server, workload, loop, config, bar)
    rows = [_row(index, workload, each) for index, each in sorted(timed.items())]
    if not rows:
        raise InputError(f"{where}: interrupted before a request was sent")
    summary = _summary(rows, timed, server)
    with writing(folder, numbered=options.out is None) as (partial, final):
        _write(partial, rows, summary, config)
    if not options.quiet:
        _show(summary, final)
    if interrupted:
        return 130
    return 1 if summary["num_failed"] else 0


def prompts_of(workload: Workload, seed: int, vocabulary: int) -> Callable[[int], list[int]]:
    """Token ids of each request's prompt: alike where prefix blocks are, else drawn anew."""
    prefix, lengths = workload.prefix, workload.prompt_tokens
    ids = vocabulary // _SPECIAL, vocabulary

    def prompt(index: int) -> list[int]:
        length = int(lengths[index])
        shared = _shared(prefix, index, seed, ids)[:length] if prefix is not None else []
        own = stream(seed, f"prompt {index}").integers(*ids, length - len(shared))
        return shared + [int(each) for each in own]

    return prompt


def _shared(prefix: PrefixBlocks, index: int, seed: int, ids: tuple[int, int]) -> list[int]:
    found: list[int] = []
    for block in prefix.row(index).tolist():
        rng = stream(seed, f"block {block}")
        found += rng.integers(*ids, prefix.block_tokens).tolist()
    return found


def _send_all(
    server: Server, workload: Workload, loop: ClosedLoop | None, config: Config, bar: Any
) -> tuple[dict[int, Timed], bool]:
    """All requests as they went, and whether Ctrl-C ended it."""
    finished = 0

    def done() -> None:
        nonlocal finished
        finished += 1
        if bar is not None:
            bar(client.now_s, finished)

    prompts = prompts_of(workload, secrets.randbits(62), get_model(config.model).vocab_size)
    client = Client(server, prompts, workload.output_tokens.tolist(), done)
    totals = np.cumsum(workload.prompt_tokens, dtype=np.int64)
    client.prepare(int(np.searchsorted(totals, _PREPARED_TOKENS, side="right")))
    if loop is None:
        assert workload.arrival_s is not None
        sending = client.open_loop(workload.arrival_s.tolist())
    else:
        sending = client.closed_loop(loop.concurrency, loop.think_time_s, config.workload.duration_s)
    try:
        asyncio.run(sending)
    except KeyboardInterrupt:
        return client.timed, True
    return client.timed, False


def _row(index: int, workload: Workload, timed: Timed) -> dict[str, Any]:
    """A row of requests.csv; latencies count from when the request was really sent."""
    output = int(workload.output_tokens[index])
    e2e_s = timed.last_token_s - timed.sent_s
    ttft_s = timed.first_token_s - timed.sent_s
    finished = not timed.failure and e2e_s == e2e_s and timed.tokens > 0
    nothing = float("nan")
    return {
        "request_id": index,
        "arrival_s": timed.sent_s if timed.sent_s == timed.sent_s else timed.due_s,
        "prompt_tokens": int(workload.prompt_tokens[index]),
        "output_tokens": output,
        "status": "finished" if finished else ("rejected" if timed.failure else "unfinished"),
        "first_token_s": timed.first_token_s,
        "finished_s": timed.last_token_s if finished else nothing,
        "ttft_s": ttft_s,
        "tpot_s": (e2e_s - ttft_s) / (timed.tokens - 1) if finished and timed.tokens > 1 else nothing,
        "e2e_s": e2e_s if finished else nothing,
        "received_tokens": timed.tokens,
        "late_s": max(timed.sent_s - timed.due_s, 0.0),
    }


def _summary(rows: list[dict[str, Any]], timed: dict[int, Timed], server: Server) -> dict[str, Any]:
    summary: dict[str, Any] = {"endpoint": server.base, "served_model": server.model}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        if found := describe_values(np.array([row[name] for row in rows])):
            summary[name] = found
    failures = [each.failure for _, each in sorted(timed.items()) if each.failure]
    finished = [row for row in rows if row["status"] == "finished"]
    summary |= {
        "num_requests": len(rows),
        "num_finished": len(finished),
        "num_failed": len(failures),
        "wrong_lengths": sum(row["received_tokens"] != row["output_tokens"] for row in finished),
        "most_late_s": float(np.nanmax([0.0, *(row["late_s"] for row in rows)])),
    }
    if failures:
        summary["first_failure"] = failures[0]
    return summary


def _write(folder: Path, rows: list[dict[str, Any]], summary: dict[str, Any], config: Config) -> None:
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    text = json.dumps(summary, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    with (folder / "requests.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if value != value else f"{value:.9f}"
    return value


def _show(summary: dict[str, Any], folder: Path) -> None:
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        if name in summary:
            values = "  ".join(
                f"{key} {seconds(summary[name][key])}" for key in ("mean", "p50", "p90", "p99")
            )
            print(f"{name.removesuffix('_s').upper()}  {values}")
    print(f"{summary['num_finished']:,} of {summary['num_requests']:,} requests finished")
    if summary["num_failed"]:
        print(f"{summary['num_failed']:,} failed; the first: {summary['first_failure']}")
    if summary["wrong_lengths"]:
        print(f"{summary['wrong_lengths']:,} answers had another number of tokens than was asked for")
    if summary["most_late_s"] > _LATE_S:
        late = number(summary["most_late_s"])
        print(f"The client was up to {late} s late: it is too slow for this load, and so are the latencies")
    print(f"Written to {folder}")
