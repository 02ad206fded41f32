"""How exact attention in parts is, on this device and in this type: against one pass in double precision."""

from __future__ import annotations

import torch

from runtime.attention import Backend, Extent, merge
from specs.models import ModelSpec

CHUNK, KEYS = 48, 4096
SHARDS = (1, 2, 4)


def exactness(model: ModelSpec, backend: Backend, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Largest error of a chunk over a KV cache cut into shards and merged, for each number of shards, and of
    a decode; the reference is a single pass over all keys in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    heads, kv_heads, d = model.num_heads, model.num_kv_heads, model.head_dim
    q, k, v = draw(CHUNK, heads, d), draw(kv_heads, KEYS, d), draw(kv_heads, KEYS, d)
    wanted, _ = Backend().attend(q.double(), k.double(), v.double(), causal=False)
    q, k, v = q.to(device), k.to(device), v.to(device)
    found = {}
    with torch.inference_mode():
        for shards in SHARDS:
            size = KEYS // shards
            parts = []
            for i in range(shards):
                extent = Extent(i * size, size)
                parts.append(backend.attend(q, extent.of(k), extent.of(v), causal=False))
            error = (merge(parts)[0].double().cpu() - wanted).abs().max()
            found[f"largest error of attention over {shards} shards"] = f"{float(error):.1e}"
        single, _ = backend.decode(q[:1], k, v, [Extent(0, KEYS)])
        error = (single.double().cpu() - wanted[:1]).abs().max()
        found["largest error of a decode"] = f"{float(error):.1e}"
    return found
