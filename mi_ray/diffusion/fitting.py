"""Batch sizes that fit into memory: after an out-of-memory error the batch size is halved and the work is repeated."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Batched(Protocol):
    """An object that processes `batch_size` rows at a time."""

    batch_size: int


class Halvings(Protocol):
    """Counts how often a batch size was halved."""

    batch_halvings: int


def fitting(
    worker: Batched,
    run: Callable[[], Result],
    work: Halvings | None = None,
    make_room: Callable[[], bool] | None = None,
) -> Result:
    """Call `run`, which uses batches of `worker.batch_size`. If memory runs out, halve that size and call `run` again.

    The smaller batch size stays. `run` starts again from the beginning, so it must have no lasting effect when it
    fails.

    Args:
        work: counts the halvings; None: they are not counted.
        make_room: frees memory that can be spared, which is tried before the size is halved; false: there is none.

    Raises:
        torch.OutOfMemoryError: a batch of one row does not fit.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # a traceback keeps the tensors alive
        reason = str(failure).partition(".")[0]
        if make_room is not None and make_room():
            log.warning("%s; the text encoders now leave the GPU after encoding", reason)
            continue
        if worker.batch_size == 1:
            raise failure
        worker.batch_size //= 2
        if work is not None:
            work.batch_halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("%s; the batch size is now %d", reason, worker.batch_size)
