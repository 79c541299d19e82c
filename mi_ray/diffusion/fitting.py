"""Batches that fit: one that runs out of memory is halved and done again, and the size that fits is remembered."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Batched(Protocol):
    """Works through its rows batch_size at a time."""

    batch_size: int


class Halvings(Protocol):
    """Counts how often a batch was halved."""

    batch_halvings: int


def fitting(worker: Batched, run: Callable[[], Result], work: Halvings | None = None) -> Result:
    """Run what takes batches of `worker.batch_size`; where memory does not suffice, halve that for good and run again.

    `run` is done from its start again, so it must leave nothing behind when it fails.

    Args:
        work: where the halvings are counted, if anywhere.

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
        if work is not None:
            work.batch_halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("%s: going on with batches of %d", reason, worker.batch_size)
