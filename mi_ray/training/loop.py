"""Fine-tuning on Ray Train: one loop for every method, data-parallel and resumable.

A `Source` says what a step learns from: the kept candidates of a round, or the fresh candidates of an online update.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import pyarrow.fs as pafs
import ray.train
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mi_ray.config import RunConfig, without_revision
from mi_ray.config.section import ConfigError, flatten
from mi_ray.diffusion.adapters import (
    attach_adapter,
    load_adapter_state,
    save_adapter,
    target_faults,
)
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import load_network_on_meta
from mi_ray.inputs.online_plan import plan_of
from mi_ray.runs import lease
from mi_ray.runs.layout import SUMMARY
from mi_ray.scoring.machine import take_cpus
from mi_ray.storage import (
    exists,
    filesystem,
    join,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)
from mi_ray.training.log import TrainingLog, check_loggers
from mi_ray.training.losses import Batch, Objective, weights_of
from mi_ray.training.online import OnlineSource, RunAway
from mi_ray.training.optimization import Training, learning_rate_at, optimizer_step
from mi_ray.training.training_set import KeptCandidates, read_training_set, trained_timesteps

CHECKPOINTS = "checkpoints"  # in the folder of an adapter, while it is trained
CHANGED = 1e-6  # relative; what floating-point noise alone may move an output by
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray's tee prints every line twice
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


class Source(Protocol):
    """What the optimiser steps of a training learn from; every worker holds one and all do the same."""

    steps: int  # in all

    def open(self, step: int) -> bool:
        """Make the batches of a step ready. False: the training ends before it.

        Raises:
            RunAway: the policy can no longer be trusted.
        """

    def parts(self, step: int, rank: int, workers: int) -> list[tuple[Callable[[], Batch], float]]:
        """The microbatches of a worker, as `optimizer_step` takes them; none: there is nothing to learn."""

    def close(self, step: int) -> dict[str, float]:
        """What follows a step; returns figures for the log."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""

    def probe(self) -> Batch | None:
        """The first batch of the first step, at any time; None: there was none."""

    def state(self) -> dict:
        """What a checkpoint holds beside the training's own state."""

    def load(self, state: dict, lines: list[dict]):
        """Continue from a checkpoint with these lines of the log."""


# ---------------------------------------------------------------------------------------------- one worker
def _prepare(config: RunConfig, settings: dict, device: torch.device) -> tuple[Training, Objective, Source]:
    """The model under its starting adapter, and its data."""
    tuning = config.finetune
    # Half precision is for GPUs, under autocast; on a CPU it would be slow and coarse.
    dtype = config.model.dtype if device.type == "cuda" else "float32"
    denoiser = load_denoiser(settings["model"], dtype, str(device), size=config.model.size)
    denoiser.specialise(channels_last=config.model.channels_last, compiled=None, rows=())
    kept = None
    if settings["online"] is None:
        drawn = tuning.steps * tuning.gradient_accumulation * tuning.batch_size
        kept = read_training_set(settings["selected"], denoiser, config.seed, drawn)
    torch.manual_seed(config.seed)  # of the adapter's random A: the same on every worker and after a restart
    model = attach_adapter(
        denoiser.network,
        rank=tuning.rank,
        alpha=tuning.alpha,
        target_modules=tuning.target_modules,
        use_dora=tuning.adapter == "dora",
    )
    half = denoiser.network.dtype if denoiser.network.dtype != torch.float32 else None
    null = denoiser.encode_prompts([""]) if tuning.anchor_guidance > 1 else None
    objective = Objective(model, denoiser.schedule, tuning, half, null, denoiser.family.predict)
    if settings["previous_adapter"]:
        weights = read_bytes(join(settings["previous_adapter"], "adapter_model.safetensors"))
        load_adapter_state(model, load_safetensors(weights))
    objective.start = [p.detach().clone() for p in objective.parameters_trained]
    if settings["online"] is not None:
        objective.old = [p.detach().clone() for p in objective.parameters_trained]
    if tuning.activation_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    parameters = objective.parameters_trained
    optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    average = EMAModel(parameters, decay=tuning.ema_decay) if tuning.ema_decay and kept is not None else None
    training = Training(model, optimizer, scaler, average, objective.old)
    timesteps = trained_timesteps(2 * torch.log(objective.alpha / objective.sigma), tuning.log_snr_max)
    if kept is not None:
        return training, objective, KeptCandidates(kept, config, timesteps, device)
    online = settings["online"]
    plan = plan_of(config, online["prompts"])
    source = OnlineSource(config, plan, online["folder"], online["board"], denoiser, objective, timesteps)
    return training, objective, source


