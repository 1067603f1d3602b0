"""Scale-out: jobs that offload to a Dask cluster, through its executor.

Here the cluster is two processes on this machine; with the address of a scheduler it is many
machines, and nothing else changes.

Expected output::

    in jobs: [0, 1, 3, 7, 15, 31]
    in another process: True
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Executor

from distributed import Client, LocalCluster

from aiojob import offload, run_job


def mersenne(exponent: int) -> int:
    """Runs on the cluster."""
    return (1 << exponent) - 1


def report(exponent: int, cluster: Executor) -> int:
    """Synchronous code that leaves the machine, and pauses its job meanwhile."""
    return offload(mersenne, exponent, executor=cluster)


async def main(cluster: Executor) -> None:
    print("in jobs:", await asyncio.gather(*(run_job(report, n, cluster) for n in range(6))))
    pid = await run_job(offload, os.getpid, executor=cluster)
    print("in another process:", pid != os.getpid())


if __name__ == "__main__":
    with (
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port; None would be 8787, for everybody
            worker_dashboard_address="127.0.0.1:0",
        ) as local,
        Client(local) as client,  # type: ignore[no-untyped-call]
        # Dask takes equal calls for one unless told: cancelling one job would cancel them all.
        client.get_executor(pure=False) as executor,
    ):
        asyncio.run(main(executor))
