"""What a run looks like: series, plots, report and timeline, from records made by hand."""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import series, timeline
from experiments.plots import TITLES, draw_plots
from experiments.renderer import Renderer
from experiments.report import ClassRow, ReportFacts, render_report, verdict
from experiments.series import plot_data
from experiments.text import number, percent, seconds
from experiments.timeline import write_timeline
from policies.slo import Slo, TtftTarget
from traces.metrics import summarize
from traces.records import Recorder, RunRecords

SLOS = (Slo(TtftTarget(0.0, 0.5), 0.05), Slo(TtftTarget(1.5, 0.5), None))


def records_of(n: int = 200, replicas: int = 2, stages: int = 2, batches: int = 300) -> RunRecords:
    """``n`` requests of two classes, one a second; batch i runs from i to i + 0.5 s, later by stage."""
    recorder = Recorder(n, ("chat", "<script>alert(1)</script>"))
    for i in range(n):
        recorder.arrival(i, float(i), 100 + i, 11, i % 2, i % replicas)
        recorder.progress(i, i + 0.1, i + 0.1 + 0.01 * (i + 1), 0.5, 0)
        recorder.finish(i, i + 1.1 + 0.01 * (i + 1))
    for i in range(batches):
        for replica in range(replicas):
            for stage in range(stages):
                start = float(i) + 0.5 * stage
                row = (start, start + 0.5, replica, stage, i, 1, 1, 512, 10 * replica, 2 + 2 * replica, 50)
                recorder.batch(row)
    recorder.work.iterations = batches
    return recorder.records(replicas=replicas, kv_capacity_blocks=100, block_tokens=16, end_s=float(batches))


def nothing() -> RunRecords:
    """A run that was interrupted before anything happened."""
    return Recorder(5).records(replicas=1, kv_capacity_blocks=10, block_tokens=16, end_s=0.0)


def facts(**changes: Any) -> ReportFacts:
    values: dict[str, Any] = {
        "name": "a run",
        "model": "<b>model</b>",
        "device": "H100",
        "gpus": 2,
        "layout": "2 replicas",
        "load": "poisson",
        "classes": [ClassRow("chat", "TTFT", "100", "99 %", ["1 s", "2 s", "3 s", "", ""])],
        "notes": ["a note & more"],
        "config_yaml": "name: x\n",
        "version": "1",
    }
    return ReportFacts(**(values | changes))


def size_of_png(image: bytes) -> tuple[int, int]:
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert image[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", image[16:24])
    return width, height


# -- series -----------------------------------------------------------------------------------------------


def test_cdfs_are_by_class_and_end_at_one() -> None:
    data = plot_data(records_of(), SLOS)
    assert [curve.label for curve in data.ttft] == ["chat", "<script>alert(1)</script>"]
    chat = data.ttft[0]
    assert chat.shares[-1] == 1.0
    assert chat.values[-1] == pytest.approx(0.1 + 0.01 * 199)
    assert np.all(np.diff(chat.values) >= 0)
    assert [curve.target_s for curve in data.ttft] == [0.5, None]  # the other one grows with the prompt
    assert [curve.target_s for curve in data.tpot] == [0.05, None]


def test_a_cdf_of_many_is_thinned_without_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    full = plot_data(records_of(3000), SLOS).ttft[0]
    monkeypatch.setattr(series, "CDF_POINTS", 50)
    thin = plot_data(records_of(3000), SLOS).ttft[0]
    assert len(full.values) == 1000
    assert len(thin.values) == 50
    for value, share in zip(thin.values, thin.shares, strict=True):
        assert np.interp(value, full.values, full.shares) == pytest.approx(share, abs=2e-3)


def test_thinning_the_scatter_keeps_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "SCATTER_POINTS", 40)
    records = records_of(1000)
    scatter = plot_data(records, SLOS).scatter
    assert (len(scatter.ttft_s), scatter.total) == (40, 1000)
    assert set(np.sort(records.ttft_s)[-10:]) <= set(scatter.ttft_s)


