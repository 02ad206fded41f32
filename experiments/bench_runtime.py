"""How fast the live runtime is, measured: `make bench` prints this table after the simulator's.

One request at a time, beside transformers' own ``generate`` with the same weights and one thread each. They
take turns, so that a slow moment of the machine meets both. And how long the scheduler's decisions take while
it serves.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.build import Experiment, build
from experiments.live import live_setup, serve_live
from experiments.load import load_config
from specs import ModelSpec
from traces.workload import Workload

CONFIG = Path(__file__).parent / "validate" / "preemption.yaml"
SHAPES = ((64, 64), (2048, 64))  # prompt and output tokens
REPEATS = 9

FloatArray = NDArray[np.float64]


def main() -> int:
    """Measure, print, and fail if the runtime is slower than nine tenths of transformers."""
    experiment = build(load_config(CONFIG), str(CONFIG))
    print(f"{'':58} {'median':>10} {'min':>10} {'max':>10}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = _Transformers(experiment.model, Path(folder))
        ours = _Runtime(experiment, Path(folder))
        for prompt_tokens, output_tokens in SHAPES:
            pairs = []
            for _ in range(REPEATS + 1):
                shape = prompt_tokens, output_tokens
                pairs.append((ours.seconds(*shape), theirs.seconds(*shape)))
            ours_s, theirs_s = np.array(pairs[1:]).T  # the first one warms up
            what = f"prompt of {prompt_tokens:,}"
            _print(f"live runtime, one request, {what}", output_tokens / ours_s, "tokens/s")
            _print(f"  as a multiple of transformers' generate, {what}", theirs_s / ours_s, "x")
            ratios.append(float(np.median(theirs_s / ours_s)))
    decisions_s = _decisions(experiment)
    _print("  decision of the scheduler while serving, each", 1e3 * decisions_s, "ms")
    _print("  of those, the 99th percentile", 1e3 * np.quantile(decisions_s, [0.99]), "ms")
    if min(ratios) < 0.9:
        print(f"bench_runtime: {min(ratios):.2f} of transformers' speed, below 0.9", file=sys.stderr)
        return 1
    return 0


def _print(name: str, values: FloatArray, unit: str) -> None:
    print(f"{name:58} {np.median(values):>10,.4g} {values.min():>10,.4g} {values.max():>10,.4g}  {unit}")


class _Transformers:
    """The reference, with random weights that it leaves in a folder."""

    def __init__(self, model: ModelSpec, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        config = transformers.LlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_context_tokens,
            tie_word_embeddings=model.tie_word_embeddings,
        )
        self._torch = torch
        model_of: Any = transformers.LlamaForCausalLM
        self._model = model_of(config).eval()
        self._model.save_pretrained(folder)

    def seconds(self, prompt_tokens: int, output_tokens: int) -> float:
        """From the prompt to the last token."""
        torch = self._torch
        prompt = torch.randint(0, self._model.config.vocab_size, (1, prompt_tokens))
        began_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - began_s


class _Runtime:
    """The live engine, scheduler and records included."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        from runtime.executors import LocalExecutor

        setup = live_setup(experiment)
        self._setup = replace(
            setup,
            runner=replace(setup.runner, weights=folder),
            scheduler=replace(setup.scheduler, chunking="whole"),
        )
        self._executor = LocalExecutor(self._setup.runner)

    def seconds(self, prompt_tokens: int, output_tokens: int) -> float:
        """From arrival to the last token."""
        from runtime.engine import Engine

        request = Workload(np.array([prompt_tokens]), np.array([output_tokens]), np.zeros(1))
        return float(Engine(request, self._setup, self._executor).run().e2e_s[0])


def _decisions(experiment: Experiment) -> FloatArray:
    """Seconds that the scheduler took for each batch of a live run."""
    return np.asarray(serve_live(experiment).host["schedule_s"])


if __name__ == "__main__":
    sys.exit(main())
