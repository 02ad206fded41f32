"""`python -m profiler.measure`: `convoy profile` without the rest of Convoy's requirements."""

from __future__ import annotations

import argparse
import sys

from profiler.measure.arguments import add_arguments, run
from specs.errors import InputError


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiler.measure", allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args()).status
    except InputError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
