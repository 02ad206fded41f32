"""What each command of ``convoy`` does with its options; each imports what it needs when it is called."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.store import StudyOptions


def do_run(options: argparse.Namespace) -> int:
    from experiments.run import RunOptions, run

    return run(
        RunOptions(
            config=Path(options.config),
            overrides=options.set,
            out=options.out,
            step_by_step=options.step_by_step,
            batches=options.batches,
            plots=not options.no_plots,
            force=options.force,
            quiet=options.quiet,
            intervals=options.intervals,
        )
    )


def do_live(options: argparse.Namespace) -> int:
    from experiments.live import live
    from experiments.run import RunOptions

    return live(
        RunOptions(
            config=Path(options.config),
            overrides=options.set,
            out=options.out,
            plots=not options.no_plots,
            force=options.force,
            quiet=options.quiet,
        )
    )


def do_validate(options: argparse.Namespace) -> int:
    from experiments.validate import ValidateOptions, validate

    return validate(
        ValidateOptions(
            config=Path(options.config),
            overrides=options.set,
            cases=options.case,
            replay=options.replay,
            out=options.out,
            plots=not options.no_plots,
            force=options.force,
            quiet=options.quiet,
        )
    )


def do_sweep(options: argparse.Namespace) -> int:
    from experiments.sweep import sweep

    return sweep(_study(options))


def do_capacity(options: argparse.Namespace) -> int:
    from experiments.capacity import capacity

    return capacity(_study(options))


def do_compare(options: argparse.Namespace) -> int:
    from experiments.compare import compare

    first, second = Path(options.first), Path(options.second)
    return compare(first, second, options.out, plots=not options.no_plots, quiet=options.quiet)


def do_paper(options: argparse.Namespace) -> int:
    from experiments.paper.command import PaperOptions, paper

    return paper(
        PaperOptions(
            out=options.out,
            only=options.only,
            jobs=options.jobs,
            document=options.doc,
            as_is=options.as_is,
            quiet=options.quiet,
        )
    )


def do_plan(options: argparse.Namespace) -> int:
    from experiments.plan import plan

    return plan(_study(options))


def do_measure(options: argparse.Namespace) -> int:
    from experiments.measure import MeasureOptions, measure

    return measure(
        MeasureOptions(
            config=Path(options.config),
            endpoint=options.endpoint,
            model=options.model,
            key=os.environ.get("OPENAI_API_KEY"),
            overrides=options.set,
            out=options.out,
            force=options.force,
            quiet=options.quiet,
        )
    )


def do_calibrate(options: argparse.Namespace) -> int:
    from experiments.calibrate import CalibrateOptions, calibrate

    return calibrate(
        CalibrateOptions(
            records=Path(options.records),
            config=Path(options.config),
            overrides=options.set,
            share=options.share,
            out=None if options.out is None else Path(options.out),
            force=options.force,
        )
    )


def do_predict(options: argparse.Namespace) -> int:
    from experiments.predict import PredictOptions, predict

    return predict(
        PredictOptions(
            model=options.model,
            device=options.device,
            source=options.source,
            weight_dtype=options.weight_dtype,
            kv_dtype=options.kv_dtype,
            profile=None if options.profile is None else Path(options.profile),
            tp=options.tp,
            spp=options.spp,
            kvp=options.kvp,
            kvp_tokens_per_group=options.kvp_tokens_per_group,
            cp=options.cp,
            ring=options.ring,
            ring_merge=options.ring_merge,
            chunk=options.chunk,
            decodes=options.decodes,
            context=options.context,
            as_json=options.json,
        )
    )


def do_profile(options: argparse.Namespace) -> int:
    from experiments.profiles import profile_device

    return profile_device(options)


def do_train(options: argparse.Namespace) -> int:
    from experiments.profiles import train_profile

    out = None if options.out is None else Path(options.out)
    return train_profile(
        Path(options.profile), out, compare=not options.no_compare, plot=not options.no_plots
    )


def do_import(options: argparse.Namespace) -> int:
    from experiments.profiles import import_tables

    return import_tables(
        options.what, options.tables, options.device, options.model, Path(options.out), force=options.force
    )


def do_describe(options: argparse.Namespace) -> int:
    from experiments.trace_files import describe_file

    return describe_file(Path(options.file), options.format, as_json=options.json)


def do_convert(options: argparse.Namespace) -> int:
    from experiments.trace_files import convert_file

    return convert_file(Path(options.file), options.format, Path(options.out), force=options.force)


def do_list(options: argparse.Namespace) -> int:
    from experiments.listing import show

    return show(options.what)


def _study(options: argparse.Namespace) -> StudyOptions:
    from experiments.store import StudyOptions

    return StudyOptions(
        config=Path(options.config),
        overrides=options.set,
        out=options.out,
        jobs=options.jobs,
        backend=options.backend,
        plots=not options.no_plots,
        quiet=options.quiet,
    )
