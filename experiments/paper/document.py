"""docs/paper.md: what the paper says and what was found, claim by claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.grid import code_version
from experiments.paper.claims import compare, load_claims
from experiments.paper.results import NotThere, Results, value
from experiments.text import number, seconds

_LOAD_FIGURES = ("1a", "1b", "9", "11", "13", "14", "rules", "admission")
_COLUMNS = (
    ("finished", "finished", str),
    ("of", "requests", str),
    ("TTFT p50, finished", "ttft_finished_s.p50", seconds),
    ("p90", "ttft_finished_s.p90", seconds),
    ("TTFT p50, all", "ttft_all_s.p50", seconds),
    ("p90", "ttft_all_s.p90", seconds),
    ("short p50", "short.ttft_all_s.p50", seconds),
    ("p90", "short.ttft_all_s.p90", seconds),
    ("long finished", "long.finished", str),
    ("of", "long.requests", str),
    ("TPOT p50", "tpot_finished_s.p50", seconds),
    ("gap p99", "tbt_s.p99", seconds),
)


def document(figures: Mapping[str, Results]) -> str:
    """The whole document, in Markdown."""
    return "\n".join([*_head(figures), *_claims(figures), *_loads(figures), *_closed_forms(figures)]) + "\n"


_HEAD = """\
# The paper's figures, computed

Written by `convoy paper`. `experiments/paper` has a configuration for each figure of Medha's paper
([arXiv 2409.17264](https://arxiv.org/abs/2409.17264)); what follows is computed from them. Nothing was run on
GPUs: kernel times are published tables of single kernels, and physics beyond them.
"""
_UNDER_LOAD = """\
## Under load

*Finished* is over the requests that had their last token within the hour. *All* is over every request that
arrived; those without a first token count with the time they had waited when the hour ended, which is less
than their TTFT would have been. *Short* and *long* part at 100,000 prompt tokens; the TTFT of the short ones
is over all.
"""


def _head(figures: Mapping[str, Results]) -> Iterator[str]:
    yield _HEAD
    missing = sorted({name for each in figures.values() for name in each.figure.stands_in})
    lengths = f"mixtures in place of {', '.join(missing)}" if missing else "the published mixes"
    yield f"Lengths: {lengths}. Code: `{code_version()}`."
    yield ""


def _claims(figures: Mapping[str, Results]) -> Iterator[str]:
    yield "| | figure | the paper | here | here ÷ paper |"
    yield "|---|---|---|---|---:|"
    claims = load_claims()
    for claim in claims:
        found = compare(figures, claim)
        ours = "not computed" if found is None else found.text
        ratio = "" if found is None or found.ratio is None else f"{found.ratio:.2f}"
        yield f"| {claim.id} | {claim.figures} | {claim.paper} | {ours} | {ratio} |"
    yield ""
    for claim in claims:
        if claim.remark:
            yield f"- **{claim.id}**: {claim.remark}"
    yield ""


def _loads(figures: Mapping[str, Results]) -> Iterator[str]:
    yield _UNDER_LOAD
    for name in _LOAD_FIGURES:
        if name in figures and any(figures[name].summaries):
            yield from _load_table(figures[name])


def _load_table(results: Results) -> Iterator[str]:
    axes = list(results.cells()[0][0])
    header = [*axes, *(title for title, _, _ in _COLUMNS)]
    yield f"**{results.figure.title}**: {results.figure.shows}"
    yield ""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(axes) + "---:|" * len(_COLUMNS)
    for labels, summary in results.cells():
        if summary is not None:
            texts = [_text(summary, path, show) for _, path, show in _COLUMNS]
            yield "| " + " | ".join([*map(str, labels.values()), *texts]) + " |"
    yield ""


def _closed_forms(figures: Mapping[str, Results]) -> Iterator[str]:
    from experiments.paper.plots import PANELS

    yield "## One request at a time"
    yield ""
    for name, results in figures.items():
        if name in _LOAD_FIGURES or name in ("10", "12") or not any(results.summaries):
            continue
        yield f"**{results.figure.title}**: {results.figure.shows}"
        yield ""
        panels = [panel for panel in PANELS.get(name, ()) if isinstance(panel.y, str)]
        columns = {str(panel.y): panel.label.replace("\n", " ") for panel in panels}
        columns |= {panel.x: panel.x_label for panel in panels if "." in panel.x}
        if name == "3b":
            columns = {"attention_s": "attention (s)", "total_s": "iteration (s)"}
        axes = list(results.cells()[0][0])
        if not columns or not axes:
            continue
        yield "| " + " | ".join([*axes, *columns.values()]) + " |"
        yield "|" + "---|" * len(axes) + "---:|" * len(columns)
        for labels, summary in results.cells():
            if summary is not None:
                texts = [_text(summary, path, number) for path in columns]
                yield "| " + " | ".join([*map(str, labels.values()), *texts]) + " |"
        yield ""


def _text(summary: Mapping[str, Any], path: str, show: Any) -> str:
    try:
        return str(show(value(summary, path)))
    except NotThere:
        return ""
