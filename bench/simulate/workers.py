"""Fresh processes for work that compiles kernels: this one may hold some that are decorated for the interpreter."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from rir_kernels.common.versions import triton_missing
from rir_kernels.triton.inspect import compile_for_real
from tooling import console


def each(function: Callable, jobs: dict[str, tuple], title: str) -> dict[str, Any]:
    """function(*job) of each job by its name, in their order, computed on all cores, with a progress bar.

    ValueError without Triton.
    """
    if missing := triton_missing():
        raise ValueError(f"simulate needs {missing}: its kernels are compiled, though no GPU has to be there")
    workers = min(len(jobs), os.cpu_count() or 1)
    with (
        console.progress(title, len(jobs)) as reach,
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=compile_for_real) as pool,
    ):
        futures = {pool.submit(function, *job): name for name, job in jobs.items()}
        reach(0, "compiling and simulating")
        for done, future in enumerate(as_completed(futures), start=1):
            reach(done, f"{futures[future]} is done")
        return {name: future.result() for future, name in futures.items()}
