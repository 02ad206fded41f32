"""What was found here for each claim of the paper; claims.yaml says what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from experiments.paper.figures import FOLDER
from experiments.paper.results import NotThere, Results
from experiments.paper.ring_steps import PAPER as PAPER_CP
from experiments.text import number, percent, seconds

Figures = Mapping[str, Results]

_EAGER = "each step, eagerly"


@dataclass(frozen=True, slots=True)
class Found:
    """Ours beside the paper's.

    Attributes:
        text: our number, in words.
        ratio: ours ÷ the paper's, where both are one number.
    """

    text: str
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of the paper.

    Attributes:
        figures: where.
        paper: what it says.
        remark: on how ours differs, written by people who looked at it.
        find: ours; raises ``NotThere`` where it hasn't been computed.
    """

    id: str
    figures: str
    paper: str
    find: Callable[[Figures], Found]
    remark: str = ""


def compare(figures: Figures, claim: Claim) -> Found | None:
    """What was found for a claim; None if it hasn't been computed."""
    try:
        return claim.find(figures)
    except (NotThere, KeyError):
        return None


def _p1(figures: Figures) -> Found:
    small, large = (
        figures["3b"].get("attention_s", model="llama-3-70b", chunk=chunk) / chunk for chunk in (32, 2048)
    )
    other = figures["3b"].get("attention_s", model="llama-3-8b", chunk=32) / 32
    other /= figures["3b"].get("attention_s", model="llama-3-8b", chunk=2048) / 2048
    return Found(f"{percent(small / large - 1)} (8B: {percent(other - 1)})", (small / large) / 1.11)


def _p2(figures: Figures) -> Found:
    ratios = [
        figures["3a"].get("longest_batch_s", system="CP", gpus=gpus)
        / figures["3a"].get("longest_batch_s", system="Medha", gpus=gpus)
        for gpus in figures["3a"].labels("gpus")
    ]
    alone = [
        figures["5c"].get("longest_batch_s", merged=_EAGER, gpus=gpus)
        / figures["3a"].get("longest_batch_s", system="Medha", gpus=gpus)
        for gpus in figures["3a"].labels("gpus")
    ]
    text = f"{number(min(ratios))}–{number(max(ratios))}×"
    return Found(f"{text}; rings of single GPUs: {number(min(alone))}–{number(max(alone))}×")


def _p3(figures: Figures) -> Found:
    found = figures["3b"].get("total_s", model="llama-3-8b", chunk=512)
    return Found(seconds(found), found / 0.25)


def _p4(figures: Figures) -> Found:
    spp = [figures["5b"].get("ttft_s.max", system="SPP + TP", gpus=gpus) for gpus in PAPER_CP]
    servers = [figures["5b"].get("ttft_s.max", system="CP + TP", gpus=gpus) for gpus in PAPER_CP]
    eager, step = (
        [figures["5c"].get("ttft_s.max", merged=merged, gpus=gpus) for gpus in PAPER_CP]
        for merged in (_EAGER, "each step")
    )
    apart = [cp / own / paper for cp, own, paper in zip(eager, spp, PAPER_CP.values(), strict=True)]
    text = (
        f"rings of single GPUs, merged as in public code: {_ratios(eager, spp)}; merged by one kernel a "
        f"step: {_ratios(step, spp)}; rings of servers with TP8: {_ratios(servers, spp)}"
    )
    return Found(text, max(apart, key=lambda ratio: abs(ratio - 1)))


def _ratios(times: Sequence[float], others: Sequence[float]) -> str:
    return ", ".join(f"{one / other:.2f}" for one, other in zip(times, others, strict=True)) + "×"


def _p5(figures: Figures) -> Found:
    def efficiency(model: str, stages: int) -> float:
        alone = figures["17"].get("ttft_s.max", model=model, spp=1)
        found: float = alone / (stages * figures["17"].get("ttft_s.max", model=model, spp=stages))
        return found

    small, large = efficiency("llama-3-8b", 16), efficiency("llama-3-70b", 8)
    text = f"8B at SPP16 {percent(small)}, 70B at SPP8 {percent(large)}"
    return Found(text, large / 0.85)


