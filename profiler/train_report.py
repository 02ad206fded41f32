"""What `convoy train` says: how good the predictors of a profile are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from profiler.estimate import FloatArray
from profiler.evaluation import Errors, FamilyErrors
from profiler.overheads import HostOverhead
from profiler.whole_layers import IterationReport, LayerReport


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """How one operator at one dtype is predicted. `roofline` and `physics` are for comparison."""

    operator: str
    dtype: str
    rows: int
    below_floor: int  # measured faster than FLOP ÷ peak or bytes ÷ bandwidth: inputs came from L2
    held_out: Errors
    held_out_by_head_dim: dict[int, Errors]
    physics: Errors  # held out, without the learned residual
    roofline: Errors  # default parameters, nothing learned
    extrapolation: dict[str, Errors]  # by size axis
    noise: float | None  # median spread between repeats ÷ time
    families: dict[str, FamilyErrors]  # if compared
    measured_s: FloatArray = field(repr=False)
    predicted_s: FloatArray = field(repr=False)  # held out


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What `convoy train` prints."""

    profile: str
    device: str
    source: str
    folds: int
    whole_shapes: bool  # folds of whole shapes, not of rows
    operators: tuple[OperatorReport, ...]
    layer: LayerReport | None
    skewed: Errors | None
    host: tuple[Errors, HostOverhead] | None
    iterations: IterationReport | None
    stage_gap: tuple[Errors, HostOverhead] | None
    predictor_path: Path
    saved: bool
    dropped: dict[str, int]  # rows that the importer left out, by reason
    untrained: dict[str, int]  # rows of tables that are too small to learn from

    def table(self) -> str:
        """The errors as text, one line an operator, and what was left out."""
        name = f"{self.device}/{self.profile} ({self.source})"
        kind = "whole shapes" if self.whole_shapes else "rows"
        lines = [
            f"{name}; errors: median / p90 of |predicted ÷ measured − 1|",
            f"held out: {self.folds} folds of {kind}; extrapolation: learned on ≤ 1/8 of the size",
            "",
            _line("operator", "dtype", "rows", "held out", "physics only", "roofline", "extrapolation"),
        ]
        for report in self.operators:
            far = ", ".join(f"{axis} {errors}" for axis, errors in report.extrapolation.items())
            errors = (str(report.held_out), str(report.physics), str(report.roofline))
            lines.append(_line(report.operator, report.dtype, str(report.rows), *errors, far))
            for dim, part in report.held_out_by_head_dim.items():
                if len(report.held_out_by_head_dim) > 1:
                    lines.append(_line("", "", f"d={dim}", str(part), "", "", ""))
        lines += ["", *self._families(), *self._others()]
        for report in self.operators:
            if report.below_floor:
                lines.append(
                    f"{report.operator} {report.dtype}: {report.below_floor} of {report.rows} rows are under "
                    "the floor (inputs in L2); in the errors, not in the fit"
                )
        lines += [f"not imported: {count} rows, {reason}" for reason, count in self.dropped.items()]
        lines += [f"not trained: {key} has only {count} rows" for key, count in self.untrained.items()]
        lines.append(f"predictor: {self.predictor_path}" if self.saved else "predictor: not saved")
        return "\n".join(lines)

    def _families(self) -> list[str]:
        compared = [report for report in self.operators if report.families]
        if not compared:
            return []
        names = list(compared[0].families)
        lines = ["kinds of models; held out | extrapolation, the worst axis (median / p90)", ""]
        lines.append("  ".join([f"{'operator':<22}", *(f"{name:<33}" for name in names)]).rstrip())
        for report in compared:
            cells = [f"{report.operator + ' ' + report.dtype:<22}"]
            for name in names:
                found = report.families[name]
                far = max(found.extrapolation.values(), key=lambda errors: errors.median, default=None)
                cells.append(f"{f'{found.held_out} | {far or chr(8211)}':<33}")
            lines.append("  ".join(cells).rstrip())
        return [*lines, ""]

    def _others(self) -> list[str]:
        lines = []
        noisy = [(report.operator, report.noise) for report in self.operators if report.noise is not None]
        if noisy:
            shown = ", ".join(f"{operator} {100 * noise:.1f} %" for operator, noise in noisy)
            lines.append(f"between repeats (half the range ÷ time, median): {shown}")
        if self.layer is not None:
            lines += self.layer.lines()
        if self.skewed is not None:
            lines.append(f"decodes of very different contexts ({self.skewed.rows}): {self.skewed}")
        if self.host is not None:
            errors, host = self.host
            messages = f", {1e6 * host.ranks_s:.0f} for messages to several ranks"
            lines.append(f"host ({errors.rows}): {_rates(host)}{messages}, held out {errors}")
        if self.iterations is not None:
            lines += self.iterations.lines()
        if self.stage_gap is not None:
            errors, gap = self.stage_gap
            lines.append(f"a later stage between batches ({errors.rows}): {_rates(gap)}, held out {errors}")
        return [*lines, ""] if lines else []


def _rates(host: HostOverhead) -> str:
    """What one rank takes for a batch, in µs."""
    return (
        f"{1e6 * host.base_s:.0f} µs an iteration, {1e6 * host.per_request_s:.1f} a request and "
        f"{1e6 * host.root_s:.0f} · √requests, {1e6 * host.prefill_s:.0f} and "
        f"{1e6 * host.per_prefill_token_s:.2f} a token if there is a chunk"
    )


def _line(*cells: str) -> str:
    name, *middle, last = cells
    columns = [f"{cell:>{width}}" for cell, width in zip(middle, (5, 6, 14, 14, 14), strict=True)]
    return "  ".join([f"{name:<17}", *columns, last]).rstrip()
