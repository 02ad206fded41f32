"""The log that vLLM's scheduler writes on its own is the one that is read here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from experiments.measured import read_iterations

FILE = Path(__file__).resolve().parents[1] / "experiments/validate/engines/vllm-cpu/logged_scheduler.py"
MODULES = ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched", "vllm.v1.core.sched.scheduler")


class ScriptedScheduler:
    """Stands for vLLM's: schedules what it is told to, (request, tokens, tokens before them) each."""

    def __init__(self, steps: list[list[tuple[str, int, int]]], prompts: dict[str, int]) -> None:
        self._steps = steps
        self.requests = {name: SimpleNamespace(num_prompt_tokens=tokens) for name, tokens in prompts.items()}

    def schedule(self) -> Any:
        step = self._steps.pop(0)
        new = [SimpleNamespace(req_id=name, num_computed_tokens=context) for name, _, context in step[:1]]
        old = step[1:]
        return SimpleNamespace(
            total_num_scheduled_tokens=sum(tokens for _, tokens, _ in step),
            num_scheduled_tokens={name: tokens for name, tokens, _ in step},
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _, _ in old], num_computed_tokens=[context for _, _, context in old]
            ),
        )

    def update_from_output(self) -> None:
        return None

    def has_unfinished_requests(self) -> bool:
        return bool(self._steps)


def test_what_the_server_logs_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[MODULES[-1]], "Scheduler", ScriptedScheduler, raising=False)
    monkeypatch.setenv("CONVOY_ITERATIONS", str(tmp_path / "iterations.csv"))
    spec = importlib.util.spec_from_file_location("logged_scheduler", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    steps = [
        [("a", 64, 0)],  # a chunk of a's prompt
        [("b", 6, 0), ("a", 1, 64)],  # a prompt, and the last token of another: a prefill as well
        [("a", 1, 65), ("b", 1, 6)],  # decodes
        [("c", 7, 4), ("a", 1, 66), ("b", 1, 7)],  # a prompt of which 4 tokens were cached
        [],  # nothing
    ]
    scheduler = module.LoggedScheduler(steps, {"a": 65, "b": 6, "c": 11})
    while scheduler.has_unfinished_requests():
        scheduler.schedule()
        scheduler.update_from_output()

    found = read_iterations(tmp_path / "iterations.csv")
    assert found.prefills.tolist() == [1, 2, 0, 1]
    assert found.prefill_tokens.tolist() == [64, 7, 0, 7]
    assert found.prefill_context.tolist() == [0, 64, 0, 4]
    assert found.decodes.tolist() == [0, 0, 2, 2]
    assert found.decode_context.tolist() == [0, 0, 71, 73]
    assert found.phase.tolist() == [2, 2, 0, 1]
    assert (found.time_s > 0).all()
