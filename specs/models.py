"""What a model is made of: dense decoder-only transformers of the Llama family, and their arithmetic.

The facts come from a Hugging Face ``config.json``, either one of the library's or a user's own.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import InputError, did_you_mean
from specs.input_files import Fields, is_kind, load_mapping

_LIBRARY = Path(__file__).parent / "library" / "models"

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4}
"""Bytes of one weight, or of one element of K or V."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary embeddings are stretched beyond the context the model was trained on."""

    kind: str  # linear | dynamic | llama3 | yarn
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense decoder-only transformer: grouped-query attention, gated MLP, RMS norms, rotary positions."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    tie_word_embeddings: bool
    attention_bias: bool  # on the q, k and v projections
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    sliding_window: int | None  # tokens a query sees, itself included; None: all before it
    architecture: str
    attention_output_bias: bool = False  # on the projection after attention
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and of k (Qwen3)

    @property
    def query_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads of one token (the values have as many)."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_linear_weights(self) -> int:
        """Weights of one layer's matrices: q, k, v, o, gate, up and down, without biases and norms."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, biases and norms included."""
        return self.layer_linear_weights + self.layer_vector_parameters

    @property
    def layer_vector_parameters(self) -> int:
        """Parameters of one layer that are not matrices: biases and norms."""
        count = 2 * self.hidden_size  # the norms before attention and before the MLP
        if self.qk_norm:
            count += 2 * self.head_dim
        if self.attention_bias:
            count += self.query_size + 2 * self.kv_size
        if self.attention_output_bias:
            count += self.hidden_size
        if self.mlp_bias:
            count += 2 * self.intermediate_size + self.hidden_size
        return count

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and, unless it shares them, of the LM head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters; equals what ``transformers`` counts for the same ``config.json``."""
        final_norm = self.hidden_size
        return self.num_layers * self.layer_parameters + self.embedding_parameters + final_norm

    def kv_bytes_per_token(self, kv_dtype: str = "bf16") -> int:
        """Bytes of K and V of one token over all layers: 2 × layers × KV heads × head size × element."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes(kv_dtype, "kv_dtype")

    def linear_flops_per_token(self) -> int:
        """FLOP of the matrices of all layers for one token: a multiply and an add for each weight."""
        return 2 * self.num_layers * self.layer_linear_weights

    def lm_head_flops_per_row(self) -> int:
        """FLOP of the LM head for one row, that is, for one token whose logits are wanted."""
        return 2 * self.hidden_size * self.vocab_size

    def attention_flops(self, chunk: int, context: int) -> int:
        """FLOP of attention, all layers, of `chunk` new tokens over `context` cached ones.

        Every pair of a query and a key costs 4 FLOP for each element of a query head (a multiply and an
        add in QKᵀ and again in PV). The pairs are chunk × context plus the causal triangle of chunk² / 2,
        so the sum is (4·c·n + 2·c²) × head size × heads × layers: arXiv 2409.17264, equation 1. A sliding
        window bounds the keys of each query.
        """
        quadruple_pairs = 4 * chunk * context + 2 * chunk * chunk
        if self.sliding_window is not None:
            growing = min(chunk, max(0, self.sliding_window - context))  # queries that still see every key
            quadruple_pairs = 4 * growing * context + 2 * growing * growing
            quadruple_pairs += 4 * (chunk - growing) * self.sliding_window
        return quadruple_pairs * self.query_size * self.num_layers


def dtype_bytes(dtype: str, key: str = "dtype") -> int:
    """Bytes of one element of `dtype`; `key` is named in the error.

    Raises:
        InputError: `dtype` is none of `DTYPE_BYTES`.
    """
    if dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise InputError(
            f"{key}: unknown dtype '{dtype}', known are {known}{did_you_mean(dtype, DTYPE_BYTES)}"
        )
    return DTYPE_BYTES[dtype]


def list_models() -> list[str]:
    """Names of the library's models, sorted."""
    return sorted(path.stem for path in _LIBRARY.glob("*.json"))


def get_model(name_or_path: str) -> ModelSpec:
    """Return a model of the library, or the one in a Hugging Face ``config.json`` or a folder with one.

    Raises:
        InputError: there is no such model or file, or its architecture is not supported.
    """
    names = list_models()
    if name_or_path in names:
        return read_config(_LIBRARY / f"{name_or_path}.json", name_or_path)
    path = Path(name_or_path).expanduser()
    if is_kind(path, "folder"):
        if not is_kind(path / "config.json", "file"):
            raise InputError(f"model: the folder '{name_or_path}' holds no config.json")
        return read_config(path / "config.json", path.resolve().name)
    if is_kind(path, "file"):
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return read_config(path, name)
    hint = did_you_mean(name_or_path, names) or f"; known are {', '.join(names)}"
    raise InputError(f"model: {reprlib.repr(name_or_path)} is neither a known model nor a config.json{hint}")


def read_config(path: Path, name: str) -> ModelSpec:
    """Read the Hugging Face ``config.json`` at `path` (JSON, whatever its suffix is).

    Raises:
        InputError: the file is unreadable, a value is impossible, or the architecture is not supported.
    """
    data = load_mapping(path, "json")
    return parse_config(data, name, str(path))


