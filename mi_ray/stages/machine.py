"""What a process takes of its machine: threads, memory that is kept from one batch to the next, and batches that fit:
one that runs out of memory is halved and done again, and the size that fits is remembered.
"""

import ctypes
import logging
import platform
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from mi_ray.stages.work import Work

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Batched(Protocol):
    """Works through its rows batch_size at a time."""

    batch_size: int


def take_cpus(count: float):
    """Use as many threads as CPUs were asked for, so that actors never fight for cores."""
    torch.set_num_threads(max(1, int(count)))
    if not torch.cuda.is_available():
        keep_memory()


def take_share(cpus: float, gpus: float):
    """What an actor takes of its node: its threads, and its GPU, which must be there if one was asked for.

    Raises:
        RuntimeError: torch was built for CUDA and sees no GPU; the CPU would do the work, and the GPU cost money.
    """
    take_cpus(cpus)
    if gpus and torch.version.cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"resources.gpus_per_actor is {gpus:g}, but torch sees no GPU: it is built for CUDA {torch.version.cuda};"
            " see with nvidia-smi whether the node's driver is new enough for that"
        )


def fitting(worker: Batched, run: Callable[[], Result], work: Work) -> Result:
    """Run what takes batches of `worker.batch_size`; where memory does not suffice, halve that for good and run again.

    `run` is done from its start again, so it must leave nothing behind when it fails.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            if worker.batch_size == 1:
                raise
            reason = str(error).partition(".")[0]
        worker.batch_size //= 2  # outside of the handler, whose traceback holds the tensors
        work.batch_halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("%s: going on with batches of %d", reason, worker.batch_size)


def keep_memory():
    """Let glibc keep freed memory for the next tensor of that size; no other libc is touched.

    By default it gives large blocks back to the system, and each activation then costs a page fault every 4 KiB: a
    sixth of the time that a small denoiser takes at a batch of 128 on one core.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
