"""``convoy paper``: its figures, what it keeps, and what it makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from experiments.config import Config
from experiments.paper.claims import compare, load_claims
from experiments.paper.document import _section
from experiments.paper.figures import PaperCell, PaperFigure, _mixtures, figure_names, load_figure
from experiments.paper.measures import _of_requests, measure_prediction
from experiments.paper.results import NotThere, Results
from experiments.paper.ring_steps import needed_s, step_losses_s
from experiments.text import number
from policies.scheduler import SchedulerSettings
from sim.cluster import Setup, simulate
from tests.fakes import LinearCost
from traces.readers import read_trace
from traces.synthesis import sample_lengths
from traces.workload import Workload

SHARED = Path(os.environ.get("CONVOY_SHARED", Path(__file__).parent.parent.parent / "shared"))
CLAIMS = {claim.id: claim for claim in load_claims()}


def results(name: str, *cells: tuple[dict[str, object], dict[str, object] | None]) -> dict[str, Results]:
    made = tuple(PaperCell(labels, "runs", {}, str(place)) for place, (labels, _) in enumerate(cells))
    figure = PaperFigure(name, name, "", made, frozenset())
    return {name: Results(figure, tuple(summary for _, summary in cells))}


@pytest.mark.parametrize("name", figure_names())
def test_every_figure_has_cells_that_can_be_computed(name: str) -> None:
    figure = load_figure(name)
    assert figure.cells
    assert all(isinstance(cell.work, Config) == (cell.kind == "runs") for cell in figure.cells)
    labels = [tuple(cell.labels.values()) for cell in figure.cells]
    assert len(set(labels)) == len(labels)


def test_claims_are_all_there_and_name_figures_that_exist() -> None:
    assert list(CLAIMS) == [f"P{i}" for i in range(1, 19)]
    names = {name for claim in CLAIMS.values() for name in claim.figures.split(", ")}
    assert names - {"section 4.1"} <= set(figure_names())


def test_mixtures_have_the_statistics_of_the_traces_they_stand_in_for() -> None:
    path = SHARED / "traces" / "medha_mix_5pct.csv.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set CONVOY_SHARED to the folder that holds traces/")
    trace = read_trace(path)
    prompts, outputs = sample_lengths(_mixtures()["medha_mix_5pct"], 200_000, np.random.default_rng(0))
    long, long_of_trace = prompts >= 100_000, trace.prompt_tokens >= 100_000
    assert long.mean() == pytest.approx(long_of_trace.mean(), rel=0.03)
    for ours, theirs in ((long, long_of_trace), (~long, ~long_of_trace)):
        for q in (0.25, 0.5, 0.75, 0.9):
            expected = np.quantile(trace.prompt_tokens[theirs], q)
            assert np.quantile(prompts[ours], q) == pytest.approx(expected, rel=0.05)
        assert outputs[ours].mean() == pytest.approx(trace.output_tokens[theirs].mean(), rel=0.05)
        # The work of attention goes by the square.
        squares, expected = prompts[ours] ** 2.0, (trace.prompt_tokens[theirs] ** 2.0).mean()
        assert squares.mean() == pytest.approx(expected, rel=0.05)


def test_a_trace_that_is_missing_is_replaced_by_its_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from where ../shared leads nowhere
    figure = load_figure("13")
    assert figure.stands_in == {"medha_mix_5pct"}
    work = figure.cells[0].work
    assert isinstance(work, Config)
    assert work.workload.lengths["distribution"] == "mixture"


def test_who_has_no_first_token_counts_with_its_wait() -> None:
    """One at a time, 1 s each, the clock stops at 2.5 s: TTFT 1 and 2 s; the third has waited 2.5 s."""
    work = Workload(np.full(3, 100, np.int32), np.full(3, 1, np.int32), arrival_s=np.zeros(3))
    policy = SchedulerSettings(chunking="whole", max_batch_requests=1)
    records = simulate(work, Setup(LinearCost(token_s=0.01), 10_000, policy, stop_s=2.5))
    found = _of_requests(records, np.ones(3, dtype=np.bool_))
    assert (found["requests"], found["finished"], found["without_first_token"]) == (3, 2, 1)
    assert found["ttft_finished_s"]["max"] == pytest.approx(2.0)
    assert found["ttft_all_s"]["p50"] == pytest.approx(2.0)
    assert found["ttft_all_s"]["max"] == pytest.approx(2.5)


def test_bandwidth_utilization_by_hand() -> None:
    """A decode of 8B on one H100: (weights + 1,000 tokens · 128 KiB) ÷ (3.35 TB/s · time)."""
    found = measure_prediction(
        {"model": "llama-3-8b", "device": "h100-sxm", "decodes": 1, "context": 1000, "tp": 1}
    )
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    num_bytes = 2 * (32 * layer + 128256 * 4096) + 1000 * 2 * 2 * 1024 * 32
    assert found["mbu"] == pytest.approx(num_bytes / (3.35e12 * found["total_s"]), rel=1e-6)
    assert found["total_s"] >= found["floor_s"] >= num_bytes / 3.35e12 * 0.999


def test_claims_are_computed_from_what_was_found() -> None:
    found = compare(
        results("7a", ({"kvp": 1}, {"total_s": 0.05}), ({"kvp": 2}, {"total_s": 0.03})), CLAIMS["P7"]
    )
    assert found is not None
    assert found.ratio == pytest.approx(0.4 / 0.4)
    assert "33 tokens/s" in found.text
    cells = [
        ({"chunks": name}, {"long": {"ttft_all_s": {"p50": x}}, "mixed_batch_s": {"p95": y}})
        for name, x, y in (("static 1", 10, 1), ("static 2", 5, 3), ("adaptive", 6, 1))
    ]
    found = compare(results("4", *cells), CLAIMS["P9"])
    assert found is not None
    assert found.text.startswith("1 of 2 static sizes")


def test_what_a_step_would_have_to_take() -> None:
    """CP on 16 ranks takes 3.5 s where the paper has 1.64 · 4 s: 3.06 s over 32 layers and 16 steps. Measured
    elsewhere: 10.95 s on 4 where a quarter of the time on one is 10.5025, over 126 layers and 4 steps."""
    assert needed_s(3.5, 4.0, 1.64, 16) == pytest.approx(3.06 / 512)
    losses = step_losses_s(Results(load_figure("5d"), (None,) * 6))
    assert list(losses) == [2, 4, 8, 16]
    assert losses[4] == pytest.approx((10.95 - 10.5025) / (126 * 4))


def test_what_others_measured_stands_beside() -> None:
    """Ours twice as long in every cell."""
    figure = load_figure("5d")
    summaries = tuple({"total_s": 2 * (cell.published or 0.0)} for cell in figure.cells)
    lines = list(_section(Results(figure, summaries), {"prefill (s)": ("total_s", number)}, plots=False))
    assert lines[2] == "| tokens | cp | prefill (s) | measured (s) | here ÷ measured |"
    assert lines[5] == f"| 128K | 2 | {number(42.084)} | {number(21.042)} | {number(2.0)} |"
    assert all(cell.published for cell in figure.cells)
    assert not any(cell.published for cell in load_figure("5b").cells)


def test_a_claim_without_its_cells_is_not_computed() -> None:
    assert compare({}, CLAIMS["P7"]) is None
    assert compare(results("7a", ({"kvp": 1}, {"total_s": 0.05}), ({"kvp": 2}, None)), CLAIMS["P7"]) is None
    with pytest.raises(NotThere):
        results("7a", ({"kvp": 1}, {"total_s": 0.05}))["7a"].get("total_s", kvp=4)


def test_what_is_computed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "paper"
    arguments = ["paper", "--only", "7a", "6b", "--out", str(out), "--jobs", "1"]
    assert main([*arguments, "--doc", str(tmp_path / "doc.md")]) == 0
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(cells) == 4
    assert (out / "fig7a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "doc.md").read_text()
    assert "](fig7a.png)" in (out / "paper.md").read_text() and "](fig" not in text
    assert "| P7 | 7a |" in text and "| P8 | 6b |" in text
    (out / "fig7a.png").unlink()
    next(iter(cells)).unlink()  # as if it had been killed before
    assert main([*arguments, "--as-is"]) == 0
    assert len(list((out / "cells").iterdir())) == len(cells) - 1
    assert main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert again.keys() == cells.keys()
    assert sum(again[path] != at for path, at in cells.items()) == 1
    assert (out / "fig7a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "7c"], "no such figure; did you mean '7"),
        (["--out", "{full}"], "holds no figures of Convoy"),
        (["--doc", "{full}/nowhere/paper.md"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something").write_text("else")
    assert main(["paper", *(part.format(full=tmp_path) for part in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