def _restore(training: Training, source: Source) -> list[dict]:
    """Continue from the run's last checkpoint, if there is one; returns the log's lines up to it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        source.load({}, [])
        return []
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
    training.load(state)
    source.load(state["source"], state["lines"])
    return state["lines"]


def train_loop(settings: dict) -> dict | None:
    """What each worker does; rank 0 returns the summary, or None if another driver has taken over the run: an error
    would have Ray Train start the workers again. Takes `loop_settings`.

    Runs in the calling process under `ScalingConfig(num_workers=0)`.
    """
    config = RunConfig.model_validate(settings["config"])
    tuning, context, device = config.finetune, ray.train.get_context(), get_device()
    rank, workers = context.get_world_rank(), context.get_world_size()
    lost = torch.tensor(float(lease.superseded(settings["run_dir"], settings["token"])), device=device)
    if workers > 1:  # one that goes on would wait for those that do not
        dist.all_reduce(lost, dist.ReduceOp.MAX)
    if lost:
        return None
    refuse = partial(lease.refuse_if_superseded, settings["run_dir"], settings["token"], "the training's state")
    cores = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    take_cpus(min(config.resources.train_cpus or cores, cores))
    began = time.monotonic()

    training, objective, source = _prepare(config, settings, device)
    parameters = objective.parameters_trained
    save = partial(_upload_adapter, objective, without_revision(config.model.path))
    if rank == 0 and settings["online"] is not None:
        source.save = save
    lines = _restore(training, source)
    parallel = prepare_model(objective)
    log, notice, stopped = nullcontext(), None, None
    if rank == 0:
        shown = flatten(config.results_config())
        log = TrainingLog(settings["destination"], settings["run"], source.steps, tuning.log_to, shown, lines, refuse)
    with log:
        for step in range(len(lines), source.steps):
            try:
                if not source.open(step):
                    stopped = "the candidates have ended"
                    break
            except RunAway as reason:
                stopped = str(reason)
                break
            rate = learning_rate_at(step, tuning, source.steps)
            for group in training.optimizer.param_groups:
                group["lr"] = rate
            parts = source.parts(step, rank, workers)
            mean_loss = norm = math.nan
            if parts:
                arguments = parameters, training.optimizer, training.scaler, tuning.max_grad_norm
                loss, norm = optimizer_step(parallel, parts, *arguments)
                if workers > 1:
                    dist.all_reduce(loss)
                mean_loss, norm = loss.item() / workers, norm.item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} at step {step + 1}: lower finetune.learning_rate"
                    )
            if training.average:
                training.average.step(parameters)
            figures = (objective.figures if parts else {}) | source.close(step)
            if rank == 0:
                log.step(step + 1, {"loss": mean_loss, "grad_norm": norm, "learning_rate": rate, **figures})
            earlier, notice = notice, ray.train.get_preemption_info()  # of a node that will go: the same on every rank
            # Reporting takes about two seconds of Ray's time and halts every worker: at checkpoints only.
            if (source.due(step) or notice != earlier) and step + 1 < source.steps:
                refuse()
                _report(training, source, log.lines if rank == 0 else None)
    if rank != 0:
        return None
    if training.average:
        training.average.copy_to(parameters)
    final = training.old or [p.data for p in parameters]
    change = _output_change(objective, source.probe(), final)
    if change <= CHANGED:
        advice = "raise finetune.learning_rate"
        print(f"warning: fine-tuning changed no output of the model (by {change:.1e}); {advice}", flush=True)
    refuse()
    if settings["online"] is None:
        save(settings["destination"], None)
    return {
        "steps": len(log.lines),
        "trainable_parameters": sum(p.numel() for p in parameters),
        "outputs_changed": change > CHANGED,
        "output_change": change if math.isfinite(change) else None,
        "seconds": time.monotonic() - began,
        "stopped": stopped,
    }


@torch.no_grad()
def _output_change(objective: Objective, probe: Batch | None, final: list[Tensor]) -> float:
    """Relative L2 distance of the predictions before and after the training, on one batch; NaN without a batch."""
    if probe is None:
        return math.nan
    outputs = []
    for values in (objective.start, final):
        with weights_of(values, objective.parameters_trained):
            outputs.append(objective.predict(probe))
    before, after = outputs
    return float((after - before).norm() / before.norm())


def _report(training: Training, source: Source, lines: list[dict] | None):
    """Checkpoint; every worker calls it, the one with the log's lines uploads."""
    if lines is None:
        return ray.train.report({})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state() | {"source": source.state(), "lines": lines}, Path(folder) / "state.pt")
        ray.train.report(lines[-1], checkpoint=Checkpoint.from_directory(folder))


