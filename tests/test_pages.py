"""Every page in a real browser: nothing loaded, nothing complained of, all plots there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.cli import main
from experiments.compare import config_changes
from tests.browser import Browser, find_browser

FIXED = {"distribution": "fixed", "output_tokens": 50}
CONFIG: dict[str, Any] = {
    "name": "pages",
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "predictor": {"source": "roofline"},
    "scheduler": {"priority": "fcfs", "chunking": "static"},
    "workload": {
        "lengths": {
            "distribution": "mixture",
            "components": [
                {"weight": 0.9, "slo_class": "chat", **FIXED, "prompt_tokens": 500},
                {"weight": 0.1, "slo_class": "long", **FIXED, "prompt_tokens": 4000},
            ],
        },
        "arrivals": {"process": "poisson", "rate_rps": 6.0},
        "num_requests": 80,
    },
    "slo": {"ttft": 0.5, "tpot_s": 0.05},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, another, their comparison, a sweep, a plan and a capacity search."""
    root = tmp_path_factory.mktemp("pages")
    plain = _write(root / "plain.yaml")
    lars = ["--set", "scheduler.priority=lars", "--set", "scheduler.chunking=adaptive"]
    assert main(["run", str(plain), "--out", str(root / "run"), "--quiet"]) == 0
    assert main(["run", str(plain), "--out", str(root / "other"), "--quiet", "--no-plots", *lars]) == 0
    assert (
        main(["compare", str(root / "run"), str(root / "other"), "--out", str(root / "compare"), "--quiet"])
        == 0
    )
    rates = {"scheduler.priority": ["fcfs", "lars"], "workload.arrivals.rate_rps": [5, 20], "seed": [0, 1]}
    grid = _write(root / "grid.yaml", sweep=rates)
    assert main(["sweep", str(grid), "--out", str(root / "sweep"), "--jobs", "1", "--quiet"]) == 0
    settings = {"min_seeds": 2, "max_seeds": 2, "precision": 0.5}
    small = {"gpus": 2, "tp": [1], "spp": [1], "attainment": 0.9, "traffic": [1.5]}
    plan = _write(root / "plan.yaml", plan=small, capacity=settings)
    assert main(["plan", str(plan), "--out", str(root / "plan"), "--jobs", "1", "--quiet"]) == 0
    search = _write(root / "capacity.yaml", capacity={**settings, "attainment": 0.9})
    assert main(["capacity", str(search), "--out", str(root / "capacity"), "--jobs", "1", "--quiet"]) == 0
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def _write(path: Path, **more: Any) -> Path:
    path.write_text(yaml.safe_dump({**CONFIG, **more}))
    return path


PAGES = [("run", 5), ("compare", 3), ("sweep", 4), ("plan", 3), ("plan/choice", 5), ("capacity", 1)]


@pytest.mark.parametrize(("name", "plots"), PAGES, ids=[name for name, _ in PAGES])
@pytest.mark.parametrize(("width", "mobile"), [(1100, False), (390, True)], ids=["desktop", "phone"])
def test_the_page_is_whole_on_its_own(
    folder: Path, browser: Browser, name: str, plots: int, width: int, mobile: bool
) -> None:
    seen = browser.open(folder / name / "report.html", width, mobile=mobile)
    assert seen.requests == [] and seen.complaints == []
    images = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) == plots
    assert all(complete and natural > 100 and 100 < shown <= width for complete, natural, shown in images)
    # Wide tables scroll within their frame, the page doesn't.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    first = browser.evaluate("document.querySelector('.verdict').getBoundingClientRect().top")
    assert 0 <= first < 300
    links = browser.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert links and all((folder / name / link).is_file() for link in links)


def test_the_browser_notices_what_it_is_to_notice(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='gone.png'><script>console.error('oh'); nothing()</script>")
    seen = browser.open(page)
    assert any(url.endswith("gone.png") for url in seen.requests)
    assert any("oh" in text for text in seen.complaints) and len(seen.complaints) >= 2


# -- compare and the sweep's page, without a browser -------------------------------------------------------


def test_a_comparison_says_what_both_runs_say(folder: Path) -> None:
    found = json.loads((folder / "compare/compare.json").read_text())
    a, b = (json.loads((folder / name / "summary.json").read_text()) for name in ("run", "other"))
    ttft = found["metrics"]["ttft_s.p99"]
    assert (ttft["a"], ttft["b"]) == (a["ttft_s"]["p99"], b["ttft_s"]["p99"])
    assert ttft["change"] == pytest.approx(b["ttft_s"]["p99"] / a["ttft_s"]["p99"] - 1)
    assert found["configuration"]["scheduler.priority"] == {"a": "fcfs", "b": "lars"}
    assert found["same_requests"]["requests"] == 80
    phases = [found["metrics"][f"phases_s.{name}"]["a"] for name in ("queue", "prefill", "decode")]
    assert sum(phases) == pytest.approx(a["e2e_s"]["mean"])


def test_a_run_compared_with_itself_differs_in_nothing(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "run")
    assert main(["compare", run, run, "--out", str(tmp_path / "same"), "--no-plots", "--quiet"]) == 0
    found = json.loads((tmp_path / "same/compare.json").read_text())
    assert all(each["change"] in (0, None) for each in found["metrics"].values())
    assert found["configuration"] == {}
    assert found["same_requests"]["earlier_in_a"] == found["same_requests"]["earlier_in_b"] == 0


def test_changes_of_a_configuration() -> None:
    assert config_changes({"a": 1, "b": 2, "name": "x"}, {"b": 3, "c": 4}) == {
        "a": (1, None),
        "b": (2, 3),
        "c": (None, 4),
    }


@pytest.mark.parametrize(
    ("first", "expected"),
    [("nowhere", "holds no run"), ("sweep", "holds no run"), ("broken", "aren't those")],
)
def test_what_is_no_run_cant_be_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, expected: str
) -> None:
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "summary.json").write_text("{}")
    (broken / "requests.csv").write_text("a,b\n1,2\n")
    status = main(["compare", str(folder / first), str(folder / "run"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2 and expected in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_sweep_shows_means_over_seeds(folder: Path) -> None:
    import pandas as pd

    frame = pd.read_csv(folder / "sweep/results.csv")
    best = frame.groupby(["scheduler.priority", "workload.arrivals.rate_rps"])["slo_attainment"].mean().max()
    html = (folder / "sweep/report.html").read_text()
    assert f"{100 * best:.1f} %" in html or best == 1.0
    assert html.count("data:image/png") == 4
