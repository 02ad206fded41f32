"""A real vLLM on this machine's CPU, measured and held against its simulation.

    python -m experiments.vllm_cpu repeat                     # all of what follows, at three loads

    python -m experiments.vllm_cpu install                    # an environment of its own, 3.5 GB
    python -m experiments.vllm_cpu start
    python -m experiments.vllm_cpu measure CONFIG.yaml --out DIR
    python -m experiments.vllm_cpu stop

Everything is below `out/vllm-cpu`. `repeat` takes five minutes, during which nothing else should run.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from experiments.calibrate import CalibrateOptions, calibrate
from experiments.load import load_config
from experiments.measure import MeasureOptions, measure
from experiments.validate import ValidateOptions, validate
from experiments.vllm_server import HOME, SETTINGS, endpoint, install, installed, log_of, running, start, stop
from specs.errors import InputError

LOADS = ("load30", "load60", "load85")
_WARM_UP_S = 10


def measure_here(config: Path, out: Path, home: Path = HOME, overrides: Sequence[str] = ()) -> int:
    """``convoy measure`` from the first processor, with the log of the server's iterations beside the
    requests, and what the server is.

    Returns the command's exit status.

    Raises:
        InputError: no server runs, or as ``convoy measure``.
    """
    if not running(home):
        raise InputError(f"{home}: no server runs; python -m experiments.vllm_cpu start")
    log = log_of(home)
    before, began = log.stat().st_size, datetime.now(UTC).isoformat(timespec="seconds")
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        status = measure(MeasureOptions(config, endpoint(), overrides=overrides, out=str(out), force=True))
    finally:
        os.sched_setaffinity(0, processors)
    with log.open(encoding="utf-8") as file:
        header = file.readline()
        file.seek(before)
        lines = file.read()
    (out / "iterations.csv").write_text(header + lines, encoding="utf-8")
    facts = json.loads((home / "server.json").read_text(encoding="utf-8")) | {"measured": began}
    (out / "server.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return status


def repeat(home: Path, duration_s: float) -> int:
    """Install what isn't there, measure one workload and three loads, learn from that, predict these.

    Returns 0 if all are within their tolerances, 1 if not; what ``convoy measure`` returned if a run failed
    or was interrupted.

    Raises:
        InputError: the server doesn't come up.
    """
    runs = home / "runs"
    length = [f"workload.duration_s={duration_s:g}"]
    if not installed(home):
        install(home)
    start(home)
    try:
        warm_up = [f"workload.duration_s={_WARM_UP_S}"]
        if status := measure_here(SETTINGS / "calibrate.yaml", runs / "warm-up", home, warm_up):
            return status
        for name in ("calibrate", *LOADS):
            print(f"\n{name}:")
            if status := measure_here(SETTINGS / f"{name}.yaml", runs / name, home, length):
                return status
    finally:
        stop(home)
    learned = runs / "learned.yaml"
    calibrate(
        CalibrateOptions(runs / "calibrate", SETTINGS / "calibrate.yaml", share=1.0, out=learned, force=True)
    )
    predictor = load_config(learned).predictor
    changes = [
        *length,
        f"predictor.steps={json.dumps(None if predictor.steps is None else predictor.steps.model_dump())}",
        f"predictor.factors={json.dumps(predictor.factors)}",
    ]
    statuses = []
    for name in LOADS:
        out = str(runs / f"{name}-predicted")
        options = ValidateOptions(
            SETTINGS / f"{name}.yaml", changes, replay=str(runs / name), out=out, force=True
        )
        statuses.append(validate(options))
    return max(statuses)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    about = RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python -m experiments.vllm_cpu", description=__doc__, formatter_class=about)
    parser.add_argument("--home", type=Path, default=HOME, help=f"where everything is (default: {HOME})")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in _PLAIN.items():
        commands.add_parser(name, help=(function.__doc__ or "").split(". ")[0].split(".\n")[0].lower())
    all_of_it = commands.add_parser("repeat", help="install, start, measure, stop, calibrate, validate")
    all_of_it.add_argument("--duration", type=float, default=75.0, help="seconds of each run (default: 75)")
    measuring = commands.add_parser("measure", help="one workload, against the server that runs")
    measuring.add_argument("config", type=Path)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "measure":
            return measure_here(chosen.config, chosen.out, chosen.home, chosen.overrides)
        if chosen.command == "repeat":
            return repeat(chosen.home, chosen.duration)
        _PLAIN[chosen.command](chosen.home)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


_PLAIN: dict[str, Callable[[Path], None]] = {"install": install, "start": start, "stop": stop}


if __name__ == "__main__":
    sys.exit(main())
