"""Start the processes of a parallel training on this machine, as torchrun does, and say how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


class RankFailed(RuntimeError):
    """A process of a parallel training ended in another way than by an error that it could tell of."""


def run_ranks(module: str, order: str, size: int, stopped: int, seconds: float) -> int:
    """`python -m module FILE` in `size` processes, with the order in the file; their exit code, the largest where they differ,
    and `stopped` where this process was asked to stop, and so they were, and had `seconds` to end. Raises RankFailed where one
    was killed. They have all ended when this returns."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # what went wrong is said below, without a stack
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // size))
    with TemporaryDirectory(prefix="sae-ranks-") as folder:
        file = Path(folder) / "order.json"
        file.write_text(order)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            run_id=uuid4().hex,
            max_restarts=0,  # the flow tries again, and says so
            shutdown_timeout=ceil(seconds),
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, str(file))
        except SignalException:
            return stopped
        except ChildFailedError as error:
            for rank, failure in sorted(error.failures.items()):
                # What ends by SIGTERM is ended by the launcher, since another has failed.
                if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                    name = signal.Signals(-failure.exitcode).name
                    why = "by hand or because memory ran out" if name == "SIGKILL" else "it crashed"
                    raise RankFailed(f"process {rank} of {size} was killed ({name}), {why}") from error
            return max(failure.exitcode for failure in error.failures.values())
    return 0
