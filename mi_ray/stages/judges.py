"""Actors that only measure metrics, with CPUs and GPUs of their own: a large judge needs much memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice

import numpy as np
import ray
from ray.actor import ActorHandle

from mi_ray.alignment.metric import Metric, load_metrics
from mi_ray.config import ResourcesConfig
from mi_ray.scoring.machine import Turn, take_share

Judges = Sequence[ActorHandle]
RETRIES = 3  # of a batch whose judge was lost


class Judge:
    """Ray actor: measures batches of images. The model of a metric is loaded when it is first used."""

    def __init__(self, names: Sequence[str], cpus: float, gpus: float):
        take_share(cpus, gpus)
        self.metrics = load_metrics(names)

    def measure(self, name: str, images: np.ndarray, prompts: list[str]) -> Mapping[str, Sequence[float | None]]:
        return self.metrics[name].measure(images, prompts)


@contextmanager
def judges_of(metrics: tuple[str, ...], resources: ResourcesConfig) -> Iterator[Judges]:
    """`resources.judge_actors` judges of these metrics, none if there are no metrics. They end with the context."""
    share = resources.judge_cpus, resources.judge_gpus
    actor = ray.remote(Judge).options(num_cpus=share[0], num_gpus=share[1], max_restarts=-1, max_task_retries=RETRIES)
    judges = [actor.remote(metrics, *share) for _ in range(resources.judge_actors if metrics else 0)]
    try:
        yield judges
    finally:
        for judge in judges if ray.is_initialized() else ():
            ray.kill(judge)


def ask(judges: Judges, metrics: Mapping[str, Metric], turn: Turn):
    """Let judges measure an actor's metrics while its next shard has the turn. Without judges, it does it itself."""
    if not judges:
        return
    order = islice(cycle(judges), os.getpid() % len(judges), None)  # actors begin with different judges
    for name, metric in metrics.items():
        metric.measure = partial(_asked, order, turn, name)


def _asked(order: Iterator[ActorHandle], turn: Turn, name: str, images: np.ndarray, prompts: list[str]):
    values = next(order).measure.remote(name, images, prompts)
    with turn.given_away():
        return ray.get(values)
