"""What a measured profile is good for: the shapes it was measured for, and whether a model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from profiler.tables import Profile
from specs.devices import DeviceSpec
from specs.input_files import Fields
from specs.models import ModelSpec

_SHAPES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
_WITH_TYPES = ("gemm", "prefill_attention", "forward_pass")
# What sets the shapes of a rank's kernels: the same layer, however many of them.
_OF_A_LAYER = ("head_dim", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size")


def model_entry(model: ModelSpec, tps: Sequence[int]) -> dict[str, Any]:
    """The `model` entry of profile.yaml: a model's shapes and the tensor-parallel degrees measured."""
    return {"name": model.name, **{key: getattr(model, key) for key in _SHAPES}, "tp": list(tps)}


def entry_model(entry: Mapping[str, Any], where: str) -> ModelSpec:
    """The model of a `model` entry, as far as shapes go.

    Raises:
        InputError: a shape is missing or impossible; `where` names the file.
    """
    fields = Fields(entry, f"{where}: model")
    shapes: dict[str, Any] = {key: fields.integer(key) for key in _SHAPES}
    return ModelSpec(
        name=fields.text("name"),
        max_context_tokens=1 << 30,
        tie_word_embeddings=False,
        attention_bias=False,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        sliding_window=None,
        architecture="LlamaForCausalLM",
        **shapes,
    )


def mismatch(
    profile: Profile, model: ModelSpec | None, tp: int, weight_dtype: str, kv_dtype: str
) -> str | None:
    """Why a measured profile doesn't hold for a model so cut and so stored; None if it does.

    Imported tables span many shapes and hold for all.
    """
    if profile.source != "measured" and not profile.model:
        return None
    wanted = {_stored(weight_dtype), _stored(kv_dtype)}
    measured = {info.dtype for info in profile.tables if info.operator in _WITH_TYPES}
    if measured and not wanted <= measured:
        missing = ", ".join(sorted(wanted - measured))
        return f"was measured in {', '.join(sorted(measured))}, not in {missing}"
    if model is None or not profile.model:
        return None
    for key in _OF_A_LAYER:
        if profile.model.get(key) != getattr(model, key):
            return (
                f"was measured for the shape of {profile.model.get('name')}: its {key} is "
                f"{profile.model.get(key)}, that of {model.name} {getattr(model, key)}"
            )
    if tp not in profile.model.get("tp", ()):
        known = ", ".join(map(str, profile.model.get("tp", ())))
        return f"was measured for tensor parallelism {known}, not {tp}"
    return None


def part_used(device: DeviceSpec, threads: int) -> DeviceSpec:
    """The part of a device that `threads` of its cores are; all of it for 0, or for as many as there are.

    Memory, links and the last-level cache are shared: one core may have them to itself.
    """
    if threads == 0 or threads >= device.num_sms:
        return device
    share = threads / device.num_sms
    peaks = {dtype: peak * share for dtype, peak in device.peak_flops.items()}
    return replace(device, num_sms=threads, peak_flops=peaks)


def _stored(dtype: str) -> str:
    # fp16 kernels are those of bf16: same width, same rate.
    return "bf16" if dtype == "fp16" else dtype
