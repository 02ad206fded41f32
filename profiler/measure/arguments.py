"""The command line of `convoy profile`; importing it needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, for `convoy` and for `python -m profiler.measure`."""
    parser.description = (
        "Measures a model's operators on the device that is here, with the live runtime's own layers, and "
        "writes a profile. Ctrl-C keeps what was measured; --resume goes on."
    )
    parser.add_argument("--model", default=None, help="a name, or a path to a Hugging Face config.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--spec", metavar="DEVICE", help="its data sheet: a name, or a YAML file; default: recognised"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default out/profile-DEVICE-MODEL")
    parser.add_argument("--budget", type=seconds, metavar="TIME", help="such as 90s or 5m; default 5m")
    parser.add_argument("--quick", action="store_true", help="a small grid, in under 90 s")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of torch, on a CPU; default 1, as a rank of the live runtime",
    )
    parser.add_argument("--attention", default="auto", metavar="NAME", help="attention back end")
    parser.add_argument("--only", type=_names, default=(), metavar="OPERATOR,…", help="these operators alone")
    parser.add_argument(
        "--tp", type=_numbers, default=(), metavar="N,…", help="these tensor-parallel degrees alone"
    )
    parser.add_argument("--max-context", type=int, metavar="TOKENS", help="longest context")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="PROFILE",
        help="measure a few of its points again; exit 1 if it no longer holds",
    )


class Done(NamedTuple):
    """The exit status, and the folder of what was measured.

    The status is 1 for a profile that no longer holds, 130 after Ctrl-C.
    """

    status: int
    profile: Path | None = None


def run(options: argparse.Namespace) -> Done:
    """Measure or check.

    Raises:
        InputError: bad options, no torch, or a device that isn't here.
    """
    from specs.errors import InputError

    try:
        from profiler.measure.check import check
        from profiler.measure.command import MeasureOptions, measure
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("profile: needs torch; in Convoy's folder: pip install -e '.[runtime]'") from None
    if options.check is not None:
        return Done(0 if check(options.check, device=options.device, threads=options.threads) else 1)
    if options.model is None:
        raise InputError("profile: --model is missing")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: must be at least 1")
    if options.max_context is not None and options.max_context < 1024:
        raise InputError(f"--max-context {options.max_context}: must be at least 1024 tokens")
    outcome = measure(
        MeasureOptions(
            model=options.model,
            device=options.device,
            out=options.out,
            budget_s=options.budget,
            quick=options.quick,
            resume=options.resume,
            dtype=options.dtype,
            spec=options.spec,
            threads=options.threads,
            attention=options.attention,
            only=options.only,
            tps=options.tp,
            max_context=options.max_context,
        )
    )
    return Done(130 if outcome.interrupted else 0, outcome.profile.path)


def seconds(text: str) -> float:
    """Seconds of `90`, `90s`, `5m` or `1.5h`."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 90s or 5m") from None
    if not 1.0 <= value <= 86400.0:
        raise argparse.ArgumentTypeError(f"must be between 1s and 24h, not {text}")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 1,2,4") from None
