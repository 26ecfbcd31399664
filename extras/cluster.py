"""--cluster and --worker-backend, for -b dask-cluster: which cluster, and what its workers call the API with.

The docstring of backends/dask_cluster.py says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from . import core


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flags."""
    option("--cluster", metavar="ADDRESS", help="dask-cluster's scheduler (tcp://host:8786), or "
           "how many local processes (default: one a core)")  # fmt: skip
    option("--worker-backend", metavar="NAME", help="what dask-cluster's workers call the API with (as -b)")


def create(args: argparse.Namespace) -> None:
    """Pass them on to the backend."""
    if "" in (args.cluster, args.worker_backend):
        raise core.UsageError("--cluster and --worker-backend need a value")
    args.settings |= {"cluster": args.cluster, "worker_backend": args.worker_backend}
