"""Whole production traces through the simulator, by the configurations in ``experiments/``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.build import build
from experiments.load import load_config
from sim.cluster import simulate
from traces.metrics import summarize
from traces.records import FINISHED

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CONVOY_SHARED", ROOT.parent / "shared"))


@pytest.mark.parametrize(
    ("config", "trace", "requests"),
    [
        ("azure_conv.yaml", "AzureLLMInferenceTrace_conv.csv.gz", 19_366),
        ("mooncake_conversation.yaml", "mooncake_conversation_trace.jsonl.gz", 12_031),
    ],
)
def test_every_request_of_a_trace_is_accounted_for(config: str, trace: str, requests: int) -> None:
    path = SHARED / "traces" / trace
    if not path.exists():
        pytest.skip(f"{trace} is not there; set CONVOY_SHARED to the folder that holds traces/")
    file = ROOT / "experiments" / config
    experiment = build(load_config(file, [f"workload.lengths.trace={path}"]), str(file))
    records = simulate(experiment.workload, experiment.setup)
    summary = summarize(records)
    assert summary["num_requests"] == summary["num_finished"] == requests
    assert (records.requests["status"] == FINISHED).all()
    # No token is lost: every output token after the first is one gap between tokens.
    assert summary["tbt_s"]["count"] == int((experiment.workload.output_tokens - 1).sum())
    _check_order_of_times(records.requests)
    _check_littles_law(records.requests["arrival_s"], records.requests["finished_s"])


def _check_order_of_times(requests: dict[str, np.ndarray]) -> None:
    assert (requests["scheduled_s"] >= requests["arrival_s"] - 1e-9).all()
    assert (requests["first_token_s"] > requests["scheduled_s"]).all()
    assert (requests["finished_s"] >= requests["first_token_s"]).all()


def _check_littles_law(arrivals_s: np.ndarray, ends_s: np.ndarray) -> None:
    """L = λ·W: requests in the system, counted at 100,001 moments, against arrival rate × mean time."""
    horizon_s = ends_s.max()
    moments = np.linspace(0, horizon_s, 100_001)
    inside = np.searchsorted(arrivals_s, moments, side="right") - np.searchsorted(
        np.sort(ends_s), moments, side="right"
    )
    rate = len(arrivals_s) / horizon_s
    assert inside.mean() == pytest.approx(rate * (ends_s - arrivals_s).mean(), rel=0.01)
