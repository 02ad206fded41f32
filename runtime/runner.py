"""One rank at work: a plan comes in, a report goes out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.sharding import Sharding
from runtime import layers
from runtime.attention import choose_backend
from runtime.core_probe import CoreProbe
from runtime.distributed import Mesh
from runtime.kv_cache import PagedKV
from runtime.model import Model, check_model
from runtime.plan import Inputs, KVGroups, Plan, make_inputs
from runtime.weights import Part, load_weights
from specs import ModelSpec, ParallelSpec
from specs.errors import InputError

_PROBE_OPERATIONS = 15
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """What is executed, and how.

    Attributes:
        weights: a seed, or a local Hugging Face folder.
        device: cpu, cuda, or cuda:0 and so on.
        kv_capacity_tokens: tokens that the KV cache of each group holds.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
        threads: threads of torch in each rank on a CPU. Several wait for each other in every operator, so
            that on a machine with other work a batch may take a hundred times as long: one is predictable.
        timeout_s: how long a rank may go without an answer before it counts as hung.
        keep_logits: return the logits with every sampled token.
    """

    model: ModelSpec
    weights: int | Path = 0
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    dtype: str = "fp32"
    device: str = "cpu"
    attention: str = "auto"
    kv_capacity_tokens: int = 65536
    block_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    threads: int = 1
    timeout_s: float = 60.0
    keep_logits: bool = False

    @property
    def ranks(self) -> int:
        return self.parallel.gpus_per_replica


class Report(NamedTuple):
    """A rank is through with a plan.

    Attributes:
        tokens: (request, token) sampled by this rank.
        launch_s: time the host took to prepare the inputs.
        execute_s: time in the layers and the collectives, from when the activations were there.
        sample_s: time in the LM head and the sampling.
        logits: [len(tokens), vocab] if they are kept.
        probe_s: what a probe of the core took just before, within ``launch_s``; 0 if none was taken.
    """

    plan: int
    tokens: list[tuple[int, int]]
    launch_s: float
    execute_s: float
    sample_s: float
    logits: NDArray[np.float32] | None = None
    probe_s: float = 0.0


class Runner:
    """Executes plans, one after the other, on the rank that ``mesh`` says.

    Raises:
        InputError: the model isn't executed, its weights are wrong, or the device or its memory is missing.
    """

    def __init__(self, spec: RunnerSpec, mesh: Mesh | None = None) -> None:
        self.spec = spec
        self.mesh = mesh = mesh or Mesh(spec.parallel)
        self.device = find_device(spec.device)
        torch.set_num_threads(spec.threads)
        model, parallel = spec.model, spec.parallel
        check_model(model, parallel)
        if spec.dtype not in DTYPES:
            raise InputError(f"dtype: '{spec.dtype}' is not executed; {', '.join(DTYPES)} are")
        dtype = DTYPES[spec.dtype]
        stage_layers = parallel.layers_of_stage(model)
        part = Part(
            first_layer=sum(stage_layers[: mesh.stage]),
            num_layers=stage_layers[mesh.stage],
            is_first=mesh.stage == 0,
            is_last=mesh.stage == parallel.spp - 1,
            tp_rank=mesh.shard,
            tp=parallel.tp,
        )
        heads, kv_heads = model.num_heads // parallel.tp, model.num_kv_heads // parallel.tp
        try:
            weights = load_weights(model, spec.weights, part, dtype, self.device)
            cache = PagedKV(
                part.num_layers,
                kv_heads,
                model.head_dim,
                capacity_tokens=spec.kv_capacity_tokens,
                block_tokens=spec.block_tokens,
                dtype=dtype,
                device=self.device,
            )
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise InputError(
                f"model {model.name} and {spec.kv_capacity_tokens} tokens of KV cache do not fit the memory "
                f"of {self.device}: {str(error).splitlines()[0]}"
            ) from None
        backend = choose_backend(self.device, dtype, heads, kv_heads, model.head_dim, spec.attention)
        self.model = Model(model, weights, cache, backend, mesh)
        self.groups = KVGroups(Sharding(parallel.kvp, parallel.kvp_tokens_per_group), mesh.group)
        self._dtype = dtype
        on_core = self.device.type == "cpu"
        self._core = CoreProbe(_PROBE_OPERATIONS) if on_core else None

    @torch.inference_mode()
    def run(self, plan: Plan) -> Report:
        """Execute this rank's part of ``plan``.

        Raises:
            InputError: there is a NaN in the logits.
        """
        mesh, is_last = self.mesh, self.mesh.stage == self.mesh.spp - 1
        began_s = time.perf_counter()
        probe_s = self._core.duration_s() if plan.probe and self._core is not None else 0.0
        inputs = make_inputs(plan, self.model.cache, self.groups, self.device)
        launch_s = time.perf_counter() - began_s
        if inputs.tokens == 0:  # other groups have work, this one is free
            return Report(plan.id, [], launch_s, 0.0, 0.0, probe_s=probe_s)
        if mesh.stage == 0:
            began_s = time.perf_counter()
            x = self.model.embed(inputs)
        else:
            x = torch.empty(inputs.tokens, self.spec.model.hidden_size, dtype=self._dtype, device=self.device)
            mesh.receive(x)
            began_s = time.perf_counter()
        x = self.model.forward(x, inputs)
        self._synchronize()
        execute_s = time.perf_counter() - began_s
        if not is_last:
            mesh.send_on(x)
            return Report(plan.id, [], launch_s, execute_s, 0.0, probe_s=probe_s)
        began_s = time.perf_counter()
        tokens, logits = self._sample(x, inputs)
        sample_s = time.perf_counter() - began_s
        return Report(plan.id, tokens, launch_s, execute_s, sample_s, logits, probe_s)

    def _sample(self, x: Tensor, inputs: Inputs) -> tuple[list[tuple[int, int]], NDArray[np.float32] | None]:
        if not inputs.sampled:
            return [], None
        logits = self.model.logits(x[inputs.sampled_rows])
        if self.mesh.shard != 0:
            return [], None
        largest, tokens = layers.sample_greedy(logits)
        if self.spec.temperature > 0.0:
            numbers = [layers.uniform(self.spec.seed, request, at) for request, at in inputs.sampled]
            uniforms = torch.tensor(numbers, dtype=torch.float32, device=self.device)
            tokens = layers.sample(logits, self.spec.temperature, uniforms)
        wrong = torch.isnan(largest).tolist()
        if any(wrong):
            request, position = inputs.sampled[wrong.index(True)]
            raise InputError(
                f"NaN in the logits of request {request} at position {position}: the weights "
                f"({self.spec.weights}) are damaged, or {self.spec.dtype} is too narrow for them"
            )
        requests = [request for request, _ in inputs.sampled]
        kept = logits.float().cpu().numpy() if self.spec.keep_logits else None
        return list(zip(requests, tokens.tolist(), strict=True)), kept

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def find_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: '{name}' is not one of cpu, cuda, cuda:0, …") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device: '{name}' is not here; torch sees {count} GPUs")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise InputError(f"device: '{name}' is not executed; cpu and cuda are")
    return device
