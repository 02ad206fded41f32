"""How good the predictors are, on rows they haven't seen, and that the measure is honest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from profiler.formulas import make_physics
from profiler.operators import OperatorModel
from profiler.physics import Physics
from profiler.predictor import load_predictor
from profiler.roofline import AllReduce, DecodeAttention
from profiler.tables import (
    PROFILES,
    Profile,
    Table,
    TableInfo,
    read_profile,
    read_table,
    write_profile,
    write_table,
)
from profiler.train import TrainReport, train
from specs.devices import get_device
from specs.errors import InputError

H100 = PROFILES / "h100-sxm" / "vllm-0.24.0"
BF16 = ["gemm_bf16", "prefill_attention_bf16", "decode_attention_bf16", "all_reduce_bf16"]


@pytest.fixture(scope="module")
def report() -> TrainReport:
    return train(H100, folds=3, tables=BF16)


def test_held_out_error(report: TrainReport) -> None:
    assert [entry.operator for entry in report.operators] == [name.removesuffix("_bf16") for name in BF16]
    for entry in report.operators:
        # Attention at head_dim 128; GEMM and all-reduce have none.
        errors = entry.held_out_by_head_dim.get(128, entry.held_out)
        assert errors.median <= 0.05 and errors.p90 <= 0.15, (entry.operator, str(errors))


def test_extrapolation_error(report: TrainReport) -> None:
    for entry in report.operators:
        assert entry.extrapolation
        for axis, errors in entry.extrapolation.items():
            assert errors.rows > 5
            assert errors.median <= 0.15, (entry.operator, axis, str(errors))


def test_the_residual_earns_its_place(report: TrainReport) -> None:
    for entry in report.operators:
        assert entry.held_out.median < entry.physics.median < entry.roofline.median


def test_every_row_is_counted(report: TrainReport) -> None:
    rows = {info.key: info.rows for info in read_profile(H100).tables}
    for entry in report.operators:
        assert entry.held_out.rows == entry.rows == rows[f"{entry.operator}_{entry.dtype}"]
    gemm = report.operators[0]
    assert gemm.below_floor == 49  # small matrices that stayed in L2
    assert "49 of 35742 rows are under the floor" in report.table()


def test_the_shipped_predictor_fits_its_table() -> None:
    # In-sample, so a floor under any damage to the stored arrays, not a measure of quality.
    profile = read_profile(H100)
    predictor = load_predictor(profile, get_device("h100-sxm"))
    assert set(predictor.operators) == {info.key for info in profile.tables}
    for info in profile.tables:
        table = read_table(profile, info)
        predicted = predictor.operators[info.key].predict(table.shape, cold=not info.warm)
        assert np.median(np.abs(predicted.time_s / table.time_s - 1)) < 0.06
        assert np.all(predicted.time_s >= predicted.floor_s)
        assert not predicted.extrapolated[table.time_s >= predicted.floor_s].any()
        low, middle, high = predictor.residuals[info.key]
        assert low < middle < high and -0.05 < middle < 0.05


def synthetic_profile(folder: Path, noise: float, seed: int = 0) -> Profile:
    """All-reduce times from a known law: 5 µs + bytes ÷ 300 GB/s for 2 ranks, 200 GB/s for 8."""
    rng = np.random.default_rng(seed)
    num_bytes = np.repeat(2.0 ** np.arange(10, 30), 2)
    ranks = np.tile([2.0, 8.0], 20)
    time_s = (5e-6 + num_bytes / np.where(ranks == 2, 300e9, 200e9)) * np.exp(rng.normal(0, noise, 40))
    folder.mkdir(parents=True, exist_ok=True)
    sha256, rows = write_table(
        folder, "all_reduce", "bf16", Table({"num_bytes": num_bytes, "ranks": ranks}, time_s)
    )
    info = TableInfo("all_reduce", "bf16", rows, sha256, "synthetic", "a formula", False)
    profile = Profile(folder, "h100-sxm", "measured", "2026-11-21", "MIT", {}, (), (info,))
    write_profile(profile)
    return profile


def test_a_known_law_is_recovered(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path / "law", noise=0.01)
    report = train(profile.path)
    assert report.operators[0].held_out.median < 0.03
    assert (profile.path / "predictor.npz").is_file() and report.saved
    model = load_predictor(profile, get_device("h100-sxm")).operators["all_reduce_bf16"]
    unseen = {"num_bytes": np.array([3e6, 5e4]), "ranks": np.array([8.0, 2.0])}
    assert model.predict(unseen).time_s == pytest.approx([5e-6 + 15e-6, 5e-6 + 1.7e-7], rel=0.06)


def test_held_out_rows_are_unseen(tmp_path: Path) -> None:
    # With times that follow no law at all, a report that peeked would still look good.
    profile = synthetic_profile(tmp_path / "noise", noise=1.0)
    assert train(profile.path).operators[0].held_out.median > 0.25


def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path / "twice", noise=0.05)
    first, second = tmp_path / "1.npz", tmp_path / "2.npz"
    train(profile.path, out=first)
    train(profile.path, out=second)
    assert first.read_bytes() == second.read_bytes()


def test_every_library_learns_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order differ in their last digits; numpy and scipy each bring a library."""
    threads: list[list[int]] = []

    def noting(*arguments: Any) -> Physics:
        import scipy.linalg  # noqa: F401

        threads.append([each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"])
        return make_physics(*arguments)

    monkeypatch.setattr("profiler.train.make_physics", noting)
    with threadpool_limits(limits=2):
        train(synthetic_profile(tmp_path / "one", noise=0.05).path, save=False)
    assert threads and all(set(each) == {1} for each in threads)


def test_far_away_only_physics_is_left() -> None:
    device = get_device("h100-sxm")
    physics = AllReduce(device)
    shape = {"num_bytes": 2.0 ** np.arange(10, 24), "ranks": np.full(14, 8.0)}
    wrong_s = 3 * physics.time_s(shape, physics.defaults()) * np.linspace(1, 2, 14)
    model = OperatorModel(physics).fit(shape, wrong_s, np.arange(14))
    far = {"num_bytes": np.array([2.0**45]), "ranks": np.array([8.0])}
    assert model.predict(far).time_s == pytest.approx(model.physics_only(far), rel=1e-3)
    assert model.predict(far).extrapolated.all()


def test_cold_kv_is_never_quicker_than_warm() -> None:
    physics = DecodeAttention(get_device("h100-sxm"), "bf16")
    parameters = {**physics.defaults(), "l2_speedup": 2.0}
    total = np.geomspace(1, 1e7, 200)
    ones = np.ones(200)
    shape = {
        "batch": ones,
        "total_context": total,
        "heads": 8 * ones,
        "kv_heads": ones,
        "head_dim": 128 * ones,
    }
    cold, warm = (physics.time_s(shape, parameters, cold=cold) for cold in (True, False))
    assert np.all(cold >= warm)
    assert cold[-1] == pytest.approx(warm[-1], rel=1e-3)  # 5 GB don't stay in 50 MB


def test_bad_requests(tmp_path: Path) -> None:
    for out in (tmp_path / "missing" / "predictor.npz", tmp_path):
        with pytest.raises(InputError, match="must be a file in a folder that is there"):
            train(tmp_path, out=out)
    with pytest.raises(InputError, match="folds: must be at least 2"):
        train(H100, folds=1)
    with pytest.raises(InputError, match="has no table conv_bf16; it has gemm_bf16"):
        train(H100, tables=["conv_bf16"])
    with pytest.raises(InputError, match=r"profile\.yaml"):
        train(tmp_path)
    profile = synthetic_profile(tmp_path / "odd", noise=0.1)
    text = (profile.path / "profile.yaml").read_text().replace("h100-sxm", "h1000")
    (profile.path / "profile.yaml").write_text(text)
    with pytest.raises(InputError, match="h1000"):
        train(profile.path)
