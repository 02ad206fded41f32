"""Reading configurations: what is said is what is meant, and it survives being written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config import Config, check_path
from experiments.keys import merged
from experiments.load import dump_yaml, load_config, validate
from experiments.yaml_files import parse_yaml
from specs.errors import InputError

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "model": "llama-3-8b",
    "device": "h100-sxm",
    "workload": {
        "lengths": {"distribution": "fixed", "prompt_tokens": 512, "output_tokens": 16},
        "arrivals": {"process": "poisson", "rate_rps": 4},
        "num_requests": 20,
    },
}


def config_with(**changes: Any) -> Config:
    data = MINIMAL
    for path, value in changes.items():
        data = merged(data, path.replace("__", "."), value)
    return validate(data, "C.yaml", folder=Path())


def write(folder: Path, data: Any, name: str = "C.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


# -- defaults and meaning ---------------------------------------------------------------------------------


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    """The example of the documentation, with a trace that is there."""
    (tmp_path / "mix.csv.gz").write_bytes(b"")
    path = write(
        tmp_path,
        """
name: medha-5pct
model: llama-3-8b            # a name from `convoy list models`, or a path to a Hugging Face config.json
device: a100-80gb-sxm
predictor: {source: auto}    # auto | measured | imported | roofline
parallel: {replicas: 1, tp: 8, spp: 2, kvp: 1, pipeline: stream, kvp_tokens_per_group: 524288}
scheduler: {priority: lars, chunking: adaptive, target_iteration_s: 0.05,
            space_sharing: true, router: least_loaded}
workload:
  lengths: {trace: mix.csv.gz}   # or {distribution: …}
  arrivals: {process: poisson, rate_rps: 0.75}   # poisson | gamma | uniform | closed_loop | trace
  duration_s: 3600
