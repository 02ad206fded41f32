"""Attention in parts against attention in one piece, in float64."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from runtime.attention import (  # noqa: E402
    Backend,
    Extent,
    FlashAttention2,
    FlashAttention3,
    TorchCpu,
    choose_backend,
    merge,
)
from specs.errors import InputError  # noqa: E402

BACKENDS = [Backend(), TorchCpu()]


def exact(q, k, v, first_position):
    """Textbook attention in float64: query i sees keys up to position first_position + i."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    tokens, heads, head_dim = q.shape
    out, lse = np.empty((tokens, heads, head_dim)), np.empty((tokens, heads))
    for i in range(tokens):
        for h in range(heads):
            kv_head = h // (heads // k.shape[0])
            scores = k[kv_head, : first_position + i + 1] @ q[i, h] / math.sqrt(head_dim)
            lse[i, h] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[i, h] = np.exp(scores - lse[i, h]) @ v[kv_head, : first_position + i + 1]
    return out, lse


def draw(seed, tokens, keys, heads=4, kv_heads=2, head_dim=16, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, head_dim, generator=generator) * scale
    return q, *torch.randn(2, kv_heads, keys, head_dim, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    prefix=st.integers(0, 100),
    heads=st.sampled_from([(4, 4), (4, 2), (8, 1), (6, 3)]),
    scale=st.sampled_from([1.0, 10.0]),
)
def test_chunk_behind_prefix_is_plain_plus_causal(backend, seed, tokens, prefix, heads, scale):
    q, k, v = draw(seed, tokens, prefix + tokens, *heads, scale=scale)
    parts = [backend.attend(q, k[:, prefix:], v[:, prefix:], causal=True)]
    if prefix:
        parts.append(backend.attend(q, k[:, :prefix], v[:, :prefix], causal=False))
    out, lse = merge(parts)
    wanted_out, wanted_lse = exact(q, k, v, prefix)
    np.testing.assert_allclose(out.numpy(), wanted_out, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), wanted_lse, atol=2e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    keys=st.integers(3, 200),
    cuts=st.lists(st.floats(0, 1), min_size=0, max_size=4),
)
def test_shards_merge_to_the_whole(seed, keys, cuts):
    q, k, v = draw(seed, 3, keys)
    borders = sorted({0, keys, *(int(cut * keys) for cut in cuts)})
    parts = [
        TorchCpu().attend(q, k[:, low:high], v[:, low:high], causal=False) for low, high in pairwise(borders)
    ]
    out, lse = merge(parts)
    wanted_out, wanted_lse = exact(q, k, v, keys)
    np.testing.assert_allclose(out.numpy(), wanted_out, atol=2e-5)
    np.testing.assert_allclose(lse.numpy(), wanted_lse, atol=2e-5)


def test_merging_a_part_without_keys_changes_nothing():
    q, k, v = draw(1, 3, 10)
    out, lse = TorchCpu().attend(q, k, v, causal=False)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for parts in ([(out, lse), nothing], [nothing, (out, lse)]):
        merged, merged_lse = merge(parts)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)


