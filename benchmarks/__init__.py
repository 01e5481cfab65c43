"""Support of ``bench.py``: workloads, check-and-time loops, reports. Not part of the package."""


class BenchError(Exception):
    """Bad options or input: one line with what, what was expected, what came. Exit status 2."""