def test_the_timeline_has_means_over_time_and_replicas() -> None:
    shown = plot_data(records_of(), SLOS).timeline
    assert shown is not None
    middle = slice(10, -10)
    assert shown.waiting[middle] == pytest.approx(3.0)  # 2 on one replica, 4 on the other
    assert shown.waiting_low[middle] == pytest.approx(2.0)
    assert shown.waiting_high[middle] == pytest.approx(4.0)
    assert shown.kv_share[middle] == pytest.approx(0.5)
    busy = shown.decode_tokens[~np.isnan(shown.decode_tokens)]
    assert busy == pytest.approx(5.0)  # 0 and 10, over busy time only: nothing runs half of the time
    assert np.nanmean(shown.prefill_tokens) == pytest.approx(512)


# -- plots ------------------------------------------------------------------------------------------------


def test_every_plot_is_a_png_of_its_own() -> None:
    images = draw_plots(plot_data(records_of(), SLOS))
    assert list(images) == list(TITLES)
    assert len(set(images.values())) == 5
    for image in images.values():
        width, height = size_of_png(image)
        assert width > 600
        assert height > 300
        assert len(image) > 8_000


def test_plots_are_the_same_for_the_same_run() -> None:
    data = plot_data(records_of(), SLOS)
    assert draw_plots(data) == draw_plots(data)


def test_without_data_there_are_no_plots() -> None:
    assert draw_plots(plot_data(nothing(), SLOS)) == {}


def test_requests_all_alike_can_be_drawn() -> None:
    records = records_of(3, replicas=1, stages=1, batches=1)
    for name in ("first_token_s", "finished_s", "arrival_s"):
        records.requests[name] = np.full(3, 1.0)
    records.requests["prompt_tokens"] = np.full(3, 5)
    assert len(draw_plots(plot_data(records, SLOS))) == 5


# -- report -----------------------------------------------------------------------------------------------


def page(records: RunRecords, **changes: Any) -> str:
    images = draw_plots(plot_data(records, SLOS))
    plots = [(TITLES[stem], image) for stem, image in images.items()]
    return render_report(summarize(records, tpot_targets_s=[0.05, None]), facts(**changes), plots)


def test_the_report_needs_nothing_from_outside() -> None:
    html = page(records_of())
    without_images = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe|url\(", without_images)
    assert "default-src 'none'" in html
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 5
    for source in sources:
        size_of_png(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True))


def test_the_report_leads_with_the_answer() -> None:
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page(records_of()), flags=re.S)
    first = text.index("of requests met their SLOs")
    assert text.index("Misses its SLOs") < first < text.index("TTFT, median") < text.index("Latency")
    assert "simulated within" in text


def test_what_users_write_is_escaped() -> None:
    row = ClassRow("<script>alert(1)</script>", "", "1", "", [""] * 5)
    html = page(records_of(), classes=[row], config_yaml="name: <img src=x>\n")
    assert "<script" not in html
    assert "<b>model" not in html
    assert "<img src=x" not in html
    assert "&lt;b&gt;model&lt;/b&gt;" in html
    assert "a note &amp; more" in html


def test_a_run_of_nothing_has_a_report() -> None:
    html = page(nothing())
    assert "No request was served" in html
    assert "<img" not in html


@pytest.mark.parametrize(
    ("attainment", "finished", "kind"),
    [(0.995, 100, "good"), (0.95, 100, "fair"), (0.5, 100, "bad"), (1.0, 90, "good")],
)
def test_verdicts(attainment: float, finished: int, kind: str) -> None:
    summary = {"slo_attainment": attainment, "num_requests": 100, "num_finished": finished}
    assert verdict(summary)[0] == kind
    assert ("10 of 100 requests did not finish" in verdict(summary)[2]) == (finished == 90)


def test_the_process_renders_what_it_is_given(tmp_path: Path) -> None:
    records = records_of()
    with Renderer(plots=True) as renderer:
        renderer.start(tmp_path, summarize(records), facts(), plot_data(records, SLOS))
        renderer.finish()
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(TITLES)
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 5


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    records = records_of()
    with Renderer(plots=True) as renderer:
        renderer.start(tmp_path / "nowhere", summarize(records), facts(), plot_data(records, SLOS))
        with pytest.raises(RuntimeError, match=r"the report could not be made: .*nowhere"):
            renderer.finish()


# -- timeline ---------------------------------------------------------------------------------------------


