"""The command ``convoy``.

Exit status: 0 done, 1 something failed that isn't the user's fault or is outside tolerance, 2 bad input, 130
stopped by Ctrl-C.
Everything heavy is imported by the command that needs it: ``convoy --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from experiments import commands
from specs.errors import InputError

_CONFIG_HELP = """\
KEY.PATH is dotted, as in scheduler.priority=lars; VALUE is YAML. May be given again and again."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line and takes options by their full names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
        return status
    except InputError as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); keep Python from complaining as it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("CONVOY_DEBUG"):
            raise
        hint = "set CONVOY_DEBUG=1 to see where"
        return _complain(f"failed: {type(error).__name__}: {error} ({hint})", 1)


def _complain(message: str, status: int) -> int:
    print(" ".join(f"convoy: {message}".split()), file=sys.stderr)
    return status


# -- what the commands take ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="convoy",
        description="Simulates the serving of large language models with long contexts.",
        epilog="Exit status: 0 done, 1 failed or outside tolerance, 2 bad input, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(subparsers.add_parser("run", help="simulate a configuration"))
    _add_live(subparsers.add_parser("live", help="serve a configuration on the live runtime"))
    _add_validate(subparsers.add_parser("validate", help="compare a simulation with live runs, rung by rung"))
    _add_measure(subparsers.add_parser("measure", help="send a configuration's workload to a running server"))
    _add_calibrate(subparsers.add_parser("calibrate", help="fit the host's time to a measured run"))
    _add_sweep(subparsers.add_parser("sweep", help="simulate a grid of configurations, resumable"))
    _add_paper(subparsers.add_parser("paper", help="compute the figures of Medha's paper, resumable"))
    _add_plan(subparsers.add_parser("plan", help="search the cheapest deployment that holds the SLOs"))
    _add_capacity(subparsers.add_parser("capacity", help="search the highest load at which the SLOs hold"))
    _add_compare(subparsers.add_parser("compare", help="compare two runs, metric by metric"))
    _add_predict(subparsers.add_parser("predict", help="predict one iteration, operator by operator"))
    _add_profile(subparsers.add_parser("profile", help="measure kernel times on the device that is here"))
    _add_train(subparsers.add_parser("train", help="fit predictors to a profile, show held-out errors"))
    _add_import(subparsers.add_parser("import", help="turn published kernel times into a profile"))
    _add_traces(subparsers.add_parser("traces", help="describe or convert a trace of requests"))
    listing = subparsers.add_parser("list", help="list what there is")
    listing.add_argument("what", choices=("models", "devices", "policies", "profiles"))
    listing.set_defaults(run=commands.do_list)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from experiments.version import version

        print(f"convoy {version()}")
        parser.exit(0)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Simulates a configuration and writes config.yaml, summary.json, requests.csv, timeline.json, plots "
        "and report.html. Ctrl-C keeps what has finished."
    )
    _add_common(parser)
    parser.add_argument("--batches", action="store_true", help="write batches.csv as well")
    parser.add_argument(
        "--step-by-step",
        action="store_true",
        help="take every decode step as an event: slower, the same up to rounding",
    )
    parser.add_argument(
        "--intervals",
        action="store_true",
        help="replay with kernel times as far off as they may be: intervals of TTFT and TPOT",
    )
    parser.set_defaults(run=commands.do_run)


