"""What ``python -m cupy_nsa_meta`` runs: one module for each subcommand.

A subcommand is ``add_arguments(parser)`` and ``run(args) -> int``, the exit status:

    0  fine
    1  something does not work; the output says what, why and what to do
    2  bad options (argparse's own status)
"""

from __future__ import annotations

OK = 0
FAILED = 1
BAD_OPTIONS = 2
