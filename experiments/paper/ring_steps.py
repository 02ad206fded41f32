"""What a step of a ring would have to take for the paper's figure 5b, and what measured ones lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import fill

from experiments.paper.results import NotThere, Results
from experiments.text import number
from specs import get_model

# How many times as long as SPP + TP the paper's context parallelism takes, by GPUs (figure 5b).
PAPER = {8: 1.10, 16: 1.08, 32: 1.08, 64: 1.29, 128: 1.64}
# Forward passes a second over 8 GPUs with 8,192 tokens each of Llama 3.1 8B's attention: flash-attention
# alone at the same work, a zigzag ring, a striped ring (README of github.com/zhuzilin/ring-flash-attention).
_PUBLIC_RING = {"8 H800": (591.5 / 8, 63.0, 55.0), "8 A100": (373.4 / 8, 38.2, 32.5)}
_GPUS_PER_SERVER = 8

_INTRO = """\
**Beside figure 5b: what a step of the ring would have to take**: of one layer, for CP to be as much slower
as in the paper; a ring has a step for each rank
"""
_MEASURED = """\
What measured rings lost a step: {public} ms (a zigzag and a striped ring each on {names}, against
flash-attention alone; github.com/zhuzilin/ring-flash-attention); {meta} ms (rings of {degrees} servers, 128K
tokens of Llama 3.1 405B, against a perfect split of one server's time, so whatever else doesn't split
perfectly is in it; arXiv 2411.01783).
"""


def ring_steps(figures: Mapping[str, Results]) -> Iterator[str]:
    """The section of the document, in Markdown; nothing if the figures haven't been computed."""
    try:
        rows = [_row(figures, gpus, paper) for gpus, paper in PAPER.items()]
        losses = step_losses_s(figures["5d"])
    except (NotThere, KeyError):
        return
    yield _INTRO
    yield (
        "| GPUs | paper: CP ÷ (SPP + TP) | servers in a ring: here | a step (ms) | needed more (ms) "
        "| GPUs in a ring: here | a step (ms) | needed more (ms) |"
    )
    yield "|---:" * 8 + "|"
    yield from rows
    yield ""
    public = [1.0 / ring / 8 - 1.0 / alone / 8 for alone, *rings in _PUBLIC_RING.values() for ring in rings]
    measured = _MEASURED.format(
        public=", ".join(f"{number(each * 1e3)}" for each in public),
        names=" and ".join(_PUBLIC_RING),
        meta=", ".join(number(each * 1e3) for each in losses.values()),
        degrees=", ".join(map(str, losses)),
    )
    yield fill(measured, 110, break_on_hyphens=False, break_long_words=False)


def step_losses_s(measured: Results) -> dict[int, float]:
    """By degree: seconds that a step of one layer lost against a perfect split of the time without a ring, of
    what others measured."""
    layers = get_model("llama-3.1-405b").num_layers
    times = {
        cell.labels["cp"]: cell.published for cell in measured.figure.cells if cell.labels["tokens"] == "128K"
    }
    alone = times.pop(1)
    return {
        ranks: (time_s - alone / ranks) / (layers * ranks)
        for ranks, time_s in times.items()
        if time_s is not None and alone is not None
    }


def needed_s(cp_s: float, spp_s: float, paper: float, steps: int) -> float:
    """Seconds that a step of one layer of Llama 3 8B would have to take more for ``paper`` times SPP's."""
    return (paper * spp_s - cp_s) / (get_model("llama-3-8b").num_layers * steps)


def _row(figures: Mapping[str, Results], gpus: int, paper: float) -> str:
    spp_s = figures["5b"].get("ttft_s.max", system="SPP + TP", gpus=gpus)
    servers_s = figures["5b"].get("ttft_s.max", system="CP + TP", gpus=gpus)
    gpus_s = figures["5c"].get("ttft_s.max", merged="each step", gpus=gpus)
    cells = [str(gpus), f"{paper:.2f}"]
    for cp_s, ranks in ((servers_s, gpus // _GPUS_PER_SERVER), (gpus_s, gpus)):
        step_s = needed_s(0.0, cp_s, 1.0, ranks)
        more = number(needed_s(cp_s, spp_s, paper, ranks) * 1e3) if ranks > 1 else "no ring"
        cells += [f"{cp_s / spp_s:.2f}", number(step_s * 1e3), more]
    return "| " + " | ".join(cells) + " |"
