"""``convoy profile``, ``convoy train`` and ``convoy import``: from a device to predictors."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from specs.errors import InputError


def profile_device(options: argparse.Namespace) -> int:
    """Measure the device that is here and train predictors, or check a profile; returns the exit status.

    Raises:
        InputError: see :mod:`profiler.measure.arguments`.
    """
    from profiler.measure.arguments import run

    done = run(options)
    if done.profile is not None:
        print()
        train_profile(done.profile, None, compare=False, plot=False)
        print(f"next: convoy train {done.profile}, for other kinds of models and a plot")
    return done.status


def train_profile(folder: Path, out: Path | None, *, compare: bool = True, plot: bool = True) -> int:
    """Fit the predictors of the profile in ``folder`` and print their held-out errors; ``compare`` them with
    other kinds of models; ``plot`` writes a picture beside the predictor."""
    from profiler.train import train

    report = train(folder, out=out, compare=compare)
    print(report.table())
    if plot:
        from experiments.predictor_plot import draw

        path = report.predictor_path.with_suffix(".png")
        draw(report, path)
        print(f"plot: {path}")
    return 0


def import_tables(
    what: str, tables: str | None, device: str, model: str | None, out: Path, *, force: bool = False
) -> int:
    """Turn somebody's tables into a profile in a folder of ``out``; returns the exit status.

    Raises:
        InputError: an argument is missing or too many, or the tables are unsound.
    """
    if what == "aiconfigurator":
        if tables is not None or model is not None:
            raise InputError("import aiconfigurator: takes its tables from the package, for all models")
        return import_aiconfigurator(device, out, force=force)
    if tables is None or model is None:
        raise InputError(f"import {what}: needs a PATH to the tables, and --model")
    from profiler.importers import layerwise, llmservingsim

    importer = {"llmservingsim": llmservingsim, "layerwise": layerwise}[what]
    profile = importer.import_profile(Path(tables), device, model, out, replace=force)
    for info in profile.tables:
        dropped = "".join(f", {count} {reason} left out" for reason, count in info.dropped.items())
        print(f"{info.key}: {info.rows} rows{dropped}")
    print(f"next: predictor: {{profile: {profile.path}}} in a configuration")
    return 0


def import_aiconfigurator(device: str, out: Path, *, force: bool = False) -> int:
    """Turn the tables of the installed ``aiconfigurator-core`` into a profile in a folder of ``out``."""
    from profiler.importers.aiconfigurator import import_profile

    profile = import_profile(device, out, replace=force)
    print(f"{profile.path}: {', '.join(f'{info.key} ({info.rows} rows)' for info in profile.tables)}")
    print(f"next: convoy train {shlex.quote(str(profile.path))}")
    return 0
