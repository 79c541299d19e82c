"""The status of a run, from its folder: what is done, failed and left, and an estimate of the remaining time."""

import time
from bisect import insort
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise

from mi_ray import storage
from mi_ray.config import RunConfig, folder_name
from mi_ray.runs import folder as run_folder
from mi_ray.runs.cost import evaluations
from mi_ray.runs.layout import (
    CANDIDATES,
    REFERENCE,
    SCORES,
    SUMMARY,
    baselines,
    home_of,
    online_folder,
    read_content,
    read_run,
)
from mi_ray.runs.lease import latest

RECENT = 50  # number of latest shards that the pace is computed from


@dataclass(frozen=True)
class StageStatus:
    """The status of one stage of one model. Units: shards, optimiser steps (`finetune`), or one table (`select`)."""

    stage: str
    model: str
    unit: str
    done: int
    left: int | None  # None: not known until the earlier stages have run
    errors: int = 0  # number of rows with an error in place of a result
    seconds_left: float | None = None  # None: not known yet

    @property
    def state(self) -> str:
        if self.left == 0:
            return "done"
        return "under way" if self.done else "to do"


class _Events:
    """The facts of events.jsonl that the status needs, read once, line by line. It keeps no data per shard."""

    def __init__(self, run_dir: str):
        self.prompts: dict[str, int] = {}  # {stage: number of prompts used}
        self.planned: dict[str, int] = {}  # {folder: number of planned shards}
        self.left: dict[
            str, int
        ] = {}  # {folder: shards that were missing when the last driver started and are not written yet}
        # {folder: times when a driver started with it (False) and when the latest shards were written (True)}
        self.times: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        self.errors: dict[str, dict[str, int]] = defaultdict(
            dict
        )  # {folder: {shard with errors: number of error rows}}
        self.spent: dict[str, int] = defaultdict(int)  # {folder: number of denoiser evaluations}
        self.shards: dict[str, int] = defaultdict(int)  # {folder: number of shards written}
        self.shard_seconds = 0.0
        self.sessions, self.finished = 0, False
        self.skipped: dict[tuple[str, str], int] = {}
        self.restarts, self.halvings = 0, 0
        self.last: dict | None = None
        for event in storage.iter_lines(storage.join(run_dir, "events.jsonl")):
            self.last, kind = event, event["event"]
            if kind == "shard_written":
                self._shard_written(event)
            elif kind == "shards_planned":
                self.planned[event["folder"]], self.left[event["folder"]] = event["shards"], event["missing"]
                self._note(event["folder"], event["time"], False)
            elif kind == "prompts_read":
                self.prompts[event["stage"]] = event["used"]
            elif kind == "prompt_skipped":
                self.skipped[event["prompt"], event["message"]] = event.get("count", 1)  # every session logs it again
            elif kind == "run_started":
                self.sessions, self.finished = self.sessions + 1, False
            elif kind == "run_finished":
                self.finished = True

    def _shard_written(self, event: dict):
        folder = event.get("folder")
        self.spent[folder] += event["denoiser_evaluations"] + event["score_evaluations"]
        self.shards[folder] += 1
        self.shard_seconds += event["seconds"]
        self.restarts += event.get("actor_restarts", 0)
        self.halvings += event.get("batch_halvings", 0)
        if self.left.get(folder):
            self.left[folder] -= 1
        self._note(folder, event["time"], True)
        errors = self.errors[folder]
        errors.pop(event["shard"], None)
        if event["errors"]:
            errors[event["shard"]] = event["errors"]

    def _note(self, folder: str, time: float, written: bool):
        insort(self.times[folder], (time, written))
        del self.times[folder][:-RECENT]

    @property
    def seconds_per_evaluation(self) -> float | None:
        """Wall time per denoiser evaluation, of all actors together. If no pace is known yet: of one actor."""
        paces = {folder: _pace(times) for folder, times in self.times.items()}
        known = [folder for folder, pace in paces.items() if pace is not None and self.spent[folder]]
        if known:
            return sum(paces[f] * self.shards[f] for f in known) / sum(self.spent[f] for f in known)
        spent = sum(self.spent.values())
        return self.shard_seconds / spent if spent else None


def _pace(times: list[tuple[float, bool]]) -> float | None:
    """Mean wall time per shard in seconds, of the latest shards. None if no shard was written.

    The time of a shard starts when the driver started or when the previous shard was written, so pauses without a
    driver do not count. Shards that several actors finish at the same time share this time.

    Args:
        times: in order, the times when a driver started (False) and when a shard was written (True).
    """
    gaps = [after - before for (before, _), (after, written) in pairwise(times) if written]
    return sum(gaps) / len(gaps) if gaps else None