def _p6(figures: Figures) -> Found:
    one, eight, sixteen = (
        figures["18"].get("total_s", model="llama-3-8b", spp=stages) for stages in (1, 8, 16)
    )
    hop_s = (1.16 * one - eight) / 7
    text = (
        f"+{percent(eight / one - 1)} at 8 stages, +{percent(sixteen / one - 1)} at 16; with "
        f"{seconds(hop_s)} of the host a hand-over, +16 % and +{percent((sixteen + 15 * hop_s) / one - 1)}"
    )
    return Found(text, (eight / one) / 1.16)


def _p7(figures: Figures) -> Found:
    one, two = (figures["7a"].get("total_s", kvp=groups) for groups in (1, 2))
    text = f"−{percent(1 - two / one)}: {seconds(one)} → {seconds(two)}, {1 / two:.0f} tokens/s"
    return Found(text, (1 - two / one) / 0.40)


def _p8(figures: Figures) -> Found:
    joins_s = figures["6b"].get("groups_join_s")
    times = ", ".join(seconds(time_s) for time_s in joins_s[1:])
    return Found(f"4 → {4 * len(joins_s)} servers; a group more after {times}", 4 * len(joins_s) / 16)


def _p9(figures: Figures) -> Found:
    points = {
        labels["chunks"]: (summary["long"]["ttft_all_s"]["p50"], summary["mixed_batch_s"]["p95"])
        for labels, summary in figures["4"].cells()
        if summary is not None
    }
    adaptive = [point for name, point in points.items() if name.startswith("adaptive")]
    static = {name: point for name, point in points.items() if name.startswith("static")}
    if not adaptive or not static:
        raise NotThere("figure 4")
    beaten = [name for name, (x, y) in static.items() if any(a <= x and b <= y for a, b in adaptive)]
    return Found(f"{len(beaten)} of {len(static)} static sizes are worse in both than an adaptive one")


def _headline(figures: Figures, system: str, share: str = "5 %") -> tuple[float, float, float, float]:
    """Median and p90 TTFT, of finished requests and of all."""
    get = figures["1a"].get
    paths = ("ttft_finished_s.p50", "ttft_finished_s.p90", "ttft_all_s.p50", "ttft_all_s.p90")
    p50, p90, all_p50, all_p90 = (get(path, system=system, long_prompts=share) for path in paths)
    return p50, p90, all_p50, all_p90


def _p10(figures: Figures) -> Found:
    medha, loong = _headline(figures, "Medha"), _headline(figures, "LoongServe")
    one_medha, one_loong = _headline(figures, "Medha", "1 %"), _headline(figures, "LoongServe", "1 %")
    text = (
        f"finished requests: median {number(loong[0] / medha[0])}×, p90 {number(loong[1] / medha[1])}×; all: "
        f"at least {number(loong[2] / medha[2])}× and {number(loong[3] / medha[3])}×; Medha's p90 "
        f"{seconds(medha[1])}; 1 % long: {number(one_loong[0] / one_medha[0])}× "
        f"(median), {number(one_loong[1] / one_medha[1])}× (p90)"
    )
    return Found(text, loong[0] / medha[0] / 30)


def _p11(figures: Figures) -> Found:
    get = figures["1b"].get
    capacity = {}
    for system in figures["1b"].labels("system"):
        held = [
            rate
            for rate in figures["1b"].labels("rate_rps")
            if get("ttft_all_s.p90", system=system, rate_rps=rate) <= 10.0
            and get("long.finished", system=system, rate_rps=rate)
            >= 0.9 * get("long.requests", system=system, rate_rps=rate)
        ]
        capacity[system] = max(held, default=0.0)
    text = ", ".join(f"{system} {rate:g}/s" for system, rate in capacity.items())
    others = [rate for system, rate in capacity.items() if system != "Medha" and rate > 0]
    ratio = capacity["Medha"] / max(others) / 5 if others else None
    text = f"highest load with a p90 TTFT within 10 s and nine of ten long prompts finished: {text}"
    return Found(text, ratio)


def _p12(figures: Figures) -> Found:
    rows = []
    for rate in (0.25, 0.75):
        median = {
            system: figures["13"].get("ttft_all_s.p50", system=system, rate_rps=rate)
            for system in figures["13"].labels("system")
        }
        gain = median["Medha, no space sharing"] / median["Medha"]
        texts = [f"{name.removeprefix('Medha, ')} {seconds(found)}" for name, found in median.items()]
        rows.append(f"at {rate}/s {', '.join(texts)}; space sharing {number(gain)}×")
    return Found("median TTFT of all, " + "; ".join(rows))


