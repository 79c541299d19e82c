"""Gain and cost of online fine-tuning: python benchmarks/online.py [--seeds '[0,1,2]'] [--out FILE.json] [--check]

It runs jobs/pipeline.py once per training seed. A finished run is not repeated. All models of a run are compared with
the base model at the guidance scale where it is best, on the same prompts and image seeds. A separate short run in this
process measures the time of the parts of an update.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from gates import ROOT, Benchmark, Findings, Gate, LocalPath, main
from pydantic import Field, PositiveInt

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig
from mi_ray.config.command_line import load_config
from mi_ray.inputs.online_plan import plan_of
from mi_ray.inputs.prompts import read_prompts
from mi_ray.inputs.shard_plan import write_prompts
from mi_ray.report.columns import scale as scale_of
from mi_ray.report.guidance import SCALE, at_scale, best_scale
from mi_ray.report.statistics import paired_difference, prompt_mean
from mi_ray.report.summary import declared, models_of, read_evaluation
from mi_ray.runs.layout import read_run
from mi_ray.stages.online import OnlineGenerator
from mi_ray.training.loop import loop_settings, prepare
from mi_ray.training.optimization import optimizer_step

SMOKE = {"updates": 2, "prompts_per_update": 2, "validate_every": 1, "validation_prompts": 0}
OUTSIDE = 0.1  # largest allowed share of an update's time outside the denoiser


class OnlineBenchmark(Benchmark):
    """How much better than the base model, at its best guidance scale, is an online fine-tuned model? Which share of
    the time of an update is spent outside the denoiser?"""

    config: LocalPath = Field(ROOT / "jobs" / "configs" / "shapes.yaml", description="config of the runs")
    flags: str = Field("", description="further flags of the runs, such as '--online.updates 96'")
    run_dir: LocalPath = Field(ROOT / "runs" / "online", description="folder of the runs: seed-0, seed-1, ...")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of the runs; (): only measure the time of updates")
    timed_updates: PositiveInt = Field(3, description="number of measured updates, after one to warm up")

    def answer(self) -> Findings:
        seeds = () if self.smoke else self.seeds
        settings = ["--config", str(self.config), *shlex.split(self.flags)]
        for seed in seeds:
            command = [sys.executable, "jobs/pipeline.py", *settings, "--seed", str(seed)]
            done = subprocess.run([*command, "--run-dir", self.run_dir / f"seed-{seed}"], cwd=ROOT)
            if done.returncode:
                raise ValueError(f"the run of seed {seed} ended with exit status {done.returncode}")
        rows = gains([str(self.run_dir / f"seed-{seed}") for seed in seeds]) if seeds else []
        config, _ = load_config(settings)
        if self.smoke:
            config = config.model_copy(update={"online": config.online.model_copy(update=SMOKE)})
        times = time_of_updates(config, 1 if self.smoke else self.timed_updates)
        gates = {"share_outside_denoiser": Gate(times.pop("outside"), maximum=OUTSIDE)}
        return Findings([*rows, *({"part": part, **of_part} for part, of_part in times.items())], gates)


# ---------------------------------------------------------------------------------------------- gain
def gains(run_dirs: list[str]) -> list[dict]:
    """For each model and guidance scale, the mean and the paired difference to the base model at its best scale.

    There are rows for each run and for all runs together. Intervals of all runs are over prompts, averaged over runs.
    """
    config, _ = read_run(run_dirs[0])
    frames = {model: _frames(run_dirs, model) for model in models_of(config)}
    frames = {model: frame for model, frame in frames.items() if frame is not None}
    base = frames.pop("base")
    column = _column(run_dirs[0])
    curve = [{SCALE: s, **prompt_mean(at_scale(base, s), column.name)} for s in sorted(base[SCALE].unique())]
    best = best_scale(curve, column)
    rows = [{"model": "base", SCALE: point[SCALE], column.name: scale_of(column) * point["value"]} for point in curve]
    for model, frame in frames.items():
        for scale in sorted(frame[SCALE].unique()):
            for run in (*run_dirs, None):
                few = frame[frame["run"] == run] if run else frame
                rows.append(
                    _gain(at_scale(few, scale), base, scale, best, column) | {"model": model, "run": run or "all"}
                )
    return rows


def _frames(run_dirs: list[str], model: str) -> pd.DataFrame | None:
    """The evaluated images of a model in all runs."""
    found = [(run, read_evaluation(run, model)) for run in run_dirs]
    found = [frame.assign(run=run) for run, frame in found if frame is not None]
    return pd.concat(found, ignore_index=True) if found else None


def _column(run_dir: str) -> Column:
    """The first column of the first metric of a run, which the report compares."""
    report = storage.read_json(storage.join(run_dir, "report", "report.json"))
    return next(iter(declared(report["metrics"]).values()))[0]


def _gain(frame: pd.DataFrame, base: pd.DataFrame, scale: float, best: float, column: Column) -> dict:
    row = {SCALE: scale, column.name: scale_of(column) * prompt_mean(frame, column.name)["value"]}
    splits = sorted(frame["split"].dropna().unique())
    for label, reference, images in (
        ("gain", best, frame),
        ("gain_at_equal_scale", scale, frame),
        *((f"gain_{split}", best, frame[frame["split"] == split]) for split in splits),
    ):
        found = paired_difference(images, at_scale(base, reference), column.name)
        row |= {label: scale_of(column) * found["difference"]}
        row |= {f"{label}_{end}": scale_of(column) * found[end] for end in ("low", "high")}
    return row


# ---------------------------------------------------------------------------------------------- time
class Board:
    """The board of generation and training in one process, one after the other."""

    def __init__(self):
        self.policies: dict[int, dict] = {}

    def wait(self, indices: list[int], deadline_s: float | None) -> list[int]:
        return list(indices)

    def finished(self, indices: list[int]):
        pass

    def publish(self, version: int, policy: dict):
        self.policies = {version: policy}

    def policy(self, version: int, timeout_s: float) -> tuple[str, dict]:
        return "here", self.policies[version]


class Stopwatch:
    """Measures the seconds in forward passes of modules and in backward passes."""

    def __init__(self):
        self.forward = self.backward = 0.0

    def watch(self, module: torch.nn.Module):
        began = []
        module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: self._add(time.perf_counter() - began.pop()))

    def _add(self, seconds: float):
        self.forward += seconds

    @contextmanager
    def backward_passes(self):
        original = torch.Tensor.backward

        def timed(tensor, *arguments, **options):
            began = time.perf_counter()
            original(tensor, *arguments, **options)
            self.backward += time.perf_counter() - began

        with patch.object(torch.Tensor, "backward", timed):
            yield


def time_of_updates(config: RunConfig, updates: int) -> dict:
    """Seconds per update, in total and in the denoiser, of generation (with scores and writing of shards) and training,
    in one process on the CPU. `outside` is the share of the total that is spent outside the denoiser."""
    online = config.online.model_copy(update={"updates": max(config.online.updates, updates + 1), "lag": 0})
    watches, seconds = {"generation": Stopwatch(), "training": Stopwatch()}, {"generation": 0.0, "training": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run_dir": folder, "online": online})
        table, _ = read_prompts(config.prompts.file, field="prompts.file")
        source, board = storage.join(folder, "prompts.parquet"), Board()
        write_prompts(source, table.to_batches())
        plan = plan_of(config, source)
        generator = OnlineGenerator(config.model_dump(mode="json"), source, folder, board)
        settings = {"prompts": source, "folder": folder, "board": board}
        settings = loop_settings(config, None, folder, None, "benchmark", settings)
        training, objective, learned = prepare(config, settings, torch.device("cpu"))
        learned.save = lambda *_: None  # the policies are published, but not saved
        learned.load({}, [])
        for denoiser in (generator.policy.base, generator.policy.drawing):
            watches["generation"].watch(denoiser.network)
        watches["training"].watch(objective.model)
        arguments = objective.parameters_trained, training.optimizer, training.scaler, config.finetune.max_grad_norm
        with watches["training"].backward_passes():
            for update in range(updates + 1):
                if update == 1:  # the first one warms up
                    seconds = dict.fromkeys(seconds, 0.0)
                    for watch in watches.values():
                        watch.forward = watch.backward = 0.0
                began = time.perf_counter()
                for index in plan.of_update(update):
                    generator({name: np.array([value]) for name, value in plan.row(index).items()})
                seconds["generation"] += time.perf_counter() - began
                began = time.perf_counter()
                for step in range(update * online.inner_steps, (update + 1) * online.inner_steps):
                    learned.open(step)
                    if parts := learned.parts(step, 0, 1):
                        optimizer_step(objective, parts, *arguments)
                    learned.close(step)
                seconds["training"] += time.perf_counter() - began
    within = {part: watch.forward + watch.backward for part, watch in watches.items()}
    rows = {part: {"seconds": seconds[part] / updates, "in_denoiser": within[part] / updates} for part in seconds}
    for row in rows.values():
        row["share_outside"] = 1 - row["in_denoiser"] / row["seconds"]
    return rows | {"outside": 1 - sum(within.values()) / sum(seconds.values())}


if __name__ == "__main__":
    main(OnlineBenchmark)
