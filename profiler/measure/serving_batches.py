"""The batches that a bench has the engine serve over and over, to time whole iterations and the host."""

from __future__ import annotations

import numpy as np

from traces.workload import Workload

PROMPT_TOKENS = 32  # of requests that decode
CHUNKS = 4  # of each prompt that is taken in beside them
STAGES = 2  # of the pipeline in which the gap between a later stage's batches is timed
STEPS = 16  # of a run; where the machine is disturbed in one, none of them counts


def workload_of(requests: int, chunk: int, at_a_time: int = 1) -> Workload:
    """Requests that decode, and after them, in the queue, prompts of a few chunks each; enough for so many
    such batches at a time: one in each stage of a pipeline, or in each KVP group."""
    decodes = (requests - bool(chunk)) * at_a_time
    prompts = [PROMPT_TOKENS] * decodes
    outputs = [_output_tokens(decodes, chunk)] * decodes
    if chunk:
        prompts += [CHUNKS * chunk] * (STEPS // CHUNKS * at_a_time)
        outputs += [1] * (STEPS // CHUNKS * at_a_time)
    return _workload(prompts, outputs)


def lone_prompts(chunk: int) -> Workload:
    """Prompts of a single chunk, to be sent one after the other."""
    return _workload([chunk] * (STEPS // 2), [1] * (STEPS // 2))


def contexts_of(requests: int, chunk: int, *, is_idle: bool) -> tuple[int, int]:
    """Mean tokens behind a chunk, and of all decodes together, over the batches of such a workload."""
    decodes = requests - bool(chunk)
    decoded = decodes * (PROMPT_TOKENS + _output_tokens(decodes, chunk) // 2)
    return (0 if is_idle else chunk * (CHUNKS - 1) // 2), decoded


def _output_tokens(decodes: int, chunk: int) -> int:
    # Their prompts come in beside each other's decodes, which takes a while if chunks are small.
    return STEPS + 2 + (decodes * PROMPT_TOKENS // chunk if chunk else 0)


def _workload(prompts: list[int], outputs: list[int]) -> Workload:
    return Workload(
        prompt_tokens=np.array(prompts, dtype=np.int32),
        output_tokens=np.array(outputs, dtype=np.int32),
        arrival_s=np.zeros(len(prompts)),
        slo_class=None,
    )
