"""Times of several implementations that run in turn."""

import time
from collections.abc import Callable
from statistics import median

from workers import synchronise

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}


def alternate(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each implementation. They run in turn, after one warm-up round."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            synchronise()
            began = time.perf_counter()
            run()
            synchronise()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}
