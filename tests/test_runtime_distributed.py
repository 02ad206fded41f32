"""Many ranks against one: the same logits however the model and its KV cache are cut; and ranks that fail."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from policies.sharding import Sharding  # noqa: E402
from runtime.launcher import RankError, RankExecutor  # noqa: E402
from runtime.plan import KVGroups, Plan, Slice  # noqa: E402
from runtime.runner import Runner, RunnerSpec  # noqa: E402
from specs import ParallelSpec, get_model  # noqa: E402
from specs.errors import InputError  # noqa: E402

MODEL = replace(
    get_model("tiny-llama"),
    name="tiny",
    num_layers=3,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=256,
    attention_bias=True,
    attention_output_bias=True,
)
SPEC = RunnerSpec(MODEL, weights=11, kv_capacity_tokens=2048, keep_logits=True, timeout_s=30.0)
ROOT = Path(__file__).resolve().parent.parent
GROUP_TOKENS = 24


def cut(tp=1, spp=1, kvp=1):
    return ParallelSpec(tp=tp, spp=spp, kvp=kvp, kvp_tokens_per_group=GROUP_TOKENS)


@pytest.fixture(
    scope="module",
    params=[(2, 1, 1), (1, 3, 1), (1, 1, 3), (2, 1, 2), (1, 2, 2), (2, 2, 2)],
    ids=lambda sizes: "tp{}-spp{}-kvp{}".format(*sizes),
)
def ranks(request):
    executor = RankExecutor(replace(SPEC, parallel=cut(*request.param)))
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def single():
    return Runner(SPEC)


_next_request = iter(range(10**9))


def alone(runner, prompt, steps):
    """Tokens and logits of a request that prefills in one pass, on one rank, by itself."""
    request = next(_next_request)
    found, ids, start = [], prompt, 0
    for _ in range(steps):
        report = runner.run(Plan(0, [Slice(request, start, len(ids), len(prompt) + steps, True)], ids))
        start += len(ids)
        found.append((report.tokens[0][1], report.logits[0]))
        ids = np.array([report.tokens[0][1]])
    runner.model.cache.release(request)
    return found


class Driver:
    """Lets requests prefill in random chunks in random company, all plans in flight at once, then decode."""

    def __init__(self, executor, random, prompts, steps):
        self.executor, self.random, self.prompts, self.steps = executor, random, prompts, steps
        self.ids = [next(_next_request) for _ in prompts]
        self.homes = [random.randrange(executor.spec.parallel.kvp) for _ in prompts]
        self.found = {request: [] for request in self.ids}
        self.plans = 0

    def run(self):
        done = [0] * len(self.prompts)
        while any(d < len(p) for d, p in zip(done, self.prompts, strict=True)):
            left = [i for i, p in enumerate(self.prompts) if done[i] < len(p)]
            batch = []
            for i in self.random.sample(left, self.random.randint(1, len(left))):
                tokens = min(self.random.choice([1, 2, 7, 30, 64]), len(self.prompts[i]) - done[i])
                batch.append((i, done[i], self.prompts[i][done[i] : done[i] + tokens]))
                done[i] += tokens
            self.submit(batch)
        self.collect()
        for _ in range(self.steps - 1):
            last = [self.found[request][-1][0] for request in self.ids]
            at = [len(p) + len(self.found[r]) - 1 for p, r in zip(self.prompts, self.ids, strict=True)]
            order = self.random.sample(range(len(self.ids)), len(self.ids))
            self.submit([(i, at[i], np.array([last[i]])) for i in order])
            self.collect()
        self.submit([], freed=self.ids)
        self.collect()
        return [self.found[request] for request in self.ids]

    def submit(self, batch, freed=()):
        slices = [
            Slice(
                self.ids[i],
                start,
                len(ids),
                len(self.prompts[i]) + self.steps,
                start + len(ids) >= len(self.prompts[i]),
                self.homes[i],
            )
            for i, start, ids in batch
        ]
        tokens = np.concatenate([ids for *_, ids in batch]) if batch else np.zeros(0, dtype=np.int64)
        self.executor.submit(Plan(next(_next_request), slices, tokens, list(freed)))
        self.plans += 1

    def collect(self):
        while self.plans:
            done = self.executor.wait(30.0)
            assert done is not None
            if done.stage == self.executor.num_stages - 1:
                self.plans -= 1
                for (request, token), logits in zip(
                    done.tokens, done.logits if done.tokens else (), strict=True
                ):
                    self.found[request].append((token, logits))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    # around the borders of the shards at 24 and 48 tokens, and anywhere
    lengths=st.lists(st.sampled_from([1, 5, 23, 24, 25, 47, 48, 49, 72, 73, 100]), min_size=1, max_size=4),
)
def test_any_cut_and_any_chunking_give_the_single_pass_logits(ranks, single, seed, lengths):
    random = Random(seed)
    prompts = [np.random.default_rng(seed + i).integers(0, 256, n) for i, n in enumerate(lengths)]
    found = Driver(ranks, random, prompts, steps=3).run()
    for prompt, got in zip(prompts, found, strict=True):
        for (token, logits), (wanted_token, wanted) in zip(got, alone(single, prompt, 3), strict=True):
            np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)
            assert token == wanted_token


# -- KV groups ------------------------------------------------------------------------------------------


@given(count=st.integers(1, 5), size=st.integers(1, 50), home=st.integers(0, 4), length=st.integers(1, 300))
def test_groups_store_every_token_once_and_join_one_by_one(count, size, home, length):
    home %= count
    groups = [KVGroups(Sharding(count, size), index) for index in range(count)]
    stored = [group.stored(home, length) for group in groups]
    assert sum(stored) == length
    taking_part = groups[0].taking_part(home, groups[0].sharding.shard_of(length - 1))
    assert set(taking_part) == {i for i, tokens in enumerate(stored) if tokens}
    assert taking_part[0] == home
    # a group joins when all before it are full, and the last one has no end
    assert all(stored[group] == size for group in taking_part[:-1])


# -- failures -------------------------------------------------------------------------------------------


def plan_of(tokens, id=0):
    return Plan(id, [Slice(0, 0, tokens, 1500, True)], np.zeros(tokens, dtype=np.int64))


def pids(executor):
    return [child.process.pid for child in executor._children.values()]


def assert_gone(processes, within_s=5.0):
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        if not any(Path(f"/proc/{pid}").exists() for pid in processes):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {[pid for pid in processes if Path(f'/proc/{pid}').exists()]}")


def test_a_rank_that_dies_ends_the_run_and_is_named():
    executor = RankExecutor(replace(SPEC, parallel=cut(tp=2)))
    processes = pids(executor)
    os.kill(processes[1], signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 died: killed by SIGKILL") as caught:
        for _ in range(3):
            executor.submit(plan_of(10))
            executor.wait()
    assert "\n" not in str(caught.value)
    assert_gone(processes)


def test_a_rank_that_hangs_ends_the_run_and_is_named():
    executor = RankExecutor(replace(SPEC, parallel=cut(spp=2), timeout_s=1.0))
    processes = pids(executor)
    executor.submit(plan_of(10))
    assert [executor.wait().stage for _ in range(2)] == [0, 1]
    os.kill(processes[1], signal.SIGSTOP)
    executor.submit(Plan(7, [Slice(1, 0, 5, 9, True)], np.zeros(5, dtype=np.int64)))
    with pytest.raises(RankError, match=r"rank 1 gave no answer to batch 7 within 1 s"):
        while True:
            executor.wait()
    assert_gone(processes)


def test_bad_input_of_a_rank_is_the_engines(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config.json: names no architecture"):
        RankExecutor(replace(SPEC, weights=tmp_path, parallel=cut(spp=2)))


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use"):
            RankExecutor(replace(SPEC, parallel=cut(spp=2)), port=port)


def test_another_number_of_ranks_under_torchrun_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"tp 2 × spp 1 × kvp 1 needs 2 ranks, and torchrun started 3"):
        RankExecutor(replace(SPEC, parallel=cut(tp=2)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 4}, "parallel.tp: 4 must divide the 2 KV heads"),
        ({"spp": 4}, "parallel.spp: 4 stages are more"),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        RankExecutor(replace(SPEC, parallel=cut(**sizes)))


SCRIPT = """
import sys, time
from dataclasses import replace
import numpy as np
from tests.test_runtime_distributed import SPEC, cut, plan_of, pids
from runtime.launcher import start_executor

