"""Every format is read, and the statistics of the public traces are those their page states."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs import InputError
from traces import PrefixBlocks, Workload, describe, detect_format, read_trace, read_trace_with_notes

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("CONVOY_SHARED", ROOT.parent / "shared"))


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; set CONVOY_SHARED to the folder with traces/")
    return path


# From the table in traces/README.md, which its publisher computed on their own.
STATISTICS = {
    "AzureLLMInferenceTrace_code.csv.gz": {
        "rows": 8819,
        "span_s": 3435.948,
        "rate_rps": 2.567,
        "peak_rpm": 632,
        "interarrival_cv": 13.15,
        "longest_gap_s": 217.169,
        "distinct_timestamps": 8819,
        "prompt_tokens_mean": 2047.85,
        "prompt_tokens_p50": 1469,
        "prompt_tokens_p90": 5194,
        "prompt_tokens_p99": 7436,
        "prompt_tokens_min": 3,
        "prompt_tokens_max": 7437,
        "prompt_tokens_total": 18_059_974,
        "output_tokens_mean": 27.88,
        "output_tokens_p50": 13,
        "output_tokens_p90": 55,
        "output_tokens_p99": 252,
        "output_tokens_min": 6,
        "output_tokens_max": 1899,
        "output_tokens_total": 245_896,
        "total_tokens_max": 7841,
    },
    "AzureLLMInferenceTrace_conv.csv.gz": {
        "rows": 19366,
        "span_s": 3501.722,
        "rate_rps": 5.530,
        "peak_rpm": 507,
        "interarrival_cv": 1.09,
        "longest_gap_s": 4.315,
        "distinct_timestamps": 19366,
        "prompt_tokens_mean": 1154.70,
        "prompt_tokens_p50": 1020,
        "prompt_tokens_p90": 2735,
        "prompt_tokens_p99": 4142,
        "prompt_tokens_min": 2,
        "prompt_tokens_max": 14050,
        "prompt_tokens_total": 22_361_870,
        "output_tokens_mean": 211.13,
        "output_tokens_p50": 129,
        "output_tokens_p90": 424,
        "output_tokens_p99": 601,
        "output_tokens_min": 7,
        "output_tokens_max": 1000,
        "output_tokens_total": 4_088_665,
        "total_tokens_max": 14089,
    },
    "mooncake_conversation_trace.jsonl.gz": {
        "rows": 12031,
        "span_s": 3536.999,
        "rate_rps": 3.401,
        "peak_rpm": 247,
        "interarrival_cv": 3.03,
        "longest_gap_s": 3.003,
        "distinct_timestamps": 1180,
        "prompt_tokens_mean": 12035.06,
        "prompt_tokens_p50": 6909,
        "prompt_tokens_p90": 27367,
        "prompt_tokens_p99": 85401,
        "prompt_tokens_min": 891,
        "prompt_tokens_max": 126_195,
        "prompt_tokens_total": 144_793_823,
        "output_tokens_mean": 342.62,
        "output_tokens_p50": 350,
        "output_tokens_p90": 597,
        "output_tokens_p99": 1120,
        "output_tokens_min": 1,
        "output_tokens_max": 2000,
        "output_tokens_total": 4_122_048,
        "total_tokens_max": 126_527,
        "prefix_block_tokens": 512,
        "prefix_block_references": 288_500,
        "prefix_distinct_blocks": 182_790,
        "prefix_blocks_mean": 23.98,
        "prefix_blocks_p50": 14,
        "prefix_blocks_max": 247,
        "prefix_hit_blocks": 105_710,
        "prefix_hit_blocks_share": 0.3664,
        "prefix_hit_tokens_share": 0.3736,
        "prefix_requests_with_hit": 12030,
        "prefix_requests_hit_in_every_block": 118,
    },
    "mooncake_synthetic_trace.jsonl.gz": {
        "rows": 3993,
        "span_s": 1022.025,
        "rate_rps": 3.907,
        "peak_rpm": 273,
        "interarrival_cv": 1.01,
        "longest_gap_s": 2.119,
        "distinct_timestamps": 3982,
        "prompt_tokens_mean": 15325.48,
        "prompt_tokens_p50": 11587,
        "prompt_tokens_p90": 38615,
        "prompt_tokens_p99": 66458,
        "prompt_tokens_min": 13,
        "prompt_tokens_max": 191_378,
        "prompt_tokens_total": 61_194_628,
        "output_tokens_mean": 149.12,
        "output_tokens_p50": 69,
        "output_tokens_p90": 389,
        "output_tokens_p99": 769,
        "output_tokens_min": 1,
        "output_tokens_max": 893,
        "output_tokens_total": 595_432,
        "total_tokens_max": 191_386,
        "prefix_block_tokens": 512,
        "prefix_block_references": 121_877,
        "prefix_distinct_blocks": 43_924,
        "prefix_blocks_mean": 30.52,
        "prefix_blocks_p50": 23,
        "prefix_blocks_max": 374,
        "prefix_hit_blocks": 77_953,
        "prefix_hit_blocks_share": 0.6396,
        "prefix_hit_tokens_share": 0.6512,
        "prefix_requests_with_hit": 1782,
        "prefix_requests_hit_in_every_block": 213,
    },
}


class TestPublicTraces:
    @pytest.mark.parametrize("name", STATISTICS)
    def test_statistics_are_those_of_the_page(self, name: str) -> None:
        statistics = describe(read_trace(shared(f"traces/{name}")))
        expected = STATISTICS[name]
        assert set(statistics) == set(expected)
        for key, value in expected.items():
            # As many digits as the page prints.
            digits = 0 if isinstance(value, int) else len(str(value).split(".")[1])
            tolerance = 0.5 * 10.0**-digits + 1e-9 if digits else 0.0
            assert statistics[key] == pytest.approx(value, abs=tolerance, rel=0), key

    @pytest.mark.parametrize(
        "share, rows, long_rows, median",
        [(0, 20_000, 0, 1713), (1, 20_100, 200, 1714), (5, 20_500, 1000, 1712), (10, 21_000, 2000, 1710)],
    )
    def test_medha_mixes(self, share: int, rows: int, long_rows: int, median: int) -> None:
        workload = read_trace(shared(f"traces/medha_mix_{share}pct.csv.gz"))
        assert len(workload) == rows
        assert workload.arrival_s is None
        is_long = workload.prompt_tokens > 100_000
        assert is_long.sum() == long_rows
        assert np.sort(workload.prompt_tokens[~is_long])[(rows - long_rows) // 2 - 1] == median

    def test_engine_workload_with_its_blocks(self) -> None:
        workload = read_trace(shared("groundtruth/vllm019_rtxpro6000/workload_llama31.jsonl.gz"))
        statistics = describe(workload)
        assert statistics["rows"] == 300
        # "7.6 % of prompt tokens" share a prefix, says the page.
        assert statistics["prefix_hit_tokens_share"] == pytest.approx(0.076, abs=0.0005)
        assert workload.prefix is not None and workload.prefix.block_tokens == 16

    def test_hash_ids_are_kept_row_by_row(self) -> None:
        path = shared("traces/mooncake_synthetic_trace.jsonl.gz")
        prefix = read_trace(path).prefix
        assert prefix is not None
        with gzip.open(path, "rt") as file:
            for index, line in enumerate(file):
                assert prefix.row(index).tolist() == json.loads(line)["hash_ids"]

    def test_an_azure_trace_is_read_exactly(self) -> None:
        path = shared("traces/AzureLLMInferenceTrace_conv.csv.gz")
        workload = read_trace(path)
        assert workload.arrival_s is not None
        # 18:15:50.9951690 − 18:15:46.6805900, to the last of the seven digits
        assert workload.arrival_s[1] == pytest.approx(4.314579, abs=1e-12)


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8"
)
MOONCAKE = (
    '{"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [0, 1]}\n'
    '{"timestamp": 1505, "input_length": 512, "output_length": 8, "hash_ids": [0]}\n'
)

# format, content, seconds or None, prompt, output
SAMPLES: dict[str, tuple[str, str, list[float] | None, list[int], list[int]]] = {
    "azure 2023": ("azure", AZURE, [0.0, 0.052], [4808, 3180], [10, 8]),
    "azure 2024": (
        "azure",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,1,1\n",
        [0.0, 0.99007],
        [2162, 1],
        [5, 1],
    ),
    "azure multimodal": (
        "azure",
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
        "2024-10-15T12:00:00.269Z,0,77,88\n"
        "2024-10-15T14:00:01.269+02:00,1,78,89\n",
        [0.0, 1.0],
        [77, 78],
        [88, 89],
    ),
    "burstgpt": (
        "burstgpt",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "6,ChatGPT,99,0,99,Conversation log\n"
        "45,GPT-4,1087,230,1317,API log\n",
        [0.0, 40.0],
        [472, 1087],
        [18, 230],
    ),
    "vidur": (
        "vidur",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,10,20\n0.75,30,40\n",
        [0.0, 0.25],
        [10, 30],
        [20, 40],
    ),
    "splitwise": (
        "splitwise",
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.0,1,4808,10\n1,2,0,1.5,1,110,27\n",
        [0.0, 1.5],
        [4808, 110],
        [10, 27],
    ),
    "lengths, as pandas writes floats": (
        "lengths",
        "num_prefill_tokens,num_decode_tokens,pd_ratio\n4577.0,1015.0,4.5\n6215,836,7.4\n",
        None,
        [4577, 6215],
        [1015, 836],
    ),
    "convoy": (
        "convoy",
        "arrival_s,prompt_tokens,output_tokens\n1.0,5,6\n1.0,7,8\n",
        [0.0, 0.0],
        [5, 7],
        [6, 8],
    ),
    "convoy without times": ("convoy", "output_tokens,prompt_tokens\n6,5\n8,7\n", None, [5, 7], [6, 8]),
    "mooncake": ("mooncake", MOONCAKE, [0.0, 1.5], [600, 512], [7, 8]),
    "engine workload": (
        "groundtruth",
        '{"request":0,"arrival_s":0.25,"input_tokens":40,"output_tokens":3,"block_ids":[0,1]}\n'
        '{"request":1,"arrival_s":0.5,"input_tokens":41,"output_tokens":4,"block_ids":[0,2,3]}\n',
        [0.0, 0.25],
        [40, 41],
        [3, 4],
    ),
    "sharegpt with counts": (
        "sharegpt",
        '[{"prompt_len": 12, "output_len": 34, "conversations": []}, {"prompt_len": 5, "output_len": 6}]',
        None,
        [12, 5],
        [34, 6],
    ),
    "sharegpt, estimated": (
        "sharegpt",
        '\n [{"id": "a", "conversations": [{"from": "human", "value": "123456789"},'
        '                                   {"from": "gpt", "value": "1234"}]},'
        '  {"id": "b", "conversations": [{"from": "human", "value": "no answer"}]},'
        '  {"id": "c", "conversation": [{"role": "user", "content": "hi"},'
        '                                  {"role": "x", "content": "12345"}]}]\n',
        None,
        [3, 1],
        [1, 2],
    ),
}


def write(path: Path, content: str, compress: bool) -> Path:
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


class TestFormats:
    @pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
    @pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
    def test_each_is_recognised_and_read(self, tmp_path: Path, sample: Any, compress: bool) -> None:
        name, content, arrival_s, prompt, output = sample
        path = write(tmp_path / "trace", content, compress)  # neither suffix nor name gives it away
        assert detect_format(path) == name
        workload = read_trace(path)
        assert workload.prompt_tokens.tolist() == prompt
        assert workload.output_tokens.tolist() == output
        assert workload.prompt_tokens.dtype == workload.output_tokens.dtype == np.int32
        if arrival_s is None:
            assert workload.arrival_s is None
        else:
            assert workload.arrival_s is not None
            assert workload.arrival_s == pytest.approx(arrival_s, abs=1e-12)

    def test_failed_requests_are_counted(self, tmp_path: Path) -> None:
        reading = read_trace_with_notes(write(tmp_path / "t.csv", SAMPLES["burstgpt"][1], False))
        assert (reading.format, reading.left_out) == ("burstgpt", 1)
        assert reading.notes == ("1 requests with 0 response tokens failed and are left out",)
        assert read_trace(tmp_path / "t.csv").head(1).notes == reading.notes

    def test_estimates_are_confessed(self, tmp_path: Path) -> None:
        reading = read_trace_with_notes(write(tmp_path / "t.json", SAMPLES["sharegpt, estimated"][1], False))
        assert reading.left_out == 1
        assert "estimated at 4 characters a token" in reading.notes[0]
        exact = read_trace_with_notes(write(tmp_path / "u.json", SAMPLES["sharegpt with counts"][1], False))
        assert exact.notes == ()

    def test_classes(self, tmp_path: Path) -> None:
        content = "arrival_s,prompt_tokens,output_tokens,slo_class\n0,1,1,chat\n1,1,1,batch\n2,1,1,chat\n"
        workload = read_trace(write(tmp_path / "t.csv", content, False))
        assert workload.slo_names == ("chat", "batch")
        assert workload.slo_class is not None
        assert workload.slo_class.tolist() == [0, 1, 0]

    def test_prefix_blocks(self, tmp_path: Path) -> None:
        prefix = read_trace(write(tmp_path / "t", MOONCAKE, False)).prefix
        assert prefix is not None
        assert [prefix.row(i).tolist() for i in range(2)] == [[0, 1], [0]]

    def test_blank_lines_byte_order_mark_and_quotes_do_no_harm(self, tmp_path: Path) -> None:
        content = "\ufeff\n" + '"arrival_s","prompt_tokens","output_tokens"\r\n\r\n0,"5",6\r\n\n1,7,8\n\n'
        workload = read_trace(write(tmp_path / "t.csv", content, False))
        assert workload.prompt_tokens.tolist() == [5, 7]

    def test_a_stated_format_wins(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", SAMPLES["vidur"][1], False)
        assert read_trace(path, "lengths").arrival_s is None

    @given(
        rows=st.lists(
            st.tuples(st.integers(0, 10**9), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)), min_size=1
        ),
        block=st.integers(1, 60),
    )
    def test_where_blocks_are_cut_makes_no_difference(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], block: int
    ) -> None:
        rows.sort()
        lines = [f"{time / 1000},{prompt},{output}\n" for time, prompt, output in rows]
        path = tmp_path_factory.mktemp("blocks") / "t.csv"
        path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("traces._files._BLOCK_BYTES", block)
            workload = read_trace(path, "convoy")
        assert workload.prompt_tokens.tolist() == [prompt for _, prompt, _ in rows]
        assert workload.output_tokens.tolist() == [output for _, _, output in rows]
        assert workload.arrival_s is not None
        assert workload.arrival_s == pytest.approx([(row[0] - rows[0][0]) / 1000 for row in rows], abs=1e-6)


class TestSize:
    def test_a_million_rows_take_under_200_mb(self, tmp_path: Path) -> None:
        path = tmp_path / "million.csv"
        n = 1_000_000
        with path.open("w") as file:
            file.write("arrived_at,num_prefill_tokens,num_decode_tokens\n")
            file.writelines(f"{row / 7:.6f},{1 + row % 5000},{1 + row % 700}\n" for row in range(n))
        # In a process of its own: the peak is the whole process's, interpreter and numpy included. (Not
        # ru_maxrss, which a child inherits.)
        if not Path("/proc/self/status").exists():
            pytest.skip("reads the peak from Linux's /proc")
        script = (
            "import re, sys, traces\n"
            "workload = traces.read_trace(sys.argv[1])\n"
            "peak = re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read()).group(1)\n"
            "print(len(workload), workload.total_tokens, peak)"
        )
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows, tokens, peak_kib = map(int, done.stdout.split())
        assert rows == n
        assert tokens == sum(2 + row % 5000 + row % 700 for row in range(n))
        assert peak_kib < 200 * 1024

    def test_importing_traces_brings_no_heavy_library(self) -> None:
        heavy = "{'pandas', 'scipy', 'pydantic', 'sklearn', 'matplotlib', 'simpy', 'torch', 'yaml'}"
        script = f"import sys, traces; print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


def brute_force_hits(rows: list[list[int]]) -> list[int]:
    """Leading blocks of each row that an earlier row had."""
    seen: set[int] = set()
    hits = []
    for row in rows:
        count = 0
        while count < len(row) and row[count] in seen:
            count += 1
        hits.append(count)
        seen.update(row)
    return hits


class TestWorkload:
    def test_take_until_and_head(self) -> None:
        prefix = PrefixBlocks(np.array([0, 2, 2, 5]), np.array([7, 8, 1, 2, 3], dtype=np.int32), 16)
        workload = Workload(
            np.array([20, 5, 48]),
            np.array([1, 2, 3]),
            np.array([0.0, 1.0, 2.0]),
            slo_class=np.array([1, 0, 1]),
            slo_names=("a", "b"),
            prefix=prefix,
        )
        assert len(workload.until(2.0)) == 2  # before, not at
        assert len(workload.head(99)) == 3
        taken = workload.with_arrivals(None).take([2, 0, 2])
        assert taken.prompt_tokens.tolist() == [48, 20, 48]
        assert taken.slo_class is not None and taken.slo_class.tolist() == [1, 1, 1]
        assert taken.prefix is not None
        assert [taken.prefix.row(i).tolist() for i in range(3)] == [[1, 2, 3], [7, 8], [1, 2, 3]]

    @given(rows=st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=12), data=st.data())
    def test_prefix_rows_are_taken_whole(self, rows: list[list[int]], data: st.DataObject) -> None:
        prefix = ragged(rows)
        indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
        taken = prefix.take(np.array(indices, dtype=np.int64))
        assert [taken.row(i).tolist() for i in range(len(indices))] == [rows[i] for i in indices]

    @given(rows=st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=12))
    def test_ideal_hits_equal_a_plain_simulation(self, rows: list[list[int]]) -> None:
        prompts = np.array([max(1, 16 * len(row) - 5) for row in rows])
        workload = Workload(prompts, np.ones(len(rows), dtype=int), prefix=ragged(rows))
        statistics = describe(workload)
        if not any(rows):
            assert "prefix_hit_blocks" not in statistics
            return
        hits = brute_force_hits(rows)
        assert statistics["prefix_hit_blocks"] == sum(hits)
        tokens = sum(min(16 * hit, int(prompt)) for hit, prompt in zip(hits, prompts, strict=True))
        assert statistics["prefix_hit_tokens_share"] == pytest.approx(tokens / prompts.sum())

    def test_no_data_no_key(self) -> None:
        empty = Workload(np.array([], dtype=int), np.array([], dtype=int))
        assert describe(empty) == {"rows": 0}
        alone = describe(Workload(np.array([4]), np.array([5]), np.array([0.0])))
        assert not {"rate_rps", "interarrival_cv", "prefix_hit_blocks"} & set(alone)

    @pytest.mark.parametrize(
        "columns, message",
        [
            ({"prompt_tokens": [1, 0]}, "prompt_tokens of request 1 must be 1 to"),
            ({"prompt_tokens": [1, 2**31]}, "must be 1 to 2147483647, not 2147483648"),
            ({"output_tokens": [1.5, 2.0]}, "must be whole numbers"),
            ({"output_tokens": [1]}, "2 prompt lengths but 1 output lengths"),
            ({"prompt_tokens": [[1, 2]]}, "must be one column"),
            ({"arrival_s": [0.0]}, "one time for each of the 2 requests"),
            ({"arrival_s": [0.0, float("nan")]}, "arrival_s of request 1 must be finite"),
            ({"arrival_s": [-1.0, 0.0]}, "arrival_s of request 0 must be finite and not negative"),
            ({"arrival_s": [2.0, 1.0]}, "times must not decrease"),
            ({"arrival_s": ["a", "b"]}, "arrival_s must be numbers"),
            ({"slo_class": [0, 1]}, "must index the 1 names"),
            ({"slo_class": [0]}, "one whole number for each request"),
            ({"slo_names": ("a", "a")}, "different names"),
            (
                {"prefix": PrefixBlocks(np.array([0, 0]), np.array([], dtype=np.int32), 16)},
                "1 rows of prefix",
            ),
        ],
    )
    def test_impossible_columns_are_refused(self, columns: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {"prompt_tokens": [1, 2], "output_tokens": [3, 4], "arrival_s": [0.0, 1.0]}
        with pytest.raises(InputError) as caught:
            Workload(**(good | columns))
        assert message in str(caught.value)


def ragged(rows: list[list[int]]) -> PrefixBlocks:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
    flat = [block for row in rows for block in row]
    return PrefixBlocks(offsets, np.array(flat, dtype=np.int32), 16)