def parse_config(data: dict[str, Any], name: str, where: str) -> ModelSpec:
    """Turn the content of a Hugging Face ``config.json`` into a `ModelSpec`; `where` names it in errors."""
    fields = Fields(data, where)
    architecture = _architecture(data, where)
    _refuse_what_changes_the_cost(data, fields)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = _kv_heads(architecture, fields, heads)
    if not fields.has("head_dim") and hidden % heads:
        raise fields.fail("hidden_size", f"must be a multiple of num_attention_heads ({heads}), not {hidden}")
    layers = fields.integer("num_hidden_layers", at_most=10_000)
    bias = fields.boolean("attention_bias", default=False)
    llama_or_qwen3 = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return ModelSpec(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", default=_default_head_dim(architecture, hidden, heads)),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        attention_bias=architecture == "Qwen2ForCausalLM" or (llama_or_qwen3 and bias),
        rope_theta=_rope_theta(data, fields, where),
        rope_scaling=_rope_scaling(data, where),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        sliding_window=_sliding_window(architecture, data, fields, layers),
        architecture=architecture,
        attention_output_bias=llama_or_qwen3 and bias,
        mlp_bias=architecture == "LlamaForCausalLM" and fields.boolean("mlp_bias", default=False),
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


_SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
_LATENT_KEYS = ("kv_lora_rank", "q_lora_rank")
_ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn")


def _architecture(data: dict[str, Any], where: str) -> str:
    """The one supported architecture that the config names, by ``architectures`` or ``model_type``."""
    named = data.get("architectures")
    if named is None and isinstance(data.get("model_type"), str):
        named = [_SUPPORTED.get(data["model_type"], data["model_type"])]
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise InputError(
            f"{where}: names no architecture; a Hugging Face config.json does, as 'architectures'"
        )
    architecture: str = named[0]
    if architecture not in _SUPPORTED.values():
        reason = ""
        if any(key in data for key in _EXPERT_KEYS) or "moe" in architecture.lower():
            reason = " (a mixture of experts)"
        elif any(key in data for key in _LATENT_KEYS):
            reason = " (multi-head latent attention)"
        supported = ", ".join(_SUPPORTED.values())
        raise InputError(
            f"{where}: architecture {reprlib.repr(architecture)}{reason} is not supported; "
            f"supported are {supported}"
        )
    return architecture


def _refuse_what_changes_the_cost(data: dict[str, Any], fields: Fields) -> None:
    """Refuse variants of a supported architecture whose weights or FLOP this arithmetic would get wrong."""
    for key in (*_EXPERT_KEYS, *_LATENT_KEYS):
        if data.get(key):
            raise fields.fail(key, "is set: mixtures of experts and latent attention are not supported")
    quantization = data.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method not in ("fp8", "fbgemm_fp8"):
            raise fields.fail("quantization_config", f"{reprlib.repr(method)} is not supported, only fp8 is")


def _default_head_dim(architecture: str, hidden: int, heads: int) -> int:
    """What ``transformers`` takes when ``head_dim`` is absent."""
    return 128 if architecture == "Qwen3ForCausalLM" else max(1, hidden // heads)


def _kv_heads(architecture: str, fields: Fields, heads: int) -> int:
    # Only for Llama does an absent key mean "as many as query heads"; elsewhere it has fixed defaults that
    # no published config relies on, so it has to be there.
    default = heads if architecture == "LlamaForCausalLM" else None
    kv_heads = fields.integer("num_key_value_heads", default=default)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"must divide num_attention_heads ({heads}), not {kv_heads}")
    return kv_heads


def _rope_theta(data: dict[str, Any], fields: Fields, where: str) -> float:
    """``rope_theta``, which newer configs keep inside ``rope_parameters``."""
    parameters = data.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        return Fields(parameters, f"{where}: rope_parameters").number("rope_theta", at_least=1.0)
    return fields.number("rope_theta", at_least=1.0, default=10_000.0)


def _rope_scaling(data: dict[str, Any], where: str) -> RopeScaling | None:
    """``rope_scaling``, or ``rope_parameters`` in newer configs; None for plain rotary positions."""
    key = "rope_parameters" if data.get("rope_parameters") is not None else "rope_scaling"
    if data.get(key) is None:
        return None
    scaling = Fields(Fields(data, where).mapping(key), f"{where}: {key}")
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    if kind == "default":
        return None
    if kind not in _ROPE_KINDS:
        raise scaling.fail("rope_type", f"'{kind}' is not supported; supported are {', '.join(_ROPE_KINDS)}")
    original = "original_max_position_embeddings"
    return RopeScaling(
        kind=kind,
        factor=scaling.number("factor", at_least=1.0),
        original_max_position_embeddings=scaling.integer(original) if scaling.has(original) else None,
        low_freq_factor=scaling.number("low_freq_factor") if scaling.has("low_freq_factor") else None,
        high_freq_factor=scaling.number("high_freq_factor") if scaling.has("high_freq_factor") else None,
    )


def _sliding_window(architecture: str, data: dict[str, Any], fields: Fields, layers: int) -> int | None:
    """The window of every layer, or None; a window over some of the layers only is refused."""
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        # Absent means 4096 to transformers; null means none.
        if "sliding_window" in data and data["sliding_window"] is None:
            return None
        return fields.integer("sliding_window", default=4096)
    if not fields.boolean("use_sliding_window", default=False) or not fields.has("sliding_window"):
        return None
    first = fields.integer("max_window_layers", at_least=0, default=28)  # layers below it see everything
    if first >= layers:
        return None
    if first > 0:
        raise fields.fail(
            "max_window_layers", "puts a sliding window on some layers only, which is not supported"
        )
    return fields.integer("sliding_window")
