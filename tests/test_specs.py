"""Models, devices, parallelism and memory against hand-computed values, data sheets and transformers."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs import (
    InputError,
    ModelSpec,
    ParallelSpec,
    fit_memory,
    get_device,
    get_model,
    list_devices,
    list_models,
)
from specs.models import parse_config

# Counted by transformers 5.23.0 (torch 2.13.0), for each config c of specs/library/models:
#   with torch.device("meta"): m = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(c))
#   sum(p.numel() for p in m.parameters())
TRANSFORMERS_COUNTS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_248_023_552,
    "tiny-llama": 5_048_576,
}

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}

# Variants with biases, query and key norms and tied embeddings, counted the same way.
VARIANTS = {
    "llama with every bias": (
        {
            "architectures": ["LlamaForCausalLM"],
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        188_960,
    ),
    "qwen3": ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True}, 218_144),
    "qwen3 with bias": (
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "attention_bias": True},
        282_912,
    ),
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}

LLAMA = get_model("llama-3-8b")
H100 = get_device("h100-sxm")


def small(**changes: Any) -> ModelSpec:
    return parse_config({"architectures": ["LlamaForCausalLM"], **SMALL, **changes}, "small", "config.json")


class TestModels:
    def test_the_library_is_what_the_issue_lists(self) -> None:
        assert list_models() == sorted(TRANSFORMERS_COUNTS)

    @pytest.mark.parametrize("name", TRANSFORMERS_COUNTS)
    def test_parameters_equal_those_transformers_counts(self, name: str) -> None:
        assert get_model(name).num_parameters == TRANSFORMERS_COUNTS[name]

    @pytest.mark.parametrize("changes, count", VARIANTS.values(), ids=VARIANTS)
    def test_parameters_of_variants(self, changes: dict[str, Any], count: int) -> None:
        assert small(**changes).num_parameters == count

    def test_parameters_of_qwen3_8b(self) -> None:
        assert parse_config(QWEN3_8B, "qwen3-8b", "config.json").num_parameters == 8_190_735_360

    @pytest.mark.parametrize("name", TRANSFORMERS_COUNTS)
    def test_parameters_equal_transformers_where_it_is_installed(self, name: str) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        path = Path(__file__).parent.parent / "specs" / "library" / "models" / f"{name}.json"
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert get_model(name).num_parameters == sum(each.numel() for each in model.parameters())

    def test_one_layer_of_llama_3_8b_by_hand(self) -> None:
        # q and o 4096², k and v 4096 × 1024, gate, up and down 4096 × 14336, two norms.
        assert LLAMA.layer_parameters == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
        assert LLAMA.embedding_parameters == 2 * 128256 * 4096

    def test_kv_bytes_by_hand(self) -> None:
        # K and V × 32 layers × 8 heads × 128 elements × 2 bytes: the 128 KiB everyone quotes.
        assert LLAMA.kv_bytes_per_token("bf16") == 131_072
        assert LLAMA.kv_bytes_per_token("fp8") == 65_536
        assert get_model("llama-3-70b").kv_bytes_per_token("bf16") == 327_680
        assert get_model("qwen2.5-7b").kv_bytes_per_token("bf16") == 2 * 28 * 4 * 128 * 2

    def test_flops_by_hand(self) -> None:
        per_layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
        assert LLAMA.linear_flops_per_token() == 32 * per_layer
        assert LLAMA.lm_head_flops_per_row() == 2 * 4096 * 128256
        # MEDHA: 4·c·n·d·h + 2·c²·d·h in each layer.
        assert LLAMA.attention_flops(512, 1_000_000) == 32 * (4 * 512 * 1_000_000 + 2 * 512**2) * 128 * 32

    def test_chunks_of_a_prompt_cost_what_the_whole_does(self) -> None:
        chunks = sum(LLAMA.attention_flops(512, done) for done in range(0, 8192, 512))
        assert chunks == LLAMA.attention_flops(8192, 0)

    @given(chunk=st.integers(1, 300), context=st.integers(0, 300), window=st.integers(1, 200))
    def test_a_sliding_window_bounds_the_keys_of_every_query(
        self, chunk: int, context: int, window: int
    ) -> None:
        windowed = replace(small(), sliding_window=window)
        # Query i sees what came before it, half of itself (the triangle is c²/2), at most the window.
        pairs = sum(min(context + i + 0.5, float(window)) for i in range(chunk))
        flops = windowed.attention_flops(chunk, context) / (4 * windowed.query_size * windowed.num_layers)
        assert flops == pytest.approx(pairs, abs=0.5)

    def test_rope_scaling_is_read_in_both_spellings(self) -> None:
        scaling = get_model("llama-3.1-8b").rope_scaling
        assert scaling is not None
        assert (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == (
            "llama3",
            8.0,
            8192,
        )
        newer = small(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
        assert newer.rope_theta == 5e5
        assert newer.rope_scaling is not None and newer.rope_scaling.kind == "linear"
        assert small(rope_parameters={"rope_type": "default", "rope_theta": 1e4}).rope_scaling is None

    def test_mistral_windows(self) -> None:
        def window(**changes: Any) -> int | None:
            return small(architectures=["MistralForCausalLM"], **changes).sliding_window

        assert window(sliding_window=None) is None
        assert window(sliding_window=2048) == 2048
        assert window() == 4096  # what transformers takes when the key is absent

    def test_a_config_is_read_from_a_file_and_from_a_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "my-model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
        for path in (folder, folder / "config.json"):
            model = get_model(str(path))
            assert model.name == "my-model"
            assert model.architecture == "LlamaForCausalLM"

    def test_specs_travel_to_other_processes(self) -> None:
        assert pickle.loads(pickle.dumps((LLAMA, H100))) == (LLAMA, H100)


class TestDevices:
    def test_the_library_is_what_the_issue_lists(self) -> None:
        nvidia = ["a100-80gb-sxm", "b200", "b300", "h100-sxm", "h200-sxm", "rtx-pro-6000-blackwell"]
        assert list_devices() == sorted([*nvidia, "cpu"])

    def test_data_sheet_figures(self) -> None:
        a100, h200, b200 = get_device("a100-80gb-sxm"), get_device("h200-sxm"), get_device("b200")
        assert [round(each.peak_flops["bf16"] / 1e12) for each in (a100, H100, h200, b200)] == [
            312,
            989,
            989,
            2250,
        ]
        assert [each.num_sms for each in (a100, H100, h200, b200)] == [108, 132, 132, 148]
        bandwidths = [each.memory_bandwidth_bytes_per_s for each in (a100, H100, h200, b200)]
        assert bandwidths == [2.039e12, 3.35e12, 4.8e12, 7.7e12]
        # NVLink 3, 4, 4, 5 one way; HDR, then NDR InfiniBand.
        assert [each.intra_node.bandwidth_bytes_per_s for each in (a100, H100, h200, b200)] == [
            300e9,
            450e9,
            450e9,
            900e9,
        ]
        assert [each.inter_node.bandwidth_bytes_per_s for each in (a100, H100, h200, b200)] == [
            25e9,
            50e9,
            50e9,
            50e9,
        ]

    def test_the_chunk_that_saturates_an_h100(self) -> None:
        # arXiv 2409.17264, section 2: 989 TFLOP/s ÷ 3.35 TB/s ≈ 295 FLOP a byte.
        assert H100.peak_flops_for("bf16") / H100.memory_bandwidth_bytes_per_s == pytest.approx(295, rel=0.01)

    @pytest.mark.parametrize("name", list_devices())
    def test_every_device_names_its_sources(self, name: str) -> None:
        device = get_device(name)
        assert len(device.source) > 40
        assert len(device.price_source) > 20
        assert device.price_usd_per_hour > 0

    def test_fp16_runs_as_bf16_and_missing_units_are_refused(self) -> None:
        assert H100.peak_flops_for("fp16") == H100.peak_flops_for("bf16")
        with pytest.raises(InputError, match="a100-80gb-sxm has no peak rate for fp8"):
            get_device("a100-80gb-sxm").peak_flops_for("fp8")

    def test_a_users_own_device(self, tmp_path: Path) -> None:
        text = (Path(__file__).parent.parent / "specs/library/devices/h100-sxm.yaml").read_text()
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace("num_sms: 132", "num_sms: 99"))
        device = get_device(str(path))
        assert (device.name, device.num_sms) == ("mine", 99)


class TestParallel:
    def test_gpus(self) -> None:
        parallel = ParallelSpec(replicas=3, tp=8, spp=4, kvp=2)
        assert (parallel.gpus_per_replica, parallel.gpus) == (64, 192)

    def test_layers_are_spread_evenly_the_last_stage_spared(self) -> None:
        assert ParallelSpec(spp=5).layers_of_stage(LLAMA) == (7, 7, 6, 6, 6)

    @given(spp=st.integers(1, 80))
    def test_no_layer_is_lost(self, spp: int) -> None:
        layers = ParallelSpec(spp=spp).layers_of_stage(get_model("llama-3-70b"))
        assert sum(layers) == 80
        assert max(layers) - min(layers) <= 1

    @pytest.mark.parametrize("tp", [1, 2, 4, 8])
    def test_what_is_possible_passes(self, tp: int) -> None:
        ParallelSpec(tp=tp, spp=80, kvp=3).check(get_model("llama-3-70b"), H100)


class TestMemory:
    def test_the_parts_are_the_whole(self) -> None:
        fit = fit_memory(LLAMA, H100, ParallelSpec())
        assert fit.weights_bytes + fit.reserved_bytes + fit.kv_bytes == H100.memory_bytes
        assert fit.kv_capacity_tokens == fit.kv_bytes // fit.kv_bytes_per_token

    def test_llama_3_8b_on_one_h100_by_hand(self) -> None:
        fit = fit_memory(LLAMA, H100, ParallelSpec(), max_batch_tokens=8192, max_batch_requests=256)
        assert fit.weights_bytes == 2 * 8_030_261_248
        # A tenth unused; 8192 tokens × (2 × 4096 + 3 × 14336) × 2 bytes; 256 rows of logits in fp32.
        unused = 85_899_345_920 - int(85_899_345_920 * 0.9)
        assert fit.reserved_bytes == unused + 8192 * (8192 + 43008) * 2 + 256 * 128256 * 4
        assert fit.kv_bytes_per_token == 131_072
        assert fit.kv_capacity_tokens == 459_889

    def test_fp8_halves_the_matrices_but_not_the_vocabulary(self) -> None:
        matrices = 32 * LLAMA.layer_linear_weights
        rest = LLAMA.num_parameters - matrices
        assert (
            fit_memory(LLAMA, H100, ParallelSpec(), weight_dtype="fp8").weights_bytes == matrices + 2 * rest
        )

    def test_fp8_cache_holds_twice_the_tokens(self) -> None:
        bf16 = fit_memory(LLAMA, H100, ParallelSpec())
        fp8 = fit_memory(LLAMA, H100, ParallelSpec(), kv_dtype="fp8")
        assert fp8.kv_capacity_tokens // 2 == bf16.kv_capacity_tokens

    def test_tied_embeddings_are_stored_once_on_one_stage_and_twice_on_two(self) -> None:
        tied = replace(LLAMA, tie_word_embeddings=True)
        table = 2 * 128256 * 4096
        whole = fit_memory(LLAMA, H100, ParallelSpec()).weights_bytes
        assert whole - fit_memory(tied, H100, ParallelSpec()).weights_bytes == table
        two = ParallelSpec(spp=2)
        assert fit_memory(tied, H100, two) == fit_memory(LLAMA, H100, two)

    def test_the_tightest_stage_decides(self) -> None:
        # 32 layers on 3 stages are 11, 11, 10; the first has 11 layers and the embedding.
        fit = fit_memory(LLAMA, H100, ParallelSpec(spp=3))
        assert fit.kv_bytes_per_token == 11 * 2 * 8 * 128 * 2

    @given(tp=st.sampled_from([1, 2, 4, 8]), spp=st.integers(1, 16))
    def test_more_gpus_hold_more_tokens(self, tp: int, spp: int) -> None:
        one = fit_memory(LLAMA, H100, ParallelSpec())
        many = fit_memory(LLAMA, H100, ParallelSpec(tp=tp, spp=spp))
        assert many.kv_capacity_tokens >= one.kv_capacity_tokens

    def test_kv_groups_hold_a_full_copy_each(self) -> None:
        one = fit_memory(LLAMA, H100, ParallelSpec())
        assert fit_memory(LLAMA, H100, ParallelSpec(kvp=4)) == one

    def test_what_does_not_fit_says_what_would(self) -> None:
        llama_70b = get_model("llama-3-70b")
        with pytest.raises(InputError, match=r"131\.4 GiB .* tp 2, spp 1 would fit"):
            fit_memory(llama_70b, H100, ParallelSpec())
        fit_memory(llama_70b, H100, ParallelSpec(tp=2))


def config_file(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def config(**changes: Any) -> str:
    data = {"architectures": ["LlamaForCausalLM"], **SMALL, **changes}
    return json.dumps({key: value for key, value in data.items() if value != "absent"})


BAD_CONFIGS = {
    "mixture of experts": (
        config(architectures=["MixtralForCausalLM"], num_local_experts=8),
        "mixture of experts",
    ),
    "latent attention": (
        config(architectures=["DeepseekV3ForCausalLM"], kv_lora_rank=512),
        "multi-head latent attention",
    ),
    "experts under a known name": (config(num_experts=8), "num_experts is set"),
    "encoder": (config(architectures=["BertForMaskedLM"]), "supported are LlamaForCausalLM"),
    "no architecture": (config(architectures="absent"), "names no architecture"),
    "architectures of the wrong type": (config(architectures=[3]), "names no architecture"),
    "missing size": (config(hidden_size="absent"), "hidden_size is missing"),
    "text for a number": (config(hidden_size="64"), "hidden_size must be a whole number"),
    "true for a number": (config(vocab_size=True), "vocab_size must be a whole number"),
    "negative": (config(num_hidden_layers=-3), "num_hidden_layers must be between 1"),
    "zero heads": (config(num_attention_heads=0), "num_attention_heads must be between 1"),
    "huge": (config(vocab_size=10**30), "vocab_size must be between"),
    "KV heads that don't divide": (config(num_key_value_heads=3), "must divide num_attention_heads"),
    "hidden size that heads don't divide": (config(hidden_size=65), "multiple of num_attention_heads"),
    "NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number"),
    "number for a boolean": (config(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
    "unknown rope": (
        config(rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        "'longrope' is not supported",
    ),
    "rope of the wrong type": (config(rope_scaling=[1]), "rope_scaling must be a mapping"),
    "4-bit weights": (config(quantization_config={"quant_method": "awq"}), "'awq' is not supported"),
    "window on some layers": (
        config(
            architectures=["Qwen2ForCausalLM"],
            use_sliding_window=True,
            sliding_window=1024,
            max_window_layers=1,
        ),
        "some layers only",
    ),
    "not JSON": ("{'hidden_size': 64}", "line 1 is not valid JSON"),
    "a list": ("[1, 2]", "must hold one mapping"),
    "empty": ("", "not valid JSON"),
    "binary": (b"\x80\x81\x00\xff", "not a text file"),
    "deeply nested": ("[" * 100_000, "not valid JSON"),
    "too large": (" " * (2 << 20), "larger than"),
}


@pytest.mark.parametrize("content, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = config_file(tmp_path, content)
    with pytest.raises(InputError) as caught:
        get_model(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(path)
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    "name, message",
    [
        ("lama-3-8b", "did you mean 'llama-3-8b'?"),
        ("zzz", "known are llama-3-70b"),
        ("no/such/config.json", "neither a known model nor a config.json"),
        ("x" * 5000, "neither a known model"),
        ("nul\0byte", "neither a known model"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        get_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        get_model(str(tmp_path))


@pytest.mark.parametrize(
    "name, message",
    [
        ("h100", "did you mean 'h100-sxm'?"),
        ("H100-SXM", "did you mean 'h100-sxm'?"),
        ("tpu", "neither a known device"),
    ],
)
def test_unknown_devices(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        get_device(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("num_sms: 132", "num_smss: 132", "unknown key 'num_smss'; did you mean 'num_sms'?"),
        ("num_sms: 132", "", "num_sms is missing"),
        ("num_sms: 132", "num_sms: many", "num_sms must be a whole number"),
        ("gpus_per_node: 8", "gpus_per_node: 0", "gpus_per_node must be between 1"),
        ("3.35e+12", ".nan", "memory_bandwidth_bytes_per_s must be a finite number"),
        ("3.35e+12", "-1", "memory_bandwidth_bytes_per_s must be at least"),
        ("bf16: 989.4e+12, ", "", "bf16 is missing"),
        ("bf16: 989.4e+12", "bf17: 1.0", "unknown key 'bf17'; did you mean 'bf16'?"),
        ("latency_s: 3.4e-6", "latency: 1", "unknown key 'latency'; did you mean 'latency_s'?"),
        ("kernel_launch_s: 3.0e-6", "kernel_launch_s: [1", "not valid YAML"),
    ],
)
def test_bad_device_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (Path(__file__).parent.parent / "specs/library/devices/h100-sxm.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError) as caught:
        get_device(str(path))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, sizes, message",
    [
        ("llama-3-70b", {"tp": 3}, "must divide the 8 KV heads of llama-3-70b"),
        ("llama-3-70b", {"tp": 16}, "more than the 8 GPUs of one h100-sxm node"),
        ("qwen2.5-7b", {"tp": 8}, "is more than the 4 KV heads of qwen2.5-7b"),
        ("llama-3-8b", {"spp": 33}, "33 stages are more than the 32 layers"),
    ],
)
def test_impossible_parallelism(model: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match="parallel") as caught:
        ParallelSpec(**sizes).check(get_model(model), H100)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tp": 0}, "parallel.tp"),
        ({"replicas": -1}, "parallel.replicas"),
        ({"spp": 1.5}, "parallel.spp"),
        ({"kvp": True}, "parallel.kvp"),
        ({"kvp_tokens_per_group": 0}, "parallel.kvp_tokens_per_group"),
        ({"pipeline": "streams"}, "did you mean 'stream'?"),
    ],
)
def test_impossible_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ParallelSpec(**sizes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight_dtype": "fp4"}, "weight_dtype: unknown dtype 'fp4'"),
        ({"kv_dtype": "int8"}, "kv_dtype: unknown dtype 'int8'"),
        ({"memory_utilization": 1.5}, "memory_utilization"),
        ({"max_batch_tokens": 0}, "max_batch_tokens"),
        ({"max_batch_tokens": 1 << 30}, "doesn't fit"),
    ],
)
def test_impossible_memory(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        fit_memory(LLAMA, H100, ParallelSpec(), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
