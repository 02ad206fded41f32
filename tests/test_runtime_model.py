"""The live model against transformers', whole and in pieces, and what goes wrong with checkpoints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402
from itertools import pairwise  # noqa: E402

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from runtime import layers  # noqa: E402
from runtime.kv_cache import BlockAllocator, PagedKV  # noqa: E402
from runtime.plan import Plan, Slice  # noqa: E402
from runtime.runner import Runner, RunnerSpec  # noqa: E402
from runtime.weights import Part, load_weights  # noqa: E402
from specs import get_model  # noqa: E402
from specs.errors import InputError  # noqa: E402

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
VARIANTS = {
    "grouped": ("Llama", {}),
    "multi-head": ("Llama", {"num_key_value_heads": 4}),
    "multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama3-scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-scaling": ("Llama", {"rope_parameters": LINEAR}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide-heads": ("Llama", {"head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a transformers model and a folder with its weights, once for each variant."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    made = {}

    def make(name, **saving):
        if (name, *saving) not in made:
            family, changes = VARIANTS[name]
            torch.manual_seed(len(made))
            config = getattr(transformers, f"{family}Config")(**BASE | changes)
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            with torch.no_grad():  # norms and biases of a new model are all ones and zeros
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder, **saving)
            made[name, *saving] = model, folder
        return made[name, *saving]

    return make


def make_runner(folder=None, **changes):
    model = get_model(str(folder) if folder else "tiny-llama")
    return Runner(
        RunnerSpec(model, folder if folder else 7, kv_capacity_tokens=1024, keep_logits=True, **changes)
    )


def ids_of(seed, tokens, vocab=160):
    return np.random.default_rng(seed).integers(0, vocab, tokens)


def run_chunks(runner, request, ids, chunks, longest=None):
    """Prefill in ``chunks``; the report of the last one, and the cache left as it is."""
    start = 0
    for tokens in chunks:
        last = start + tokens == len(ids)
        part = Slice(request, start, tokens, longest or len(ids), last)
        report = runner.run(Plan(0, [part], ids[start : start + tokens]))
        start += tokens
    return report


def split(tokens, cuts):
    borders = sorted({0, tokens, *(int(cut * tokens) for cut in cuts)})
    return [high - low for low, high in pairwise(borders)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_single_pass_gives_transformers_logits_at_every_position(checkpoint, name):
    model, folder = checkpoint(name)
    ids = ids_of(1, 150)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    runner = make_runner(folder)
    for position in (0, 1, 40, 149):
        report = run_chunks(runner, position, ids[: position + 1], [position + 1])
        np.testing.assert_allclose(report.logits[0], wanted[position], atol=1e-4, rtol=0)
        assert report.tokens == [(position, wanted[position].argmax())]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12), st.integers(1, 120), st.integers(0, 100))
def test_any_chunking_gives_the_same_logits(cuts, tokens, seed):
    runner = _shared_runner()
    ids = ids_of(seed, tokens, 4096)
    whole = run_chunks(runner, 0, ids, [tokens])
    runner.model.cache.release(0)
    pieces = run_chunks(runner, 1, ids, split(tokens, cuts))
    runner.model.cache.release(1)
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=1e-4, rtol=0)
    assert pieces.tokens[0][1] == whole.tokens[0][1]


_runners = {}


def _shared_runner():
    if "tiny" not in _runners:
        _runners["tiny"] = make_runner()
    return _runners["tiny"]


def test_generation_equals_transformers_greedy(checkpoint):
    model, folder = checkpoint("grouped")
    ids = ids_of(3, 40)
    with torch.no_grad():
        wanted = model.generate(
            torch.from_numpy(ids)[None], max_new_tokens=30, do_sample=False, eos_token_id=None
        )
    runner = make_runner(folder)
    token = run_chunks(runner, 0, ids, [16, 16, 8], longest=70).tokens[0][1]
    got = [token]
    for position in range(40, 69):
        report = runner.run(Plan(0, [Slice(0, position, 1, 70, True)], np.array([token])))
        token = report.tokens[0][1]
        got.append(token)
    assert got == wanted[0, 40:].tolist()


def test_a_mixed_batch_gives_each_request_what_it_gets_alone():
    """Two chunks behind prefixes, a fresh prompt, and three decodes of different lengths, in one batch."""
    runner = _shared_runner()
    prompts = [ids_of(10 + i, n, 4096) for i, n in enumerate((90, 50, 30, 64, 17, 3))]
    first = [60, 20, 0, 63, 16, 2]  # tokens that earlier batches computed
    for request, (ids, done) in enumerate(zip(prompts, first, strict=True)):
        if done:
            runner.run(Plan(0, [Slice(request, 0, done, 100, False)], ids[:done]))
    slices = [
        Slice(i, done, len(ids) - done, 100, True)
        for i, (ids, done) in enumerate(zip(prompts, first, strict=True))
    ]
    mixed = runner.run(
        Plan(1, slices, np.concatenate([ids[done:] for ids, done in zip(prompts, first, strict=True)]))
    )
    found = {request: logits for (request, _), logits in zip(mixed.tokens, mixed.logits, strict=True)}
    assert sorted(found) == list(range(6))
    runner.run(Plan(2, [], np.zeros(0, dtype=np.int64), freed=list(range(6))))
    assert not runner.model.cache.tables
    for request, ids in enumerate(prompts):
        alone = run_chunks(runner, 100 + request, ids, [len(ids)])
        np.testing.assert_allclose(found[request], alone.logits[0], atol=1e-4, rtol=0)
        runner.model.cache.release(100 + request)


def test_scattered_blocks_change_nothing():
    runner = make_runner()
    ids = ids_of(5, 300, 4096)
    wanted = run_chunks(runner, 0, ids, [300]).logits
    runner.model.cache.release(0)
    for request in range(1, 63):  # leave every second block free, and one more
        run_chunks(runner, request, ids[:16], [16])
    for request in range(1, 63, 2):
        runner.model.cache.release(request)
    got = run_chunks(runner, 99, ids, [100, 150, 49, 1])
    assert not runner.model.cache.tables[99].contiguous
    np.testing.assert_allclose(got.logits, wanted, atol=1e-4, rtol=0)


def test_bf16_is_close_to_fp32_and_reproducible():
    ids = ids_of(6, 80, 4096)
    exact = run_chunks(_shared_runner(), 0, ids, [80]).logits
    _shared_runner().model.cache.release(0)
    first, second = (run_chunks(make_runner(dtype="bf16"), 0, ids, [30, 50]).logits for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - exact).max() < 0.15 * np.abs(exact).max()


# -- weights --------------------------------------------------------------------------------------------


def test_shards_of_a_seed_are_parts_of_the_same_weights():
    model, cpu = get_model("tiny-llama"), torch.device("cpu")
    whole = load_weights(model, 3, Part.whole(model), torch.float32, cpu)
    other = load_weights(model, 4, Part.whole(model), torch.float32, cpu)
    assert not torch.equal(whole.layers[0].down, other.layers[0].down)
    shards = [load_weights(model, 3, Part(2, 2, False, True, rank, 2), torch.float32, cpu) for rank in (0, 1)]
    assert shards[0].embedding is None
    assert torch.equal(torch.cat([s.lm_head for s in shards]), whole.lm_head)
    for ours, theirs in zip(zip(*(s.layers for s in shards), strict=True), whole.layers[2:], strict=True):
        assert torch.equal(torch.cat([w.out for w in ours], dim=1), theirs.out)
        assert torch.equal(torch.cat([w.down for w in ours], dim=1), theirs.down)
        q, k, v = (
            torch.cat(parts) for parts in zip(*(w.qkv.split([128, 64, 64]) for w in ours), strict=True)
        )
        assert torch.equal(torch.cat([q, k, v]), theirs.qkv)


def test_a_sharded_checkpoint_is_read_by_its_index(checkpoint):
    model, folder = checkpoint("grouped", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ids = ids_of(2, 20)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(run_chunks(make_runner(folder), 0, ids, [20]).logits[0], wanted, atol=1e-4)


def damaged(folder, tmp_path, *, tensors=None, config=None, file=None):
    """A copy of a checkpoint folder with something changed."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path)
    if tensors is not None:
        tensors(weights)
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    if file is not None:
        file(tmp_path / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | (config or {})))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": lambda w: w.pop("model.norm.weight")}, "tensor model.norm.weight is missing"),
        (
            {"tensors": lambda w: w.update({"model.norm.weight": torch.ones(65)})},
            r"model.norm.weight has shape \(65,\), not \(64,\) as config.json says",
        ),
        ({"file": lambda path: path.write_bytes(path.read_bytes()[:1000])}, "cannot be read as safetensors"),
        ({"file": lambda path: path.unlink()}, "holds neither model.safetensors nor"),
        ({"config": {"architectures": ["MixtralForCausalLM"]}}, "MixtralForCausalLM.*is not supported"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_clear_line(checkpoint, tmp_path, change, message):
    _, folder = checkpoint("grouped")
    with pytest.raises(InputError, match=message) as caught:
        make_runner(damaged(folder, tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_the_folder_of_another_model_is_refused(checkpoint):
    _, folder = checkpoint("grouped")
    with pytest.raises(InputError, match=r"config.json: num_layers is 2, but the model tiny-llama has 4"):
        Runner(RunnerSpec(get_model("tiny-llama"), folder))


def test_nan_in_the_logits_is_an_error(checkpoint, tmp_path):
    _, folder = checkpoint("grouped")

    def spoil(weights):
        weights["model.layers.0.mlp.down_proj.weight"][3, 3] = math.nan

    runner = make_runner(damaged(folder, tmp_path, tensors=spoil))
    with pytest.raises(InputError, match="NaN in the logits of request 5 at position 9: the weights"):
        run_chunks(runner, 5, ids_of(1, 9), [9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int4"}, "dtype: 'int4' is not executed"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not here; torch sees"),
    ],
)
def test_what_cannot_be_executed_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        make_runner(**changes)


def test_a_sliding_window_is_refused():
    model = replace(get_model("tiny-llama"), sliding_window=128)
    with pytest.raises(InputError, match="a sliding window"):
        Runner(RunnerSpec(model))


# -- sampling -------------------------------------------------------------------------------------------


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    numbers = torch.tensor([layers.uniform(1, 2, position) for position in range(20_000)])
    tokens = layers.sample(logits.expand(len(numbers), -1), 0.7, numbers)
    found = np.bincount(tokens.numpy(), minlength=5) / len(numbers)
    wanted = torch.softmax(logits[0] / 0.7, -1).numpy()
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(numbers))).all()


