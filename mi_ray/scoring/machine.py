"""The resources of a process: CPU threads, its GPU, memory that is reused between batches, and a limit of its time."""

import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STALLED_S = 3600.0  # longest time between model calls; torch.compile and a large batch on a CPU take less


def usable_cores() -> int:
    """Number of CPU cores that this process may use: fewer than the machine has in a container, a job or `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_cpus(count: float):
    """Use as many threads as requested CPUs, so that actors do not compete for cores."""
    torch.set_num_threads(max(1, int(count)))
    if not torch.cuda.is_available():
        keep_memory()


def take_share(cpus: float, gpus: float):
    """Set the threads of an actor, and check that it has a GPU if one was requested.

    Raises:
        RuntimeError: torch is built for CUDA but finds no GPU. The work would run on the CPU while the GPU is paid for.
    """
    take_cpus(cpus)
    if gpus and torch.version.cuda and not torch.cuda.is_available():
        raise RuntimeError(
            f"resources.gpus_per_actor is {gpus:g}, but torch finds no GPU: it is built for CUDA {torch.version.cuda}"
            " and the node's driver may be too old for it; check the driver with nvidia-smi"
        )


def keep_memory():
    """Make glibc keep freed memory for the next tensor of the same size. Has no effect with another libc.

    By default glibc returns large blocks to the system. Each activation then causes a page fault every 4 KiB, which
    takes a sixth of the time of a small denoiser at batch size 128 on one core.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Turn:
    """Lets one shard of an actor compute at a time. A shard that waits for judges lets the next one compute."""

    def __init__(self):
        self._lock, self._shard = threading.Lock(), threading.local()

    @property
    def seconds(self) -> float:
        """Seconds for which the shard of this thread has had the turn."""
        return time.perf_counter() - self._shard.began

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._shard.began = time.perf_counter()
            yield

    @contextmanager
    def given_away(self) -> Iterator[None]:
        began = time.perf_counter()
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._shard.began += time.perf_counter() - began


class Patience:
    """Ends this process if it hangs at a shard, so that Ray starts a new process for the shard.

    Args:
        seconds: time limit of a shard; None: no limit, but at most `STALLED_S` between two model calls.
        calls: returns the number of model calls so far.
    """

    def __init__(self, seconds: float | None, calls: Callable[[], int]):
        self.seconds, self.calls = seconds, calls

    @contextmanager
    def __call__(self) -> Iterator[None]:
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), name="patience", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _watch(self, done: threading.Event):
        limit = self.seconds or STALLED_S
        moved, calls = time.monotonic(), self.calls()
        while not done.wait(min(limit / 10, 10.0)):
            if not self.seconds and self.calls() != calls:
                moved, calls = time.monotonic(), self.calls()
            if time.monotonic() - moved > limit:
                hung = "on one shard" if self.seconds else "without a model call"
                advice = "it seems to hang, and Ray starts a new process; if it was only slow, raise"
                advice += " resources.shard_timeout_s"
                print(f"this process ends after {limit:.0f} s {hung}: {advice}", file=sys.stderr, flush=True)
                os._exit(1)