def events_of(path: Path) -> list[dict[str, Any]]:
    loaded = json.loads(path.read_text())
    events: list[dict[str, Any]] = loaded["traceEvents"]
    return events


def test_the_timeline_shows_every_batch_where_it_ran(tmp_path: Path) -> None:
    assert write_timeline(records_of(), tmp_path / "t.json") is None
    events = events_of(tmp_path / "t.json")
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 300 * 2 * 2
    assert {(event["pid"], event["tid"]) for event in slices} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    one = next(
        event for event in slices if event["args"]["batch"] == 7 and event["pid"] == 1 and event["tid"] == 1
    )
    assert (one["ts"], one["dur"], one["name"]) == (7.5e6, 0.5e6, "mixed")
    assert one["args"] == {"batch": 7, "steps": 1, "prefills": 1, "prefill_tokens": 512, "decodes": 10}
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"replica 0", "replica 1"}
    assert {event["name"] for event in events if event["ph"] == "C"} == {
        "waiting requests",
        "KV blocks in use",
    }


def test_the_phases_of_a_request_follow_each_other(tmp_path: Path) -> None:
    write_timeline(records_of(), tmp_path / "t.json")
    mine = [
        event
        for event in events_of(tmp_path / "t.json")
        if event.get("cat") == "request" and event["id"] == 3
    ]
    assert [(event["ph"], event["name"]) for event in mine] == [
        *(
            ("b", "waiting"),
            ("e", "waiting"),
            ("b", "prefill"),
            ("e", "prefill"),
            ("b", "decode"),
            ("e", "decode"),
        )
    ]
    times = [event["ts"] for event in mine]
    assert times == sorted(times)
    assert times[1] == times[2]


def test_slices_of_a_track_never_overlap(tmp_path: Path) -> None:
    records = records_of()
    ends = np.cumsum(np.random.default_rng(1).exponential(0.0123456789, 1200))
    records.batches["start_s"] = np.concatenate([[0.0], ends[:-1]])
    records.batches["end_s"] = ends
    for name in ("replica", "stage"):
        records.batches[name] = np.zeros_like(records.batches[name])
    write_timeline(records, tmp_path / "t.json")
    slices = sorted((e["ts"], e["dur"]) for e in events_of(tmp_path / "t.json") if e["ph"] == "X")
    assert len(slices) == 1200
    for (start, length), (following, _) in itertools.pairwise(slices):
        assert round(1000 * start) + round(1000 * length) <= round(1000 * following)


def test_a_long_timeline_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SLICES", 100)
    monkeypatch.setattr(timeline, "MAX_SAMPLES", 10)
    monkeypatch.setattr(timeline, "MAX_REQUESTS", 5)
    cut = write_timeline(records_of(), tmp_path / "t.json")
    assert cut is not None
    assert "the first 100 of 1,200 batches" in cut
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["cut"] == cut
    kinds = Counter(event["ph"] for event in events_of(tmp_path / "t.json"))
    assert (kinds["X"], kinds["C"], kinds["b"]) == (100, 20, 15)


def test_the_limits_add_up_to_what_browsers_take() -> None:
    most = timeline.MAX_SLICES + 2 * timeline.MAX_SAMPLES + 6 * timeline.MAX_REQUESTS
    assert most <= 50_000


def test_an_empty_timeline_is_still_one(tmp_path: Path) -> None:
    assert write_timeline(nothing(), tmp_path / "t.json") is None
    assert {event["ph"] for event in events_of(tmp_path / "t.json")} == {"M"}


# -- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0 s"), (1.5e-5, "15.0 µs"), (0.0123, "12.3 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s")),
        *((4.567, "4.57 s"), (99.96, "100 s"), (1234.5, "1,230 s"), (1e-9, "1.00 ns")),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *((0.0, "0 %"), (1.0, "100 %"), (0.5, "50.0 %"), (0.9999, "99.99 %")),
        *((0.9999999, "> 99.999 %"), (1e-7, "< 0.001 %")),
    ],
)
def test_a_share_is_whole_only_if_it_is(share: float, text: str) -> None:
    assert percent(share) == text


def test_numbers_have_three_figures() -> None:
    assert [number(value) for value in (0.012345, 1.2345, 12345.0, 999.9)] == [
        "0.0123",
        "1.23",
        "12,300",
        "1,000",
    ]