def _shards(folder: str, stage: str, model: str, planned: int | None, events: _Events, run_dir: str):
    names = storage.list_names(storage.join(folder, run_folder.COMMITS))
    done = sum(name.endswith(".json") for name in names)
    here = storage.relative(folder, run_dir)
    if storage.exists(storage.join(folder, run_folder.MANIFEST)):
        planned = done
    left = None if planned is None else max(0, planned - done)
    return _of_shards(stage, model, done, left, events, here)


def _of_shards(stage: str, model: str, done: int, left: int | None, events: _Events, folder: str) -> StageStatus:
    pace, errors = _pace(events.times[folder]), sum(events.errors[folder].values())
    seconds = 0.0 if left == 0 else left * pace if left is not None and pace is not None else None
    return StageStatus(stage, model, "shards", done, left, errors, seconds)


def _finetune(folder: str, model: str, steps: int) -> StageStatus:
    if storage.exists(storage.join(folder, SUMMARY)):
        return StageStatus("finetune", model, "steps", steps, 0, 0, 0.0)
    done = len(storage.read_lines(storage.join(folder, "training.jsonl")))
    return StageStatus("finetune", model, "steps", done, steps - done)


def _online(config: RunConfig, arm: str, events: _Events) -> list[StageStatus]:
    """The stages of an arm of an online run: candidates and training, which run at the same time."""
    folder = online_folder(config.run_dir, arm)
    candidates = storage.join(folder, CANDIDATES)
    planned = events.planned.get(storage.relative(candidates, config.run_dir))
    drawn = _shards(candidates, "online", arm, planned, events, config.run_dir)
    steps = config.online.updates * config.online.inner_steps
    done = len(storage.read_lines(storage.join(folder, "training.jsonl")))
    if storage.exists(storage.join(folder, "adapter", SUMMARY)):  # training may have stopped early
        drawn, done, steps = StageStatus("online", arm, "shards", drawn.done, 0, drawn.errors, 0.0), done, done
    return [drawn, StageStatus("finetune", arm, "steps", done, steps - done, 0, 0.0)]