def test_merge_is_exact_for_scores_that_differ_by_more_than_exp_can_hold():
    q, k, v = draw(1, 2, 8, scale=500.0)
    out, _ = merge([TorchCpu().attend(q, k[:, i : i + 1], v[:, i : i + 1], causal=False) for i in range(8)])
    np.testing.assert_allclose(out.numpy(), exact(q, k, v, 8)[0], atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_decodes_of_different_lengths_read_their_own_slots(backend):
    q, k, v = draw(2, 3, 100)
    scattered = torch.tensor([90, 3, 4, 5, 88])
    extents = [Extent(10, 33), Extent(0, 5, scattered), Extent(99, 1)]
    out, _ = backend.decode(q, k, v, extents)
    for row, slots in enumerate([torch.arange(10, 43), scattered, torch.tensor([99])]):
        wanted, _ = exact(q[row : row + 1], k[:, slots], v[:, slots], len(slots))
        np.testing.assert_allclose(out[row : row + 1].numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torchs_kernel_is_chosen_on_the_cpu_in_every_type(dtype):
    assert choose_backend(torch.device("cpu"), dtype, 8, 2, 64).name == "torch-flash-cpu"
    assert choose_backend(torch.device("cpu"), dtype, 8, 2, 64, "reference").name == "reference"


def test_a_back_end_that_isnt_there_is_named():
    with pytest.raises(InputError, match="attention 'flash-attn-3' doesn't work on this cpu; what does"):
        choose_backend(torch.device("cpu"), torch.float32, 4, 2, 16, "flash-attn-3")


def test_bf16_partials_merge_within_bf16_of_float64():
    q, k, v = (x.bfloat16() for x in draw(3, 16, 80))
    backend = TorchCpu()
    out, _ = merge(
        [
            backend.attend(q, k[:, :64], v[:, :64], causal=False),
            backend.attend(q, k[:, 64:], v[:, 64:], causal=True),
        ]
    )
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.float().numpy(), exact(q, k, v, 64)[0], atol=2e-2)


# -- every back end against float64 -----------------------------------------------------------------------


def check_against_float64(backend, device, dtype, tolerance, heads=(8, 2), head_dim=64):
    """A chunk over all keys, a causal chunk, and decodes of different lengths: outputs and log-sum-exps."""
    q, k, v = (x.to(dtype) for x in draw(7, 37, 150, *heads, head_dim=head_dim))
    there = [x.to(device) for x in (q, k, v)]
    extents = [Extent(10, 33), Extent(99, 1), Extent(0, 150), Extent(40, 64)]
    cases = [
        (backend.attend(*there, causal=False), exact(q, k, v, 150)),
        (
            backend.attend(there[0], there[1][:, :37], there[2][:, :37], causal=True),
            exact(q, k[:, :37], v[:, :37], 0),
        ),
    ]
    single = backend.decode(there[0][:4], there[1], there[2], extents)
    rows = [
        exact(q[i : i + 1], k[:, e.start : e.start + e.length], v[:, e.start : e.start + e.length], e.length)
        for i, e in enumerate(extents)
    ]
    cases.append((single, tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))))
    for (out, lse), (wanted_out, wanted_lse) in cases:
        np.testing.assert_allclose(out.double().cpu().numpy(), wanted_out, atol=tolerance)
        np.testing.assert_allclose(lse.double().cpu().numpy(), wanted_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (8, 1)])
def test_back_ends_of_the_cpu(backend, dtype, tolerance, heads):
    check_against_float64(backend, "cpu", dtype, tolerance, heads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["flash-attn-3", "flash-attn-2", "torch-flash-cuda", "reference"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_back_ends_of_a_gpu(name, head_dim):
    try:
        backend = choose_backend(torch.device("cuda"), torch.bfloat16, 8, 2, head_dim, name)
    except InputError as error:
        pytest.skip(str(error))
    check_against_float64(backend, "cuda", torch.bfloat16, 2e-2, head_dim=head_dim)


class FlashPackage:
    """flash-attn's calling conventions, computed by the reference: token-major, log-sum-exps head-major."""

    def __init__(self, returned):
        self.returned = returned

    def flash_attn_func(self, q, k, v, *, causal, return_attn_probs):
        assert return_attn_probs and q.shape[0] == k.shape[0] == 1
        out, lse = Backend().attend(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), causal=causal)
        return (out[None], lse.transpose(0, 1)[None], None)[: self.returned]

    def flash_attn_varlen_func(self, q, k, v, rows, starts, most, longest, *, seqused_k, return_attn_probs):
        assert most == 1 and longest == int(seqused_k.max()) and rows.tolist() == list(range(len(q) + 1))
        extents = [Extent(int(s), int(n)) for s, n in zip(starts, seqused_k, strict=False)]
        out, lse = Backend().decode(q, k.transpose(0, 1), v.transpose(0, 1), extents)
        return out, lse.transpose(0, 1)


def test_flash_attention_3_is_called_as_it_wants_to_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FlashPackage(2))
    check_against_float64(FlashAttention3(), "cpu", torch.float32, 2e-5)


def test_flash_attention_2_is_called_as_it_wants_to_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashPackage(3))
    backend = FlashAttention2()
    q, k, v = draw(5, 9, 60, 8, 2)
    for causal, keys in ((False, 60), (True, 9)):
        out, lse = backend.attend(q, k[:, :keys], v[:, :keys], causal=causal)
        wanted_out, wanted_lse = exact(q, k[:, :keys], v[:, :keys], 0 if causal else 60)
        np.testing.assert_allclose(out.numpy(), wanted_out, atol=2e-5)
        np.testing.assert_allclose(lse.numpy(), wanted_lse, atol=2e-5)