def _add_live(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serves a configuration's workload by the wall clock on the live runtime: real tokens, the same "
        "scheduler. Writes what `convoy run` writes, and what `convoy validate --replay` reads. Ctrl-C keeps "
        "what has finished. Runs under torchrun as well."
    )
    _add_common(parser)
    parser.set_defaults(run=commands.do_live)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serves a configuration live, several times, simulates it, and compares: operators, iterations, "
        "decisions, requests. Writes the tables, plots, a JUnit file and the live runs."
    )
    parser.epilog = (
        "Exit status: 0 within tolerance, 1 outside or no verdict, 2 bad input, 130 stopped by Ctrl-C; that "
        "keeps what has finished."
    )
    _add_common(parser)
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="only this case, or those like *.spp2-*"
    )
    parser.add_argument(
        "--replay", metavar="DIR", help="runs that are on disk already: run nothing, compare with them"
    )
    parser.set_defaults(run=commands.do_validate)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends a configuration's workload to a server with an OpenAI-compatible API, streaming, by the wall "
        "clock, and writes requests.csv, summary.json and config.yaml: what `convoy validate --replay` and "
        "`convoy calibrate` read. A key is taken from OPENAI_API_KEY. Ctrl-C keeps what has finished."
    )
    parser.add_argument("--endpoint", required=True, metavar="URL", help="such as http://localhost:8000")
    parser.add_argument("--config", required=True, metavar="CONFIG.yaml", help="what to send")
    parser.add_argument("--model", metavar="NAME", help="as the server calls it; default: the only one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help=f"change a key: {_CONFIG_HELP}"
    )
    parser.add_argument("--out", metavar="DIR", help="where results go; default out/NAME.measured")
    parser.add_argument("--force", action="store_true", help="let --out replace an earlier run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(run=commands.do_measure)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fits what tables of kernels don't hold, the host's time in each iteration and the factor of a "
        "roofline, to the first part of a measured run: a folder that `convoy measure` wrote, or one of the "
        "other forms that `convoy validate --replay` reads."
    )
    parser.add_argument("records", metavar="RECORDS", help="the folder of the measured run")
    parser.add_argument("--config", required=True, metavar="CONFIG.yaml", help="what was measured")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help=f"change a key: {_CONFIG_HELP}"
    )
    parser.add_argument(
        "--share", type=_share, default=0.5, metavar="S", help="which part of the run; default the first half"
    )
    parser.add_argument("--out", metavar="FILE.yaml", help="write the configuration with what was found")
    parser.add_argument("--force", action="store_true", help="replace the file")
    parser.set_defaults(run=commands.do_calibrate)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Simulates every combination of the values under `sweep` and writes results.csv and results.parquet, "
        "one row each, and report.html. What has finished is kept: started again on the same folder, only "
        "the rest is done."
    )
    _add_store(parser, "sweep")
    parser.set_defaults(run=commands.do_sweep)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Searches TP x SPP x KVP x replicas x policies x devices for the cheapest deployment that holds the "
        "SLOs, checks it against its neighbours, and says how much more traffic it takes. Writes plan.json "
        "and report.html. Finished simulations are kept: started again on the same folder, it goes on."
    )
    parser.epilog = "Exit status: 0, 1 if no deployment holds, 2 bad input, 130 stopped by Ctrl-C."
    _add_store(parser, "plan")
    parser.set_defaults(run=commands.do_plan)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Searches the highest load at which the SLOs hold, by bisection, with as many seeds at each load as "
        "it takes to be sure; for each combination under `sweep`, if there is one. Writes capacity.json, "
        "capacity.csv and report.html. Started again on the same folder, it goes on."
    )
    parser.epilog = "Exit status: 0, 1 if one holds at no load, 2 bad input, 130 stopped by Ctrl-C."
    _add_store(parser, "capacity")
    parser.set_defaults(run=commands.do_capacity)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compares two folders of `convoy run` or `convoy live`: metrics, CDFs, changes."
    parser.add_argument("first", metavar="A", help="a run's folder")
    parser.add_argument("second", metavar="B", help="another's")
    parser.add_argument("--out", metavar="DIR", help="where the report goes; default out/A-against-B")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots out")
    parser.add_argument("--quiet", action="store_true", help="no table")
    parser.set_defaults(run=commands.do_compare)


