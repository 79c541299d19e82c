"""The resources of a process: CPU threads, its GPU, and memory that is reused between batches."""

import ctypes
import platform

import torch


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
