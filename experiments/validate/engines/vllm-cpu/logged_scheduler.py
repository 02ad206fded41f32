"""vLLM's scheduler, with a log of what it has had computed: one line an iteration.

For `vllm serve --scheduler-cls logged_scheduler.LoggedScheduler`, with this file's folder on PYTHONPATH and
CONVOY_ITERATIONS naming the file to write: the form that `experiments.measured.read_iterations` reads. It
runs inside the server and imports nothing of Convoy. Lines are written when nothing is left to do.

An iteration lasts from one call of `schedule` to the next, if there is still work; else until its output is
in. It is the scheduler without asynchronous scheduling, which vLLM doesn't have on CPUs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

_COLUMNS = (
    "start_s",
    "sum_prefill_tokens",
    "num_prefill_requests",
    "sum_prefill_kv_tokens",
    "num_decode_requests",
    "sum_decode_kv_tokens",
    "latency_ms",
)


class LoggedScheduler(Scheduler):
    """Decides as vLLM does, and writes down what."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._path = Path(os.environ["CONVOY_ITERATIONS"])
        self._path.write_text(",".join(_COLUMNS) + "\n", encoding="utf-8")
        self._lines: list[str] = []
        self._last: tuple[float, list[int]] | None = None

    def schedule(self, *args: Any, **keywords: Any) -> Any:
        now_s = time.perf_counter()
        self._end(now_s)
        output = super().schedule(*args, **keywords)
        if output.total_num_scheduled_tokens:
            self._last = now_s, self._contents(output)
        return output

    def update_from_output(self, *args: Any, **keywords: Any) -> Any:
        found = super().update_from_output(*args, **keywords)
        if not self.has_unfinished_requests():
            self._end(time.perf_counter())
            self._write()
        return found

    def _contents(self, output: Any) -> list[int]:
        """Of prefills the tokens, their number and the tokens before them; of decodes the latter two."""
        before = {each.req_id: each.num_computed_tokens for each in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sums = [0] * 5
        for name, tokens in output.num_scheduled_tokens.items():
            context = before[name]
            if tokens > 1 or context < self.requests[name].num_prompt_tokens:  # or recomputed
                sums[0] += tokens
                sums[1] += 1
                sums[2] += context
            else:
                sums[3] += 1
                sums[4] += context
        return sums

    def _end(self, now_s: float) -> None:
        if self._last is None:
            return
        start_s, sums = self._last
        self._last = None
        cells = [f"{start_s:.6f}", *map(str, sums), f"{(now_s - start_s) * 1e3:.4f}"]
        self._lines.append(",".join(cells) + "\n")

    def _write(self) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._lines)
        self._lines.clear()
