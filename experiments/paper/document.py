"""docs/paper.md: what the paper says and what was found, claim by claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.grid import code_version
from experiments.paper.claims import compare, load_claims
from experiments.paper.results import NotThere, Results, value
from experiments.paper.ring_steps import ring_steps
from experiments.text import number, seconds

_LOAD_FIGURES = ("1a", "1b", "9", "11", "12b", "13", "14", "rules", "admission", "lockstep")
_SAME_RUNS = ("10", "12")  # plots of what figures 9 and 11 have tables of
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("finished", "finished", str),
    ("of", "requests", str),
    ("rejected", "num_rejected", str),
    ("TTFT p50, finished", "ttft_finished_s.p50", seconds),
    ("p90, finished", "ttft_finished_s.p90", seconds),
    ("TTFT p50, all", "ttft_all_s.p50", seconds),
    ("p90, all", "ttft_all_s.p90", seconds),
    ("short p50", "short.ttft_all_s.p50", seconds),
    ("short p90", "short.ttft_all_s.p90", seconds),
    ("long finished", "long.finished", str),
    ("long", "long.requests", str),
    ("TPOT p50", "tpot_finished_s.p50", seconds),
    ("gap p99", "tbt_s.p99", seconds),
)


def document(figures: Mapping[str, Results], *, plots: bool = False) -> str:
    """The whole document, in Markdown; with the ``plots`` if they lie beside it."""
    parts = (
        _head(figures),
        _claims(figures),
        _loads(figures, plots),
        _closed_forms(figures, plots),
        ring_steps(figures),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


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
    waiting = [name for name, each in figures.items() if not all(each.summaries)]
    if waiting:
        yield f"Not computed yet, in full: {', '.join(waiting)}."
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
        if claim.remark and compare(figures, claim) is not None:
            yield f"- **{claim.id}**: {claim.remark}"
    yield ""


def _loads(figures: Mapping[str, Results], plots: bool) -> Iterator[str]:
    yield _UNDER_LOAD
    for name, results in figures.items():
        if name in _LOAD_FIGURES and all(results.summaries):
            columns = {title: (path, show) for title, path, show in _COLUMNS}
            yield from _section(results, columns, plots)
        elif name in _SAME_RUNS and plots and all(results.summaries):
            yield from _section(results, {}, plots)


def _closed_forms(figures: Mapping[str, Results], plots: bool) -> Iterator[str]:
    from experiments.paper.plots import PANELS

    yield "## One request at a time"
    yield ""
    for name, results in figures.items():
        if name in (*_LOAD_FIGURES, *_SAME_RUNS) or not all(results.summaries):
            continue
        columns: dict[str, tuple[str, Callable[[Any], str]]] = {}
        for panel in PANELS.get(name, ()):
            for path, label in ((panel.y, panel.label), (panel.x, panel.x_label)):
                if isinstance(path, str) and path not in results.cells()[0][0]:
                    columns[label.replace("\n", " ")] = (path, number)
        if name == "3b":
            columns = {"attention (s)": ("attention_s", number), "iteration (s)": ("total_s", number)}
        if columns or plots:
            yield from _section(results, columns, plots)


def _section(
    results: Results, columns: Mapping[str, tuple[str, Callable[[Any], str]]], plots: bool
) -> Iterator[str]:
    """A figure's title, its cells as a table if there are ``columns``, and its plot."""
    figure, axes = results.figure, list(results.cells()[0][0])
    published = [cell.published for cell in figure.cells]
    beside = ["measured (s)", "here ÷ measured"] if any(published) else []
    yield f"**{figure.title}**: {figure.shows}"
    yield ""
    if columns:
        yield "| " + " | ".join([*axes, *columns, *beside]) + " |"
        yield "|" + "---|" * len(axes) + "---:|" * len([*columns, *beside])
        for (labels, summary), theirs in zip(results.cells(), published, strict=True):
            if summary is not None:
                texts = [_text(summary, path, show) for path, show in columns.values()]
                if theirs is not None:
                    texts += [number(theirs), number(float(value(summary, "total_s")) / theirs)]
                elif beside:
                    texts += ["", ""]
                yield "| " + " | ".join([*map(str, labels.values()), *texts]) + " |"
        yield ""
    if plots:
        yield f"![{figure.title}](fig{figure.name}.png)"
        yield ""


def _text(summary: Mapping[str, Any], path: str, show: Callable[[Any], str]) -> str:
    try:
        return show(value(summary, path))
    except NotThere:
        return ""