def test_a_request_samples_the_same_whatever_shares_its_batch():
    ids = [ids_of(20 + i, 12, 4096) for i in range(3)]
    runner = make_runner(temperature=1.0, seed=5)
    alone = [run_chunks(runner, i, ids[i], [12]).tokens[0] for i in range(3)]
    runner.run(Plan(0, [], np.zeros(0, dtype=np.int64), freed=[0, 1, 2]))
    together = runner.run(
        Plan(1, [Slice(i, 0, 12, 12, True) for i in (2, 0, 1)], np.concatenate([ids[2], ids[0], ids[1]]))
    )
    assert sorted(together.tokens) == alone
    other_seed = make_runner(temperature=1.0, seed=6)
    assert [run_chunks(other_seed, i, ids[i], [12]).tokens[0] for i in range(3)] != alone


# -- the KV cache ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(0, 60)), max_size=60))
def test_no_two_requests_share_a_slot_and_none_is_lost(steps):
    cache = PagedKV(
        1, 1, 2, capacity_tokens=250, block_tokens=4, dtype=torch.float32, device=torch.device("cpu")
    )
    for request, tokens, longest in steps:
        table = cache.tables.get(request)
        held = sum(len(t.blocks) for t in cache.tables.values())
        length = table.length if table else 0
        needed = -(-(length + tokens) // 4) - (len(table.blocks) if table else 0)
        if held + needed > 62:
            cache.release(request)
            continue
        table = cache.extend(request, tokens, longest)
        assert table.length == length + tokens
        slots = torch.cat([torch.as_tensor(cache.slots(t, 0, t.length)) for t in cache.tables.values()])
        assert len(slots.unique()) == len(slots) == sum(t.length for t in cache.tables.values())
        extent = cache.extent(table, table.length)
        own = torch.as_tensor(cache.slots(table, 0, table.length))
        listed = (
            extent.slots
            if extent.slots is not None
            else torch.arange(extent.start, extent.start + extent.length)
        )
        assert torch.equal(listed, own)
    for request in list(cache.tables):
        cache.release(request)
    assert cache.extend(0, 248, 248).contiguous


def test_blocks_stay_together_while_there_is_room():
    allocator = BlockAllocator(40)
    tables = [allocator.place(2, 10) for _ in range(4)]
    for _ in range(8):
        for blocks in tables:
            allocator.grow(blocks, 1)
    assert [blocks == list(range(10 * i, 10 * i + 10)) for i, blocks in enumerate(tables)] == [True] * 4
