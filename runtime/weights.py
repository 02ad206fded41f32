"""Weights of one rank: drawn from a seed, or read from a Hugging Face folder; only the rank's own part."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specs import ModelSpec, get_model
from specs.errors import InputError

_HF = "model.layers.{layer}."


class Part(NamedTuple):
    """What a rank holds: a range of layers, and share ``tp_rank`` of ``tp`` of each layer."""

    first_layer: int
    num_layers: int
    is_first: bool = True
    is_last: bool = True
    tp_rank: int = 0
    tp: int = 1

    @staticmethod
    def whole(model: ModelSpec) -> Part:
        return Part(0, model.num_layers)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's share. Matrices are [out, in]; q, k and v are one matrix, and so are gate and up."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """A rank's weights. The embedding is there in the first stage, final norm and LM head in the last."""

    layers: tuple[LayerWeights, ...]
    embedding: Tensor | None
    final_norm: Tensor | None
    lm_head: Tensor | None  # rows of the vocabulary that this tensor-parallel rank computes


Cut = tuple[int, int, int]  # dimension, first index, length
Read = Callable[[str, tuple[int, ...], Cut | None], Tensor]
"""Reads tensor ``name``, which must have the full ``shape``, and returns the cut of it."""


def load_weights(
    model: ModelSpec, source: int | Path, part: Part, dtype: torch.dtype, device: torch.device
) -> Weights:
    """The weights of ``part``, from a seed or from the Hugging Face folder ``source``.

    Raises:
        InputError: the folder's files are missing or unreadable, its config is another model's, a tensor is
            missing or has another shape.
    """
    with ExitStack() as stack:
        if isinstance(source, Path):
            read = _folder_reader(model, source, stack)
        else:
            read = _seed_reader(source, device)

        def fetch(name: str, shape: tuple[int, ...], cut: Cut | None = None) -> Tensor:
            return read(name, shape, cut).to(device, dtype).contiguous()

        layers = range(part.first_layer, part.first_layer + part.num_layers)
        embedding_name, embedding_shape = "model.embed_tokens.weight", (model.vocab_size, model.hidden_size)
        embedding = fetch(embedding_name, embedding_shape) if part.is_first else None
        final_norm = lm_head = None
        if part.is_last:
            final_norm = fetch("model.norm.weight", (model.hidden_size,))
            head_name = embedding_name if model.tie_word_embeddings else "lm_head.weight"
            if model.tie_word_embeddings and embedding is not None and part.tp == 1:
                lm_head = embedding
            else:
                lm_head = fetch(head_name, embedding_shape, _share(0, model.vocab_size, part))
        return Weights(
            tuple(_layer(fetch, model, index, part) for index in layers), embedding, final_norm, lm_head
        )


