"""An online run on many GPUs in simulated time, for benchmarks/scaling.py --online.

The plan of the parts and the board are those of a real run: they decide which policy samples a part, and what the
training waits for. Sampling and training are replaced by waits on a clock that jumps to the next event.
"""

import asyncio
import math
import random
import selectors
from collections.abc import Iterator
from dataclasses import dataclass, field

from mi_ray.inputs.online_plan import OnlinePlan
from mi_ray.stages.online import LOOK_S
from mi_ray.training.board import Meeting


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next event. It starts at 0."""

    def __init__(self):
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class _Jump(selectors.SelectSelector):
    """Does not wait: it moves the clock instead."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list:
        self.clock.now += timeout or 0.0
        return super().select(0)


@dataclass(frozen=True)
class Times:
    """The times of the parts of an online run, in seconds."""

    prompt: float  # sampling and scoring the candidates of one prompt on one GPU
    training: float  # training on the candidates of one prompt on one GPU, all inner steps
    part: float = 0.0  # between two parts of an actor: Ray Data and the commit
    update: float = 0.0  # of an update, on all training GPUs: reading the parts, publishing the policy
    checkpoint: float = 0.0  # of a checkpoint, on all training GPUs
    spread: float = 0.0  # standard deviation of the logarithm of a part's time


@dataclass
class Recorder:
    """The intervals in which GPUs were busy, and the intervals of the updates' trainings."""

    busy: list[tuple[float, float, int]] = field(default_factory=list)  # start, end, number of GPUs
    trained: list[tuple[float, float]] = field(default_factory=list)

    def share(self, gpus: int, first: float, last: float) -> float:
        within = sum(n * max(0.0, min(end, last) - max(start, first)) for start, end, n in self.busy)
        return within / (gpus * (last - first))


def simulate(plan: OnlinePlan, times: Times, actors: int, workers: int, candidates: int, seed: int = 0) -> dict:
    """Simulate the run on actors + workers GPUs.

    Args:
        candidates: number of candidates per prompt; a validation has another number, and its time is proportional.

    Returns:
        busy_share: share of the time of all GPUs in the steady state, from the first training to the last one;
        busy_share_whole_run; seconds_per_update in the steady state; wall_s, without the last validation.
    """
    recorder = Recorder()
    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(_run(plan, times, actors, workers, candidates, random.Random(seed), recorder))
    first, last, end = recorder.trained[0][0], recorder.trained[-1][0], recorder.trained[-1][1]
    return {
        "busy_share": recorder.share(actors + workers, first, last),
        "busy_share_whole_run": recorder.share(actors + workers, 0.0, end),
        "seconds_per_update": (last - first) / (len(recorder.trained) - 1),
        "wall_s": end,
    }


async def _run(
    plan: OnlinePlan, times: Times, actors: int, workers: int, candidates: int, lots: random.Random, recorder: Recorder
):
    board, parts = Meeting(plan.config.lag + 1), iter(range(len(plan)))
    generating = [_actor(plan, times, candidates, board, parts, lots, recorder) for _ in range(actors)]
    await asyncio.gather(_train(plan, times, workers, board, recorder), *generating)


async def _actor(
    plan: OnlinePlan,
    times: Times,
    candidates: int,
    board: Meeting,
    parts: Iterator[int],
    lots: random.Random,
    recorder: Recorder,
):
    """An actor of a fixed pool: it gets the next part of the plan when it is free, and waits for the part's policy."""
    loop = asyncio.get_running_loop()
    for index in parts:
        row = plan.row(index)
        await asyncio.sleep(times.part)
        while (await board.policy(row["version"], LOOK_S))[0] == "wait":
            pass
        images = plan.config.validation_candidates if row["validation"] else candidates
        seconds = times.prompt * plan.size(index) * images / candidates
        began = loop.time()
        await asyncio.sleep(seconds * math.exp(lots.gauss(0.0, times.spread)))
        recorder.busy.append((began, loop.time(), 1))
        await board.finished([index])


async def _train(plan: OnlinePlan, times: Times, workers: int, board: Meeting, recorder: Recorder):
    """The training workers. They wait for the parts of an update, and before it for a validation that they compare."""
    loop, config = asyncio.get_running_loop(), plan.config
    await board.publish(0, None)
    for update in range(config.updates):
        judged = update - config.validate_every
        if judged > 0 and plan.of_validation(judged):
            await board.wait(plan.of_validation(judged), None)
        parts = await board.wait(plan.of_update(update), config.deadline_s)
        began = loop.time()
        await asyncio.sleep(times.training * sum(plan.size(part) for part in parts) / workers)
        recorder.busy.append((began, loop.time(), workers))
        await asyncio.sleep(times.update)
        await board.publish(update + 1, None)
        if (update + 1) % config.validate_every == 0:
            await asyncio.sleep(times.checkpoint)
        recorder.trained.append((began, loop.time()))
