"""The log of a training run: training.jsonl, a line on the terminal, TensorBoard, W&B, MLflow."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from pyarrow.fs import LocalFileSystem

from mi_ray.config.section import ConfigError
from mi_ray.runs import lease
from mi_ray.storage import filesystem, join, write_bytes

PROGRESS_SECONDS = 5


def check_loggers(log_to: tuple[str, ...]):
    """Check that the packages of the trackers in `finetune.log_to` are installed.

    Raises:
        ConfigError: a package is not installed; one message for each.
    """
    missing = [name for name in log_to if find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"finetune.log_to: {name} is not installed; run pip install 'mi-ray[{name}]' or remove it from the list"
                for name in missing
            ]
        )


class _TensorBoard:
    def __init__(self, destination: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.uri = join(destination, "tensorboard")
        system, path = filesystem(self.uri)
        # Event files are appended to. An object store cannot append, so the files are uploaded whole at each flush.
        self.staging = None if isinstance(system, LocalFileSystem) else tempfile.TemporaryDirectory()
        self.writer = SummaryWriter(self.staging.name if self.staging else path, purge_step=first_step)

    def log(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self.writer.add_scalar(f"finetune/{name}", value, step)

    def flush(self):
        self.writer.flush()
        if self.staging:
            for file in Path(self.staging.name).iterdir():
                write_bytes(join(self.uri, file.name), file.read_bytes())

    def close(self):
        self.flush()
        self.writer.close()
        if self.staging:
            self.staging.cleanup()


class _Wandb:
    def __init__(self, name: str, settings: dict):
        project = os.environ.get("WANDB_PROJECT", "mi-ray")
        folder = tempfile.gettempdir()
        self.run = import_module("wandb").init(
            project=project, id=name, name=name, config=settings, dir=folder, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]):
        self.run.log({f"finetune/{name}": value for name, value in values.items()}, step=step)

    def flush(self):
        pass  # wandb uploads in its own process

    def close(self):
        self.run.finish()


class _MLflow:
    def __init__(self, name: str, settings: dict):
        self.mlflow = import_module("mlflow")
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self.mlflow.set_experiment("mi-ray")
        earlier = self.mlflow.search_runs(filter_string=f"attributes.run_name = '{name}'", output_format="list")
        self.mlflow.start_run(run_id=earlier[0].info.run_id if earlier else None, run_name=name)
        self.mlflow.log_params(settings)

    def log(self, step: int, values: dict[str, float]):
        self.mlflow.log_metrics({f"finetune/{name}": value for name, value in values.items()}, step=step)

    def flush(self):
        pass  # every call of log_metrics sends its values at once

    def close(self):
        self.mlflow.end_run()


class TrainingLog:
    """The log of rank 0.

    `lines` has one entry for each finished step. It is stored in the checkpoint, so a run that continues from a
    checkpoint logs no step twice.

    Args:
        destination: URI of the adapter's folder; training.jsonl and tensorboard/ are written there.
        name: name of the run, the same when the run continues.
        settings: flat dictionary that the trackers show.
        lines: the lines in the checkpoint that the run continues from.
        refuse: called before each write; raises `lease.Lost` if another driver now trains in the same folder.
    """

    def __init__(
        self,
        destination: str,
        name: str,
        total_steps: int,
        log_to: tuple[str, ...],
        settings: dict,
        lines: list[dict],
        refuse: Callable[[], None],
    ):
        self.refuse = refuse
        self.uri, self.total_steps, self.lines = join(destination, "training.jsonl"), total_steps, list(lines)
        trackers = {
            "tensorboard": lambda: _TensorBoard(destination, len(lines) + 1),
            "wandb": lambda: _Wandb(name, settings),
            "mlflow": lambda: _MLflow(name, settings),
        }
        self.trackers = [trackers[tracker]() for tracker in log_to]
        self.began = self.shown = time.monotonic()
        self.first = len(lines)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object):
        if kind is not None and issubclass(kind, lease.Lost):
            return  # another driver now logs to the same files and trackers
        try:
            self.flush()
        finally:
            for tracker in self.trackers:
                tracker.close()

    def step(self, step: int, values: dict[str, float]):
        """Record optimiser step `step`, counted from 1: loss, grad_norm, learning_rate and others.

        A value that is not finite, such as a gradient norm that overflowed in fp16, is written as null.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.lines.append({"step": step, **dict.fromkeys(values), **finite})
        for tracker in self.trackers:
            tracker.log(step, finite)
        now = time.monotonic()
        if now - self.shown >= PROGRESS_SECONDS or step == self.total_steps:
            self.shown = now
            left = (self.total_steps - step) * (now - self.began) / (step - self.first)
            shown = [f"loss {values['loss']:.4f}", f"gradient norm {values['grad_norm']:.3f}"]
            shown += [f"reward {finite['reward']:.3f}"] if "reward" in finite else []
            print(f"fine-tuning {step}/{self.total_steps}: {', '.join(shown)}, {left:.0f} s left", flush=True)
            self.flush()

    def flush(self):
        self.refuse()
        write_bytes(self.uri, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        for tracker in self.trackers:
            tracker.flush()
