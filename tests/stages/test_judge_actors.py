"""Metrics that are measured by actors of their own."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mi_ray.alignment.metric import load_metrics, measure
from mi_ray.config import ResourcesConfig
from mi_ray.scoring.machine import Turn
from mi_ray.stages import judges
from mi_ray.stages.judges import Judge, ask, judges_of

MINE = "dark_pixels:DarkPixels"
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
PROMPTS = ["a red circle", "a blue star", "two hearts", "a cat"]
SCRIPT = """
import numpy as np, ray
from mi_ray.alignment.metric import load_metrics, measure
from mi_ray.config import ResourcesConfig
from mi_ray.scoring.machine import Turn
from mi_ray.stages.judges import ask, judges_of

ray.init(log_to_driver=False, logging_level="error")
names, images = ("dark_pixels:DarkPixels",), np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
prompts = ["a red circle", "a blue star", "two hearts", "a cat"]
local, metrics = load_metrics(names), load_metrics(names)
turn = Turn()
with judges_of(names, ResourcesConfig(judge_actors=2, judge_cpus=0.5)) as judges, turn():
    ask(judges, metrics, turn)
    assert [measure(metrics, images, prompts) for _ in range(2)] == [measure(local, images, prompts)] * 2
    for judge in judges:
        ray.kill(judge, no_restart=False)
    assert [measure(metrics, images, prompts) for _ in range(2)] == [measure(local, images, prompts)] * 2
print("measured")
"""


@pytest.fixture
def asked(monkeypatch, dark_pixels):
    """Three judges in this process, and the places of those that were asked."""
    found = []

    def remote(place: int):
        judge = Judge((MINE,), 1, 0)

        def call(*arguments):
            found.append(place)
            return judge.measure(*arguments)

        return SimpleNamespace(measure=SimpleNamespace(remote=call))

    monkeypatch.setattr(judges, "take_share", lambda *_: None)
    monkeypatch.setattr(judges.ray, "get", lambda value: value)
    return [remote(place) for place in range(3)], found


def test_judges_are_asked_in_turn_and_give_the_values_of_the_metric(asked):
    actors, places = asked
    expected = measure(load_metrics((MINE,)), IMAGES, PROMPTS)
    metrics, turn = load_metrics((MINE,)), Turn()
    ask(actors, metrics, turn)
    for _ in range(4):
        with turn():
            assert measure(metrics, IMAGES, PROMPTS) == expected
    assert places == [(places[0] + i) % 3 for i in range(4)]
    assert metrics[MINE].columns == load_metrics((MINE,))[MINE].columns


def test_without_judges_the_actor_measures_itself(asked):
    metrics = load_metrics((MINE,))
    ask([], metrics, Turn())
    measure(metrics, IMAGES, PROMPTS)
    assert asked[1] == []
    with judges_of((), ResourcesConfig(judge_actors=2)) as none:  # no metrics: no actor is started, Ray neither
        assert none == []


@pytest.fixture
def dark_pixels(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "alignment")


@pytest.mark.ray
def test_judges_measure_in_processes_of_their_own_and_are_restarted(ray_head):
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=ray_head, capture_output=True, text=True)
    assert done.stdout.endswith("measured\n"), done.stderr[-2000:]


@pytest.mark.ray
def test_a_generating_actor_begins_the_next_shard_while_a_judge_measures(ray_head, tmp_path):
    prompts = ["prompt 0", "prompt 1", "prompt 2"]
    command = [sys.executable, str(Path(__file__).with_name("judged_run.py")), str(tmp_path), *prompts]
    done = subprocess.run(command, env=ray_head, capture_output=True, text=True)
    values = [f"{prompt} {50.0 * index} None" for index, prompt in enumerate(prompts)]
    assert done.stdout.splitlines() == values, done.stderr[-2000:]
