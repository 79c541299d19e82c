"""What a process takes of its machine: threads, its GPU, and memory that is kept from one batch to the next."""

import ctypes
import platform

import torch


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


def keep_memory():
    """Let glibc keep freed memory for the next tensor of that size; no other libc is touched.

    By default it gives large blocks back to the system, and each activation then costs a page fault every 4 KiB: a
    sixth of the time that a small denoiser takes at a batch of 128 on one core.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