def _upload_adapter(objective: Objective, base_model: str, destination: str, values: list[Tensor] | None):
    """Write the adapter with these values of its parameters; None: with its own."""
    parameters = objective.parameters_trained
    with tempfile.TemporaryDirectory() as folder:
        with weights_of(values or [p.data for p in parameters], parameters):
            save_adapter(objective.model, Path(folder), base_model)
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(destination, file.name), file.read_bytes())


# ---------------------------------------------------------------------------------------------- the stage
def check_targets(config: RunConfig):
    """Check that each of `finetune.target_modules` binds to a layer; reads the network's configuration, no weights.

    Raises:
        ConfigError: with a message for each that binds to nothing.
    """
    if faults := target_faults(load_network_on_meta(config.model.path), config.finetune.target_modules):
        raise ConfigError([f"finetune.target_modules: {fault}" for fault in faults])


def loop_settings(
    config: RunConfig,
    selected: str | None,
    destination: str,
    previous_adapter: str | None,
    name: str,
    online: dict | None = None,
) -> dict:
    """What `train_loop` takes, and the name that a rerun finds again."""
    sections = {"seed", "model", "finetune"} | (
        {"online", "sampler", "score", "generate", "select"} if online else set()
    )
    inputs = {
        "config": config.model_dump(mode="json", include=sections),
        "selected": selected,
        "previous_adapter": previous_adapter,
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    return {
        **inputs,
        "config": config.model_dump(mode="json"),
        "model": config.model.path,
        "destination": destination,
        "run": f"{name}-{key}",
        "run_dir": config.run_dir,
        "token": lease.current_token(config.run_dir),
        "online": online,
    }


def finetune(config: RunConfig, selected: str, destination: str, previous_adapter: str | None, name: str) -> dict:
    """Fine-tune an adapter on the selected candidates; Ray must be initialised.

    Called again, it continues at the step and the data of the last checkpoint, or returns at once if it had ended.

    Args:
        selected: URI of a table of schema `tables.SELECTED`.
        destination: URI of the adapter's folder. It holds adapter_config.json, adapter_model.safetensors (PEFT),
            pytorch_lora_weights.safetensors (diffusers), training.jsonl, tensorboard/ and summary.json in the end,
            checkpoints/ until then: on several nodes it must be shared or on an object store.
        previous_adapter: URI of the folder of an adapter to start from (an earlier round's).
        name: of the training run, for Ray and the trackers.

    Returns:
        The content of summary.json: steps, trainable_parameters, outputs_changed, output_change (relative L2
        distance of the model's predictions before and after, on a fixed batch) and seconds (since the last start).

    Raises:
        ConfigError: a target binds to nothing, a tracker is not installed.
        lease.Lost: another driver has taken over the run.
        ray.train.TrainingFailedError: more than `finetune.max_failures` failures.
    """
    summary = join(destination, SUMMARY)
    if not exists(summary):
        write_json(summary, train(config, loop_settings(config, selected, destination, previous_adapter, name)))
    remove_checkpoints(destination)
    return read_json(summary)


def train(config: RunConfig, settings: dict) -> dict:
    """Run `train_loop` on the workers of the run; returns its summary.

    Raises:
        ConfigError, lease.Lost, ray.train.TrainingFailedError: as `finetune`.
    """
    check_loggers(config.finetune.log_to)
    check_targets(config)
    resources = config.resources
    system, storage_path = filesystem(join(settings["destination"], CHECKPOINTS))
    least, most = resources.train_workers
    result = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=resources.train_gpus > 0,
            # Ray places no worker that asks for nothing: one without CPUs of its own asks for a byte of memory.
            resources_per_worker=({"CPU": resources.train_cpus} if resources.train_cpus else {"memory": 1})
            | ({"GPU": resources.train_gpus} if resources.train_gpus else {}),
        ),
        run_config=RayRunConfig(
            name=settings["run"],
            storage_path=storage_path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=config.finetune.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": _QUIET},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    ).fit()
    # Also where the workers have ended because of it, and there is no summary.
    lease.refuse_if_superseded(settings["run_dir"], settings["token"], join(settings["destination"], SUMMARY))
    return result.return_value


def remove_checkpoints(destination: str):
    """Remove the checkpoints of a training that has ended."""
    system, path = filesystem(join(destination, CHECKPOINTS))
    if system.get_file_info(path).type != pafs.FileType.NotFound:
        with suppress(FileNotFoundError):  # of GCS, at the end, for a folder that is only in the names of its files
            system.delete_dir(path)