def _layer(fetch: Callable[..., Tensor], model: ModelSpec, index: int, part: Part) -> LayerWeights:
    hidden, inter, q_size, kv_size = (
        model.hidden_size,
        model.intermediate_size,
        model.query_size,
        model.kv_size,
    )
    prefix = _HF.format(layer=index)

    def rows(names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
        """Column-parallel: the rank's rows of several matrices, as one."""
        return torch.cat(
            [
                fetch(f"{prefix}{name}.weight", (size, hidden), _share(0, size, part))
                for name, size in zip(names, sizes, strict=True)
            ]
        )

    def rows_bias(names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
        return torch.cat(
            [
                fetch(f"{prefix}{name}.bias", (size,), _share(0, size, part))
                for name, size in zip(names, sizes, strict=True)
            ]
        )

    def columns(name: str, size: int) -> Tensor:
        """Row-parallel: the rank's columns; the products are summed over the ranks."""
        return fetch(f"{prefix}{name}.weight", (hidden, size), _share(1, size, part))

    def added_once(name: str, present: bool) -> Tensor | None:
        """The bias of a row-parallel matrix, on one rank only."""
        return fetch(f"{prefix}{name}.bias", (hidden,)) if present and part.tp_rank == 0 else None

    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q_size, kv_size, kv_size)
    mlp = ("mlp.gate_proj", "mlp.up_proj"), (inter, inter)
    head = (model.head_dim,)
    return LayerWeights(
        attention_norm=fetch(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=rows(*attention),
        qkv_bias=rows_bias(*attention) if model.attention_bias else None,
        q_norm=fetch(f"{prefix}self_attn.q_norm.weight", head) if model.qk_norm else None,
        k_norm=fetch(f"{prefix}self_attn.k_norm.weight", head) if model.qk_norm else None,
        out=columns("self_attn.o_proj", q_size),
        out_bias=added_once("self_attn.o_proj", model.attention_output_bias),
        mlp_norm=fetch(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        gate_up=rows(*mlp),
        gate_up_bias=rows_bias(*mlp) if model.mlp_bias else None,
        down=columns("mlp.down_proj", inter),
        down_bias=added_once("mlp.down_proj", model.mlp_bias),
    )


def lm_head_is_split(model: ModelSpec, tp: int) -> bool:
    """Whether each tensor-parallel rank computes its share of the vocabulary; if it can't be cut evenly,
    every rank computes all of it."""
    return tp > 1 and model.vocab_size % tp == 0


def _share(dimension: int, size: int, part: Part) -> Cut | None:
    if part.tp == 1 or size % part.tp:
        return None
    return dimension, part.tp_rank * (size // part.tp), size // part.tp


# -- from a seed ----------------------------------------------------------------------------------------


def _seed_reader(seed: int, device: torch.device) -> Read:
    """Each tensor is drawn whole from a stream of its own, so that every cut gives the same model.

    Matrices have variance 1 / fan-in and norms are near 1, so that activations keep their size through the
    layers and every part of the model shows in the logits.
    """

    def read(name: str, shape: tuple[int, ...], cut: Cut | None) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        full = torch.randn(shape, generator=generator, device=device)
        if "norm" in name:
            full = full.mul_(0.1).add_(1.0)
        elif len(shape) == 2 and "embed_tokens" not in name:
            full = full.mul_(1.0 / math.sqrt(shape[1]))
        elif len(shape) == 1:
            full = full.mul_(0.1)
        return full if cut is None else full.narrow(*cut)

    return read


# -- from a folder --------------------------------------------------------------------------------------


def _folder_reader(model: ModelSpec, folder: Path, stack: ExitStack) -> Read:
    found = get_model(str(folder))
    for key in ("architecture", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
                "intermediate_size", "vocab_size", "tie_word_embeddings"):  # fmt: skip
        if getattr(found, key) != getattr(model, key):
            raise InputError(
                f"{folder / 'config.json'}: {key} is {getattr(found, key)}, but the model {model.name} has "
                f"{getattr(model, key)}"
            )
    files = _tensor_files(folder)
    opened: dict[Path, Any] = {}

    def read(name: str, shape: tuple[int, ...], cut: Cut | None) -> Tensor:
        if name not in files:
            raise InputError(f"{folder}: tensor {name} is missing")
        path = files[name]
        if path not in opened:
            opened[path] = stack.enter_context(_open(path))
        try:
            tensor = opened[path].get_slice(name)
        except Exception as error:  # safetensors raises its own kind
            raise InputError(f"{path}: tensor {name} cannot be read ({error})") from None
        if tuple(tensor.get_shape()) != shape:
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(tensor.get_shape())}, not {shape} as config.json "
                "says"
            )
        dimension, start, length = cut or (0, 0, shape[0])
        taken: Tensor = tensor[(slice(None),) * dimension + (slice(start, start + length),)]
        return taken

    return read


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor: by the index of a sharded checkpoint, or all in one file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): folder / Path(str(file)).name for name, file in names.items()}
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise InputError(f"{index}: is no index of a sharded checkpoint ({error})") from None
    single = folder / "model.safetensors"
    if not single.is_file():
        raise InputError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from None
