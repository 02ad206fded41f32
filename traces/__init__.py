"""Requests in, records out: traces and synthetic workloads by column, and what a run leaves behind."""

from traces.build import build_workload
from traces.describe import describe
from traces.readers import FORMATS, Reading, detect_format, read_trace, read_trace_with_notes
from traces.synthesis import ClosedLoop, arrival_times, sample_lengths, stream
from traces.workload import PrefixBlocks, Workload

__all__ = [
    "FORMATS",
    "ClosedLoop",
    "PrefixBlocks",
    "Reading",
    "Workload",
    "arrival_times",
    "build_workload",
    "describe",
    "detect_format",
    "read_trace",
    "read_trace_with_notes",
    "sample_lengths",
    "stream",
]