def _add_store(parser: argparse.ArgumentParser, kind: str) -> None:
    """What the commands take that keep many simulations in one folder."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help=f"change a key: {_CONFIG_HELP}"
    )
    parser.add_argument("--out", metavar="DIR", help=f"where results go, or are; default out/NAME.{kind}")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes; default one for each core")
    parser.add_argument(
        "--backend", choices=("loky", "ray"), default="loky", help="on this machine, or on a Ray cluster"
    )
    parser.add_argument("--no-plots", action="store_true", help="leave the plots out")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def _add_paper(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Computes the figures of Medha's paper from the configurations in experiments/paper, "
        "draws them and says what the paper claims and what was found. What has finished is kept: started "
        "again on the same folder, only the rest is done."
    )
    parser.add_argument("--out", metavar="DIR", help="where results go, or are; default out/paper")
    parser.add_argument("--only", nargs="+", default=[], metavar="FIG", help="figures: 3b 13 …; default all")
    parser.add_argument("--jobs", type=_count, metavar="N", help="processes; default one for each core")
    parser.add_argument("--doc", metavar="FILE.md", help="write the document there too, besides DIR/paper.md")
    parser.add_argument("--as-is", action="store_true", help="compute nothing: show what is there")
    parser.add_argument("--quiet", action="store_true", help="no progress, no last line")
    parser.set_defaults(run=commands.do_paper)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What all commands take that turn a configuration into a folder of results."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help=f"change a key: {_CONFIG_HELP}"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where results go; default out/NAME, or out/NAME-2 … if that is there"
    )
    parser.add_argument("--force", action="store_true", help="let --out replace an earlier run")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predicts one iteration: a prefill chunk (--chunk) behind --context cached tokens, or --decodes "
        "decodes with --context tokens each, or both together."
    )
    parser.add_argument("--model", required=True, help="a name, or a path to a Hugging Face config.json")
    parser.add_argument("--device", required=True, help="a name, or a path to a YAML file")
    parser.add_argument("--tp", type=_count, default=1, help="tensor parallelism")
    parser.add_argument("--spp", type=_count, default=1, help="pipeline stages")
    parser.add_argument("--kvp", type=_count, default=1, help="KV groups")
    parser.add_argument(
        "--kvp-tokens-per-group", type=_count, default=524288, metavar="N", help="before the next group joins"
    )
    parser.add_argument("--cp", type=_count, default=1, help="context parallelism: ranks in a ring")
    parser.add_argument("--ring", choices=("striped", "contiguous"), default="striped", help="its tokens")
    parser.add_argument(
        "--ring-merge",
        choices=("end", "step", "eager"),
        default="step",
        help="when its partial results are merged: at the end, after each step, or so by PyTorch's operators",
    )
    parser.add_argument(
        "--chunk", type=_tokens, default=0, metavar="C", help="prompt tokens in the iteration"
    )
    parser.add_argument("--decodes", type=_tokens, default=0, metavar="B", help="decodes in the iteration")
    parser.add_argument(
        "--context", type=_tokens, default=0, metavar="N", help="tokens in the KV cache of each"
    )
    parser.add_argument("--source", choices=("auto", "measured", "imported", "roofline"), default="auto")
    usual = "default: fp32 on a CPU, bf16 elsewhere"
    parser.add_argument("--weight-dtype", choices=("bf16", "fp8", "fp32"), help=usual)
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8", "fp32"), help=usual)
    parser.add_argument("--profile", metavar="DIR", help="a profile of your own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=commands.do_predict)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    from profiler.measure.arguments import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=commands.do_profile)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fits the predictors of a profile and says how good they are on rows and sizes that they haven't "
        "seen, beside other kinds of models."
    )
    parser.add_argument("profile", metavar="PROFILE_DIR")
    parser.add_argument("--out", metavar="FILE", help="where the predictor goes; default: into the profile")
    parser.add_argument("--no-compare", action="store_true", help="leave the other kinds of models out")
    parser.add_argument("--no-plots", action="store_true", help="leave the plot out")
    parser.set_defaults(run=commands.do_train)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turns published kernel times into a profile: aiconfigurator, the tables of the installed package, "
        "for all models; llmservingsim, a folder of LLMServingSim's tables of one model; layerwise, a table "
        "of aiconfigurator's layer-wise collector of one model."
    )
    parser.add_argument("what", choices=("aiconfigurator", "llmservingsim", "layerwise"), help="whose tables")
    parser.add_argument("tables", nargs="?", metavar="PATH", help="where they are (not for aiconfigurator)")
    parser.add_argument("--model", help="of which model they are (not for aiconfigurator)")
    parser.add_argument("--device", required=True, help="a name from `convoy list devices`")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to put the profile's folder")
    parser.add_argument("--force", action="store_true", help="replace a profile that is there")
    parser.set_defaults(run=commands.do_import)


def _add_traces(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    describe = actions.add_parser("describe", help="statistics of a trace in any known format")
    describe.add_argument("file", metavar="FILE")
    describe.add_argument("--format", default="auto", help="default: recognised from the file")
    describe.add_argument("--json", action="store_true", help="print JSON")
    describe.set_defaults(run=commands.do_describe)
    convert = actions.add_parser("convert", help="rewrite a trace as arrival_s,prompt_tokens,output_tokens")
    convert.add_argument("file", metavar="FILE")
    convert.add_argument("--format", default="auto", help="default: recognised from the file")
    convert.add_argument(
        "--out", required=True, metavar="FILE.csv", help="what to write; .csv.gz is compressed"
    )
    convert.add_argument("--force", action="store_true", help="overwrite the file")
    convert.set_defaults(run=commands.do_convert)


def _count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def _tokens(text: str) -> int:
    """A whole number of at least 0, with or without separators: 1_000_000, 1e6."""
    return _whole(text, 0)


def _share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1, not {text}")
    return value


def _whole(text: str, at_least: int) -> int:
    try:
        value = float(text)
        whole = int(text) if text.lstrip("+-").replace("_", "").isdecimal() else int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
    if whole != value or not at_least <= whole < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from {at_least} to 2147483647, not {text}")
    return whole


if __name__ == "__main__":
    sys.exit(main())