def _p13(figures: Figures) -> Found:
    texts = []
    for system in figures["10"].labels("system"):
        get, rates = figures["10"].get, figures["10"].labels("rate_rps")
        gaps = [get("tbt_s.p99", system=system, rate_rps=rate) for rate in rates]
        texts.append(f"{system} {seconds(max(gaps))}")
    return Found("p99 gap, at most over the loads: " + ", ".join(texts))


def _p14(figures: Figures) -> Found:
    flat, deep = "2D, SPP8", "3D, SPP4 × KVP2"
    tpot = [figures["12"].get("tpot_finished_s.p50", system=system, rate_rps=1.75) for system in (flat, deep)]
    ttft = [figures["11"].get("ttft_all_s.p50", system=system, rate_rps=1.75) for system in (flat, deep)]
    text = (
        f"TPOT {seconds(tpot[0])} → {seconds(tpot[1])} ({number(tpot[0] / tpot[1])}×), "
        f"median TTFT {seconds(ttft[0])} → {seconds(ttft[1])}"
    )
    alone = [figures["11b"].get("tpot_s.max", system=system) for system in (flat, deep)]
    slow = [figures["12b"].get("tpot_finished_s.p50", system=system) for system in (flat, deep)]
    for name, found in (("alone", alone), ("slower attention", slow)):
        text += f"; {name} {seconds(found[0])} → {seconds(found[1])} ({number(found[0] / found[1])}×)"
    return Found(text, tpot[0] / tpot[1] / 2)


def _p15(figures: Figures) -> Found:
    mfu = [figures["15"].get("mfu", tokens="2M", gpus=gpus) for gpus in (32, 64, 128)]
    mbu = [figures["16"].get("mbu", spp=4, context=context) for context in ("128K", "1M", "2M", "4M", "10M")]
    text = (
        f"MFU {percent(min(mfu))} to {percent(max(mfu))} (2M, 32 to 128 GPUs); MBU up to {percent(max(mbu))}"
    )
    return Found(text, max(mbu) / 0.92)


def _p16(figures: Figures) -> Found:
    small = figures["19"].get("tpot_s.max", model="llama-3-8b", tokens="10M")
    large = figures["19"].get("tpot_s.max", model="llama-3-70b", tokens="10M")
    found = figures["19b"]
    within = [groups for groups in found.labels("kvp") if found.get("tpot_s.max", kvp=groups) <= 0.03]
    text = f"8B {seconds(small)}, 70B {seconds(large)} with KVP4 on 128 GPUs; 70B "
    if within:
        least = min(within)
        text += f"{seconds(found.get('tpot_s.max', kvp=least))} with KVP{least} on {8 * least} GPUs, no fewer"
    else:
        text += "in no configuration of figure 19b"
    return Found(text, small / 0.03)


def _p17(figures: Figures) -> Found:
    get = figures["decisions"].get
    found = [seconds(get("decision_s.p50", waiting=waiting)) for waiting in (100, 1000, 5000)]
    return Found(f"{', '.join(found)} with 100, 1,000, 5,000 waiting")


def _p18(figures: Figures) -> Found:
    kept, plain, medha = (
        figures["14"].get("long.finished", system=system, rate_rps=0.75)
        for system in ("LoongServe, reserved pool", "LoongServe", "Medha")
    )
    text = (
        f"{kept:,} long prompts finished in the hour, Medha {medha:,} ({percent(1 - kept / medha)} fewer), "
        f"LoongServe without it {plain:,} ({percent(1 - kept / plain)} fewer)"
    )
    return Found(text, (1 - kept / medha) / 0.2)


_FINDERS: Mapping[str, Callable[[Figures], Found]] = {
    "P1": _p1,
    "P2": _p2,
    "P3": _p3,
    "P4": _p4,
    "P5": _p5,
    "P6": _p6,
    "P7": _p7,
    "P8": _p8,
    "P9": _p9,
    "P10": _p10,
    "P11": _p11,
    "P12": _p12,
    "P13": _p13,
    "P14": _p14,
    "P15": _p15,
    "P16": _p16,
    "P17": _p17,
    "P18": _p18,
}


def load_claims() -> list[Claim]:
    """All claims, in order."""
    data = yaml.safe_load((FOLDER / "claims.yaml").read_text(encoding="utf-8"))
    return [Claim(id=id, find=_FINDERS[id], **fields) for id, fields in data.items()]
