"""The table format and the stored predictor: round trips, and every kind of unsound file refused."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from profiler.kernels import load_kernels
from profiler.overheads import ServingOverhead
from profiler.predictor import FILE, load_predictor
from profiler.tables import (
    MAX_TABLE_BYTES,
    PROFILES,
    Profile,
    Table,
    TableInfo,
    read_profile,
    read_table,
    write_profile,
    write_table,
)
from specs.devices import get_device
from specs.errors import InputError

H100 = PROFILES / "h100-sxm" / "vllm-0.24.0"
ROWS = {"m": np.array([64.0, 1.0, 8.0]), "n": np.array([32.0] * 3), "k": np.array([16.0, 16.0, 8.0])}
TIMES = np.array([3e-6, 1.23456e-6, 2e-6])


def make_profile(folder: Path) -> Profile:
    folder.mkdir(parents=True, exist_ok=True)
    sha256, rows = write_table(folder, "gemm", "bf16", Table(ROWS, TIMES))
    info = TableInfo("gemm", "bf16", rows, sha256, "cublas", "here", False)
    profile = Profile(folder, "h100-sxm", "measured", "2026-11-21", "MIT", {"torch": "2.9"}, (), (info,))
    write_profile(profile)
    return profile


def replace_table(profile: Profile, text: str | bytes) -> TableInfo:
    """Put another table in place, with a provenance that matches its hash."""
    import hashlib

    data = gzip.compress(text.encode()) if isinstance(text, str) else text
    (profile.path / "gemm_bf16.csv.gz").write_bytes(data)
    rows = 1 if isinstance(text, bytes) else max(1, text.strip().count("\n"))
    return dataclasses.replace(profile.tables[0], sha256=hashlib.sha256(data).hexdigest(), rows=rows)


def test_round_trip(tmp_path: Path) -> None:
    written = make_profile(tmp_path / "mine")
    profile = read_profile(tmp_path / "mine")
    assert profile == written and profile.name == "mine"
    table = read_table(profile, profile.tables[0])
    assert table.shape["m"].tolist() == [1, 8, 64]  # sorted by shape
    assert table.time_s == pytest.approx([1.23456e-6, 2e-6, 3e-6], rel=1e-4)


def test_writing_is_reproducible(tmp_path: Path) -> None:
    hashes = {make_profile(tmp_path / name).tables[0].sha256 for name in ("a", "b")}
    assert len(hashes) == 1


def test_optional_columns_of_a_measured_table(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    info = replace_table(profile, "m,n,k,time_s,spread_s,samples\n1,2,3,1e-6,1e-8,20\n")
    assert read_table(profile, info).time_s.tolist() == [1e-6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m,n,time_s\n1,2,1e-6\n", "no column 'k'"),
        ("m,n,k,time_ms\n1,2,3,1e-6\n", "no column 'time_s'; did you mean 'time_ms'"),
        ("m,n,k,time_s,colour\n1,2,3,1e-6,3\n", "unknown column 'colour'"),
        ("m,n,k,time_s\n", "no rows"),
        ("m,n,k,time_s\n1,2,3,1e-6\n1,2,x,1e-6\n", "row 3 is not 4 numbers"),
        ("m,n,k,time_s\n1,2,3,1e-6\n1,2,3\n", "row 3 is not 4 numbers"),
        ("m,n,k,time_s\n1,2,3,1e-6\n1,2,3,-1e-6\n", "row 3: time_s is -1e-06"),
        ("m,n,k,time_s\n1,2,3,nan\n", "row 2: time_s is nan"),
        ("m,n,k,time_s\n0,2,3,1e-6\n", "row 2: m is 0"),
        (b"not gzip at all", "not a sound gzip file"),
        (gzip.compress(b"m,n,k,time_s\n1,2,3,1e-6\n" * 9)[:-9], "not a sound gzip file"),
    ],
)
def test_unsound_tables(tmp_path: Path, text: str | bytes, message: str) -> None:
    profile = make_profile(tmp_path)
    info = replace_table(profile, text)
    with pytest.raises(InputError, match=message) as caught:
        read_table(profile, info)
    assert "gemm_bf16.csv.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_unpacks_to_too_much(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    info = replace_table(profile, gzip.compress(bytes(MAX_TABLE_BYTES + 1), compresslevel=1))
    with pytest.raises(InputError, match="unpacks to more than 64 MiB"):
        read_table(profile, info)


def test_a_changed_table(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    write_table(tmp_path, "gemm", "bf16", Table(ROWS, TIMES * 5))
    with pytest.raises(InputError, match="changed since its profile was written"):
        read_table(profile, profile.tables[0])


def test_a_row_count_that_disagrees(tmp_path: Path) -> None:
    profile = make_profile(tmp_path)
    with pytest.raises(InputError, match=r"3 rows, but profile\.yaml says 4"):
        read_table(profile, dataclasses.replace(profile.tables[0], rows=4))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: 1", "format: 7", "format is 7; this version of Convoy reads 1"),
        ("source: measured", "source: guessed", "source must be one of measured, imported"),
        ("device: h100-sxm", "devise: h100-sxm", "unknown key 'devise'; did you mean 'device'"),
        ("gemm_bf16:", "gems_bf16:", "unknown table 'gems_bf16'"),
        ("notes: []", "notes: yes", "notes must be a list of texts"),
        ("rows: 3", "rows: -3", "rows must be between 1"),
        ("format: 1", "format: [", "not valid YAML"),
    ],
)
def test_unsound_provenance(tmp_path: Path, old: str, new: str, message: str) -> None:
    make_profile(tmp_path)
    file = tmp_path / "profile.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        read_profile(tmp_path)


def test_a_folder_without_a_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile\.yaml: cannot be read"):
        load_kernels(get_device("h100-sxm"), profile=tmp_path)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(H100, tmp_path / "copy"))


def rewrite_header(path: Path, **changes: object) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(arrays["header"].tobytes())
    header.update(changes)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


def test_a_copied_profile_predicts_the_same(copy: Path) -> None:
    device = get_device("h100-sxm")
    ours = load_kernels(device, profile=copy).gemm([1, 512], 4096, 4096)
    assert ours.time_s.tolist() == load_kernels(device, "imported").gemm([1, 512], 4096, 4096).time_s.tolist()


def test_a_predictor_of_other_tables_is_refused(copy: Path) -> None:
    # The caches of another simulator served old predictions for kernels made five times slower.
    profile = read_profile(copy)
    info = next(info for info in profile.tables if info.key == "all_reduce_bf16")
    table = read_table(profile, info)
    sha256, _ = write_table(copy, "all_reduce", "bf16", Table(table.shape, table.time_s * 5))
    with pytest.raises(InputError, match="changed since"):
        load_predictor(profile, get_device("h100-sxm"))
    tables = tuple(dataclasses.replace(i, sha256=sha256) if i is info else i for i in profile.tables)
    write_profile(dataclasses.replace(profile, tables=tables))
    with pytest.raises(InputError, match=r"trained on other tables .* run `convoy train"):
        load_predictor(read_profile(copy), get_device("h100-sxm"))


def test_a_predictor_that_lacks_a_parameter_says_what_to_run(copy: Path) -> None:
    with np.load(copy / FILE) as archive:
        operators = json.loads(archive["header"].tobytes())["operators"]
    key = sorted(operators)[0]
    lost = sorted(operators[key]["parameters"])[0]
    del operators[key]["parameters"][lost]
    rewrite_header(copy / FILE, operators=operators)
    with pytest.raises(InputError, match=rf"{key} has no parameter {lost}, .* run `convoy train .*copy`"):
        load_predictor(read_profile(copy), get_device("h100-sxm"))


def test_a_predictor_without_the_newer_rates_of_serving_has_none_of_them(copy: Path) -> None:
    rates = {"base_s": 1e-4, "per_request_s": 2e-5, "prefill_s": 3e-4, "tp_s": 1e-3, "idle_s": 5e-4}
    rewrite_header(copy / FILE, serving=rates)
    found = load_predictor(read_profile(copy), get_device("h100-sxm")).serving
    assert found == ServingOverhead(**rates)


def test_a_predictor_of_another_device_or_version_is_refused(copy: Path) -> None:
    h100 = get_device("h100-sxm")
    with pytest.raises(InputError, match="trained for device 'h100-sxm', not for 'a100-80gb-sxm'"):
        load_kernels(get_device("a100-80gb-sxm"), profile=copy)
    overclocked = dataclasses.replace(h100, memory_bandwidth_bytes_per_s=4e12)
    with pytest.raises(InputError, match="other data-sheet figures"):
        load_kernels(overclocked, profile=copy)
    assert load_kernels(dataclasses.replace(h100, price_usd_per_hour=1.0), profile=copy)
    rewrite_header(copy / FILE, format=2)
    with pytest.raises(InputError, match="format 2; this version of Convoy reads 1"):
        load_kernels(h100, profile=copy)


def test_a_missing_predictor_says_what_to_run(copy: Path) -> None:
    (copy / FILE).unlink()
    with pytest.raises(InputError, match="no predictor; run `convoy train"):
        load_kernels(get_device("h100-sxm"), profile=copy)


def test_pickled_objects_are_never_loaded(copy: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            raise AssertionError("was unpickled")

    with (copy / FILE).open("wb") as file:
        np.savez(file, header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(InputError, match="not a predictor file of plain arrays"):
        load_kernels(get_device("h100-sxm"), profile=copy)


def test_oversized_and_broken_predictors(copy: Path) -> None:
    h100 = get_device("h100-sxm")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.npy", bytes(32 << 20))
    (copy / FILE).write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="unpacks to 33554432 bytes"):
        load_kernels(h100, profile=copy)
    for junk in (b"", b"junk", b"PK\x03\x04 half a zip"):
        (copy / FILE).write_bytes(junk)
        with pytest.raises(InputError, match="not a predictor file"):
            load_kernels(h100, profile=copy)
    np.savez(copy / FILE, header=np.frombuffer(b"{]", dtype=np.uint8))
    with pytest.raises(InputError, match="no readable header"):
        load_kernels(h100, profile=copy)


@pytest.mark.parametrize("array", ["weights", "inducing", "low", "families", "reach"])
def test_arrays_that_do_not_fit(copy: Path, array: str) -> None:
    with np.load(copy / FILE) as archive:
        arrays = dict(archive)
    whole = arrays[f"gemm_bf16.{array}"]
    for broken in (whole[:-1], whole.astype(np.float16), whole.astype(np.float64) * np.nan):
        np.savez(copy / FILE, **{**arrays, f"gemm_bf16.{array}": broken})
        with pytest.raises(InputError, match=f"gemm_bf16.*(fit together|{array})"):
            load_kernels(get_device("h100-sxm"), profile=copy)
