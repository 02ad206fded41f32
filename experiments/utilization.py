"""How much of the hardware a run made use of."""

from __future__ import annotations

from experiments.build import Experiment
from traces.records import RunRecords


def utilization(records: RunRecords, experiment: Experiment) -> dict[str, float]:
    """``mfu`` and ``mbu`` over the whole run and all GPUs; nothing for a run that took no time.

    - mfu: useful FLOP (matrices, LM head, attention with its causal half) ÷ (time × GPUs × dense peak of the
      weights' dtype). Recomputed tokens count as useful: they were computed.
    - mbu: bytes that had to be read (the weights once an iteration, the KV cache of every query's context
      once a batch) ÷ (time × GPUs × memory bandwidth).
    """
    work, model, device = records.work, experiment.model, experiment.device
    gpu_seconds = records.end_s * experiment.gpus
    if gpu_seconds <= 0.0:
        return {}
    dtype = experiment.config.dtype
    flops = experiment.iteration.flops(work.tokens, work.rows, work.attention_pairs)
    weights_read = model.num_layers * model.layer_linear_weights * (1 if dtype.weight == "fp8" else 2)
    head_read = 2 * model.vocab_size * model.hidden_size  # stays in bf16
    bytes_read = work.iterations * (weights_read + head_read)
    bytes_read += work.kv_tokens_read * model.kv_bytes_per_token(dtype.kv)
    return {
        "mfu": flops / (gpu_seconds * device.peak_flops_for(dtype.weight)),
        "mbu": bytes_read / (gpu_seconds * device.memory_bandwidth_bytes_per_s),
    }