slo: {ttft: {multiplier: 1.5, floor_s: 0.5}, tpot_s: 0.05}
seed: 42
sweep: {scheduler.priority: [fcfs, edf, lars], workload.arrivals.rate_rps: [0.25, 0.75]}
""",
    )
    config = load_config(path)
    assert (config.parallel.tp, config.parallel.spp) == (8, 2)
    assert config.scheduler.space_sharing
    assert config.workload.lengths == {"trace": str(tmp_path / "mix.csv.gz")}
    assert config.sweep == {
        "scheduler.priority": ["fcfs", "edf", "lars"],
        "workload.arrivals.rate_rps": [0.25, 0.75],
    }


def test_a_number_for_ttft_is_the_same_deadline_for_every_prompt() -> None:
    ttft = config_with(slo__ttft=2).slo.ttft
    assert (ttft.multiplier, ttft.floor_s) == (0.0, 2.0)


def test_a_class_takes_what_it_leaves_out_from_the_promise_to_all() -> None:
    slo = config_with(slo={"ttft": 2.0, "tpot_s": 0.05, "classes": {"chat": {"tpot_s": 0.02}}}).slo
    chat = slo.of_class("chat")
    assert (chat.ttft.floor_s, chat.tpot_s) == (2.0, 0.02)
    assert slo.of_class("unheard of").tpot_s == 0.05


def test_a_class_can_waive_the_token_target() -> None:
    slo = config_with(slo={"tpot_s": 0.05, "classes": {"batch": {"tpot_s": None}}}).slo
    assert slo.of_class("batch").tpot_s is None


def test_counts_may_be_written_as_floats_that_are_whole() -> None:
    assert config_with(workload__num_requests=1e4).workload.num_requests == 10_000


@pytest.mark.parametrize(
    ("text", "value"), [("1e3", 1000.0), ("2.5e-3", 0.0025), ("-4E+2", -400.0), ("7", 7)]
)
def test_exponents_without_a_dot_are_numbers(text: str, value: float) -> None:
    """YAML 1.1, which PyYAML speaks, reads 1e3 as text."""
    assert parse_yaml(text, "here") == value


def test_a_configuration_without_a_name_has_its_file_s(tmp_path: Path) -> None:
    data = {key: value for key, value in MINIMAL.items() if key != "name"}
    assert load_config(write(tmp_path, data, "my sweep.v2.yaml")).name == "my-sweep.v2"


# -- written down and read again --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slo": {"ttft": 2.0, "tpot_s": 0.05, "classes": {"a": {"tpot_s": None}, "b": {"ttft": 1}}}},
        {"predictor": {"source": "roofline", "host": {"base_s": 1e-5, "per_request_s": 3e-6}}},
        {"scheduler__kv": {"block_tokens": 32, "watermark": 0.05}, "dtype": {"kv": "fp8"}, "stop_s": 10},
        {"scheduler__priority": "my.policies:Mine", "sweep": {"seed": [1, 2]}},
    ],
)
def test_a_resolved_configuration_means_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_with(**changes)
    again = load_config(write(tmp_path, dump_yaml(config)))
    for name in ("a", "b", "default"):
        assert again.slo.of_class(name) == config.slo.of_class(name)
    assert dump_yaml(again) == dump_yaml(config)
    assert again.model_copy(update={"slo": config.slo}) == config


def test_a_resolved_configuration_finds_its_trace_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside, elsewhere = tmp_path / "here", tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (here, beside, elsewhere):
        folder.mkdir()
    (beside / "t.csv").write_text("prompt_tokens,output_tokens\n1,1\n")
    component = {"weight": 1, "distribution": "empirical", "trace": "t.csv"}
    lengths = {"distribution": "mixture", "components": [component]}
    path = write(beside, merged(MINIMAL, "workload.lengths", lengths))
    monkeypatch.chdir(here)
    config = load_config(path)
    assert config.workload.lengths["components"][0]["trace"] == str(beside / "t.csv")
    monkeypatch.chdir(elsewhere)
    assert load_config(write(elsewhere, dump_yaml(config))) == config


def test_the_current_folder_comes_before_the_configuration_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "t.csv").write_text("")
    path = write(beside, merged(MINIMAL, "workload.lengths", {"trace": "t.csv"}))
    monkeypatch.chdir(here)
    assert load_config(path).workload.lengths["trace"] == str(here / "t.csv")


# -- --set ------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_reach_into_lists(tmp_path: Path) -> None:
    parts = [{"weight": w, "distribution": "fixed", "prompt_tokens": 8, "output_tokens": 8} for w in (1, 2)]
    lengths = {"distribution": "mixture", "components": parts}
    path = write(tmp_path, merged(MINIMAL, "workload.lengths", lengths))
    config = load_config(
        path,
        [
            "scheduler.priority=lars",
            "parallel={replicas: 4}",
            "workload.lengths.components.1.weight=5",
            "workload.arrivals.rate_rps=1e2",
            "slo.classes.chat.tpot_s=0.1",
        ],
    )
    assert config.scheduler.priority == "lars"
    assert config.parallel.replicas == 4
    assert [part["weight"] for part in config.workload.lengths["components"]] == [1, 5]
    assert config.workload.arrivals["rate_rps"] == 100.0
    assert config.slo.of_class("chat").tpot_s == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "must look like key.path=value"),
        ("=3", "must look like key.path=value"),
        ("sed=3", "'sed' is not a key of the configuration; did you mean 'seed'?"),
        ("scheduler.priorty=lars", "did you mean 'priority'?"),
        ("seed.deeper=3", "'seed' is a value"),
        ("seed=[1", "not valid YAML"),
        ("workload.lengths.prompt_tokens.median=3", "'prompt_tokens' is a value (512)"),
        ("seed=-1", "--set: seed: must be at least 0, not -1"),
    ],
)
def test_bad_overrides_say_so(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)
    assert "--set" in str(caught.value)


def test_an_index_beyond_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match="list of 2, so '2' must be 0 to 1"):
        merged({"a": [1, 2]}, "a.2", 3)


@pytest.mark.parametrize(
    "path", ["seed", "slo.ttft.multiplier", "slo.classes.any.ttft", "workload.lengths.any.thing"]
)
def test_paths_that_exist(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path", ["", "nope", "slo.nope", "slo.classes.any.nope", "seed.nope", "scheduler.kv.nope"]
)
def test_paths_that_don_t(path: str) -> None:
    with pytest.raises(ValueError):
        check_path(path)


# Six levels of nine aliases each: half a million values from a few hundred bytes.
BOMB = "l0: &l0 x\n" + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 7))


# -- hostile YAML -----------------------------------------------------------------------------------------


def test_anchors_and_merge_keys_work() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "here")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a {b: *a}",
        "[" * 100_000,
        "{a: " * 1000,
        "a: !!python/object/apply:os.system ['true']",
        "a: \x00",
    ],
    ids=["bomb", "endless", "deep list", "deep mapping", "python object", "null byte"],
)
def test_hostile_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    assert "\n" not in str(caught.value)