executor = start_executor(replace(SPEC, parallel=cut(spp=2)))
executor.submit(plan_of(40))
while (done := executor.wait()).stage == 0:
    pass
print(*pids(executor), done.tokens[0][1], flush=True)
if "wait" in sys.argv:
    time.sleep(60)
executor.close()
"""


def start_script(tmp_path, launcher, arguments=()):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_no_rank_outlives_an_engine_that_is_killed(tmp_path):
    engine = start_script(tmp_path, [], ["wait"])
    processes = [int(word) for word in engine.stdout.readline().split()[:2]]
    assert len(processes) == 2
    engine.kill()
    engine.communicate()
    assert_gone(processes)


def test_no_rank_waits_for_an_engine_that_is_killed_at_the_start():
    """Ranks that were told to meet at a port where nobody answers any more."""
    code = (
        "import os, signal; from runtime.launcher import _Child; "
        "place = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=1); "
        "print(_Child(place).process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    engine = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert engine.returncode == -signal.SIGKILL
    assert_gone([int(engine.stdout)], within_s=20.0)  # it has to import torch first


def test_the_same_script_runs_under_torchrun(tmp_path, single):
    run = start_script(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    *processes, token = (int(word) for word in out.split())
    assert len(processes) == 1  # the engine starts its own rank only
    assert token == alone(single, np.zeros(40, dtype=np.int64), 1)[0][0]
    assert_gone(processes)