def _stages(config: RunConfig, events: _Events, has_reference: bool) -> list[StageStatus]:
    run_dir = config.run_dir
    per_shard = config.generate.prompts_per_shard
    planned = {stage: -(-count // per_shard) for stage, count in events.prompts.items()}
    stages = []
    for arm in ("tuned", *config.evaluation.controls):
        home = home_of(run_dir, arm)
        if config.online.updates:
            stages += _online(config, arm, events)
            continue
        for r in range(config.rounds):
            model = f"{arm}, round {r}"
            if r or arm == "tuned":
                folder = storage.join(home, f"round-{r}", "candidates")
                stages.append(_shards(folder, "generate", model, planned.get("train"), events, run_dir))
            selected = storage.exists(storage.join(home, f"round-{r}", "selected.parquet"))
            stages.append(StageStatus("select", model, "table", int(selected), int(not selected)))
            adapter = storage.join(home, f"round-{r}", "adapter")
            stages.append(_finetune(adapter, model, config.finetune.steps))
    for model, folder in [] if config.online.updates else baselines(config):
        selected = storage.exists(storage.join(folder, "selected.parquet"))
        stages.append(StageStatus("select", model, "table", int(selected), int(not selected)))
        stages.append(_finetune(storage.join(folder, "adapter"), model, config.finetune.steps))
    reference = [REFERENCE] if has_reference else []
    for model in (*reference, "base", "tuned", *config.evaluation.controls):
        folder = storage.join(run_dir, "evaluation", folder_name(model))
        stages.append(_shards(folder, "evaluate", model, planned.get("evaluation"), events, run_dir))
    written = storage.exists(storage.join(run_dir, "report", "index.html"))
    return [*stages, StageStatus("report", "all", "page", int(written), int(not written))]


def _pair_stages(run_dir: str, model: str, events: _Events) -> list[StageStatus]:
    """The stages of a run of jobs/score.py."""
    planned, left = events.planned.get(SCORES), events.left.get(SCORES)
    # Receipts are not counted: those of pairs removed from the input are deleted only at the end.
    done = 0 if planned is None else planned - left
    scored = _of_shards("score", model, done, left, events, SCORES)
    return [scored, StageStatus("audit", "all", "page", int(events.finished), int(not events.finished), 0, 0.0)]


def _with_estimates(stages: list[StageStatus], config: RunConfig, events: _Events) -> list[StageStatus]:
    """Estimate the remaining time of stages without a pace, from their denoiser evaluations and the pace so far."""
    each, prompts = events.seconds_per_evaluation, events.prompts
    if not each or "train" not in prompts:
        return stages
    counts = evaluations(config, prompts["train"], prompts.get("evaluation", 0))
    cost = {
        "online": counts["generate"] + counts["score"] + counts["finetune"],
        "generate": counts["generate"] + counts["score"],
        "finetune": counts["finetune"],
        "evaluate": counts["evaluate"],
    }
    models = {name: sum(s.stage == name and s.model != REFERENCE for s in stages) for name in cost}
    filled = []
    for status in stages:
        seconds = status.seconds_left
        if seconds is None:
            of_stage = status.stage in cost and status.model != REFERENCE
            share = status.left / max(1, status.left + status.done) if status.left is not None else 1.0
            seconds = share * each * cost[status.stage] / models[status.stage] if of_stage else 0.0
        filled.append(StageStatus(**(asdict(status) | {"seconds_left": seconds})))
    return filled


def run_status(run_dir: str) -> dict:
    """The status of the run in a folder: its stages in order, its driver, and the errors so far.

    Raises:
        ConfigError: the folder has no run, or a run of another job.
    """
    content, events = read_content(run_dir), _Events(run_dir)
    if "input" in content["config"]:
        stages = _pair_stages(run_dir, content["config"]["model"], events)
    else:
        config, _ = read_run(run_dir)
        stages = _with_estimates(_stages(config, events, content.get("has_reference", False)), config, events)
    lefts = [status.seconds_left for status in stages]
    return {
        "run_dir": run_dir,
        "config_hash": content["config_hash"],
        "stages": [asdict(status) | {"state": status.state} for status in stages],
        "seconds_left": None if None in lefts else sum(lefts),
        "error_rows": sum(status.errors for status in stages),
        "prompts_skipped": sum(events.skipped.values()),
        "sessions": events.sessions,
        "actor_restarts": events.restarts,
        "batch_halvings": events.halvings,
        "last_event": events.last,
        "driver": _driver(run_dir),
    }


def _driver(run_dir: str) -> dict | None:
    """The holder of the run's lease: host, pid, since, seconds since its heartbeat. None if there is no holder."""
    _, holder = latest(run_dir)
    if holder is None or holder["released"]:
        return None
    heard = max(0.0, time.time() - holder["heartbeat"])
    driver = {key: holder[key] for key in ("host", "pid", "since", "seconds")}
    return driver | {"seconds_since_heartbeat": round(heard, 1)}


def rough_duration(seconds: float | None) -> str:
    """A duration as text: 12 s, 12 min or 12.3 h."""
    if seconds is None:
        return "?"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def status_text(status: dict) -> str:
    """The status as text for the terminal."""
    rows = [("stage", "model", "state", "done", "left", "error rows", "time left")]
    for s in status["stages"]:
        left = "?" if s["left"] is None else f"{s['left']} {s['unit']}"
        time_left = "" if s["state"] == "done" else rough_duration(s["seconds_left"])
        rows.append((s["stage"], s["model"], s["state"], str(s["done"]), left, str(s["errors"] or ""), time_left))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    driver = status["driver"]
    lines.append("")
    if driver:
        silent = driver["seconds_since_heartbeat"] > driver["seconds"]
        gone = ", so it is dead; run the same command to continue the run" if silent else ""
        heard = f"last heartbeat {driver['seconds_since_heartbeat']:.0f} s ago{gone}"
        lines.append(f"driver: process {driver['pid']} on {driver['host']}, {heard}")
    else:
        lines.append("driver: none; run the same command to continue the run")
    if (last := status["last_event"]) and last["event"] == "run_failed":
        lines.append(f"the last driver failed: {last['error']}")
    lines.append(f"error rows: {status['error_rows']}, prompts skipped: {status['prompts_skipped']}")
    lines.append(
        f"drivers so far: {status['sessions']}, actors restarted: {status['actor_restarts']}, batches halved because"
        f" memory ran out: {status['batch_halvings']}"
    )
    if any(s["state"] != "done" for s in status["stages"]):
        lines.append(f"time left: about {rough_duration(status['seconds_left'])}, at the present pace")
    return "\n".join(lines)
