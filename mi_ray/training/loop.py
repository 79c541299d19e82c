"""Fine-tuning on Ray Train: one loop for every method, data-parallel and resumable.

A `Source` provides the data of a step: the kept candidates of a round, or the new candidates of an online update.
"""

import hashlib
import json
import math
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
from torch import Tensor

from mi_ray.config import RunConfig, folder_name, without_revision
from mi_ray.config.section import ConfigError, flatten
from mi_ray.diffusion.adapter_files import save_adapter
from mi_ray.diffusion.adapters import attach_adapter, attach_saved, target_faults
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import load_network_on_meta
from mi_ray.inputs.online_plan import plan_of
from mi_ray.runs import lease
from mi_ray.runs.layout import SUMMARY
from mi_ray.scoring.machine import take_cpus, usable_cores
from mi_ray.storage import (
    exists,
    filesystem,
    join,
    local_folder,
    read_json,
    write_bytes,
    write_json,
)
from mi_ray.training.log import TrainingLog, check_loggers
from mi_ray.training.losses import Batch, Objective, weights_of
from mi_ray.training.online import OnlineSource, RunAway
from mi_ray.training.optimization import Training, learning_rate_at, optimizer_step
from mi_ray.training.sharding import shard
from mi_ray.training.start import check_start
from mi_ray.training.training_set import KeptCandidates, read_training_set, trained_timesteps, weighted_levels

CHECKPOINTS = "checkpoints"  # folder in an adapter's folder, during the training
CHANGED = 1e-6  # relative change of an output that floating-point rounding can cause
_ENVIRONMENT = {  # of a worker process
    "OMP_WAIT_POLICY": "passive",  # otherwise threads that wait for each other keep cores busy that others need
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise Ray prints every line twice
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


class Source(Protocol):
    """The data of all optimiser steps. Every worker has one, and all are in the same state."""

    steps: int  # total number of optimiser steps

    def open(self, step: int) -> bool:
        """Prepare the batches of a step. False: the training ends before this step.

        Raises:
            RunAway: the policy has changed too much.
        """

    def parts(self, step: int, rank: int, workers: int) -> list[tuple[Callable[[], Batch], float]]:
        """The microbatches of a worker, see `optimizer_step`. Empty: there is no data for this step."""

    def close(self, step: int) -> dict[str, float]:
        """Finish a step. Returns values for the log."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""

    def probe(self) -> Batch | None:
        """The first batch of the first step. It can be called at any time. None: there was no batch."""

    def state(self) -> dict:
        """The state of the source in a checkpoint."""

    def load(self, state: dict, lines: list[dict]):
        """Continue from a checkpoint: its state, and the lines of the log so far."""


# ---------------------------------------------------------------------------------------------- one worker
def prepare(config: RunConfig, settings: dict, device: torch.device) -> tuple[Training, Objective, Source]:
    """The model with its initial adapter, and the data."""
    tuning = config.finetune
    # Half precision is used with autocast. On a CPU float16 would be slow and inaccurate.
    dtype = "float32" if device.type == "cpu" and config.model.dtype == "float16" else config.model.dtype
    extra = {"quantize": config.model.quantize, "placed": tuning.shard is None}
    denoiser = load_denoiser(settings["model"], dtype, str(device), size=config.model.size, **extra)
    denoiser.specialise(channels_last=config.model.channels_last, compiled=None, rows=())
    kept = None
    if settings["online"] is None:
        drawn = tuning.steps * tuning.gradient_accumulation * tuning.batch_size
        kept = read_training_set(settings["selected"], denoiser, config.seed, drawn)
    if settings["previous_adapter"]:
        model = attach_saved(denoiser.network, local_folder(settings["previous_adapter"]))
    else:
        torch.manual_seed(config.seed)  # the random matrix A must be the same on all workers and after a restart
        model = attach_adapter(denoiser.network, **tuning.adapter_settings)
    denoiser.make_room()  # prompts of kept candidates are encoded; an update encodes a few
    if tuning.shard:
        model = shard(model, device)
    half = denoiser.network.dtype if denoiser.network.dtype != torch.float32 else None
    null = denoiser.encode_prompts([""]) if tuning.anchor_guidance > 1 or config.sampler.branches > 1 else None
    objective = Objective(model, denoiser.schedule, tuning, half, null, denoiser.family.predict)
    objective.start = [p.detach().clone() for p in objective.parameters_trained]
    if settings["online"] is not None:
        objective.old = [p.detach().clone() for p in objective.parameters_trained]
    if tuning.activation_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    parameters = objective.parameters_trained
    optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    average = EMAModel(parameters, decay=tuning.ema_decay) if tuning.ema_decay else None
    training = Training(model, optimizer, scaler, average, objective.old)
    timesteps = trained_timesteps(2 * torch.log(objective.alpha / objective.sigma), tuning.log_snr_max)
    if kept is not None:
        levels = weighted_levels(denoiser.schedule, timesteps, tuning.timestep_density)
        return training, objective, KeptCandidates(kept, config, timesteps, device, levels)
    online = settings["online"]
    plan = plan_of(config, online["prompts"])
    places = online["folder"], online["board"]
    source = OnlineSource(config, plan, *places, denoiser, objective, timesteps, average)
    return training, objective, source


def _restore(training: Training, source: Source) -> list[dict]:
    """Continue from the last checkpoint, if there is one. Returns the lines of the log up to it."""
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
    """The training in each worker. With `ScalingConfig(num_workers=0)` it runs in the calling process.

    Args:
        settings: see `loop_settings`.

    Returns:
        On rank 0 the summary. None on other ranks, or if another driver has taken over the run: an error would make Ray
        Train restart the workers.
    """
    config = RunConfig.model_validate(settings["config"])
    tuning, context, device = config.finetune, ray.train.get_context(), get_device()
    rank, workers = context.get_world_rank(), context.get_world_size()
    lost = torch.tensor(float(lease.superseded(settings["run_dir"], settings["token"])), device=device)
    if workers > 1:  # all workers must decide alike, otherwise some would wait for the others
        dist.all_reduce(lost, dist.ReduceOp.MAX)
    if lost:
        return None
    refuse = partial(lease.refuse_if_superseded, settings["run_dir"], settings["token"], "the training's state")
    cores = max(1, usable_cores() // context.get_local_world_size())
    take_cpus(min(config.resources.train_cpus or cores, cores))
    began = time.monotonic()

    training, objective, source = prepare(config, settings, device)
    parameters = objective.parameters_trained
    save = partial(_upload_adapter, objective, without_revision(config.model.path))
    if rank == 0 and settings["online"] is not None:
        source.save = save
    lines = _restore(training, source)
    sharded = bool(tuning.shard) and workers > 1
    parallel = objective if tuning.shard else prepare_model(objective)
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
                loss, norm = optimizer_step(parallel, parts, *arguments, sharded=sharded)
                if workers > 1:
                    dist.all_reduce(loss)
                mean_loss, norm = loss.item() / workers, norm.item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} at step {step + 1}: lower finetune.learning_rate"
                    )
            if training.average and settings["online"] is None:
                training.average.step(parameters)
            figures = (objective.figures if parts else {}) | source.close(step)
            if rank == 0:
                log.step(step + 1, {"loss": mean_loss, "grad_norm": norm, "learning_rate": rate, **figures})
            earlier, notice = notice, ray.train.get_preemption_info()  # of a node that will go: the same on every rank
            # Reporting stops all workers for about two seconds, so it is done only at checkpoints.
            if (source.due(step) or notice != earlier) and step + 1 < source.steps:
                refuse()
                _report(training, source, log.lines if rank == 0 else None)
    if rank != 0 and not sharded:
        return None
    if training.average:
        training.average.copy_to(parameters)
    final = training.old if training.old and not training.average else [p.data for p in parameters]
    change = _output_change(objective, source.probe(), final)  # with shards all workers predict together
    if rank != 0:
        return None
    if all(line["loss"] is None for line in log.lines):
        print("warning: nothing was trained: no prompt has candidates with different rewards", flush=True)
    elif change <= CHANGED:
        advice = "raise finetune.learning_rate"
        print(f"warning: fine-tuning did not change the model's outputs ({change:.1e}); {advice}", flush=True)
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
    """Relative L2 distance between the predictions before and after the training, on one batch. NaN without a batch."""
    if probe is None:
        return math.nan
    outputs = []
    for values in (objective.start, final):
        with weights_of(values, objective.parameters_trained):
            outputs.append(objective.predict(probe))
    before, after = outputs
    return float((after - before).norm() / before.norm())


def _report(training: Training, source: Source, lines: list[dict] | None):
    """Write a checkpoint. All workers call this; the one with the lines of the log uploads."""
    if lines is None:
        return ray.train.report({})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state() | {"source": source.state(), "lines": lines}, Path(folder) / "state.pt")
        ray.train.report(lines[-1], checkpoint=Checkpoint.from_directory(folder))


def _upload_adapter(objective: Objective, base_model: str, destination: str, values: list[Tensor] | None):
    """Write the adapter with these values of its parameters; None: with its current values."""
    parameters = objective.parameters_trained
    with tempfile.TemporaryDirectory() as folder:
        with weights_of(values or [p.data for p in parameters], parameters):
            save_adapter(objective.model, Path(folder), base_model)
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(destination, file.name), file.read_bytes())


# ---------------------------------------------------------------------------------------------- the stage
def check_targets(config: RunConfig):
    """Check that each of `finetune.target_modules` binds to a layer, or that `finetune.start_from` is an adapter of the
    model; reads the network's configuration, no weights.

    Raises:
        ConfigError: with one message for each target without a matching layer, or for the adapter.
    """
    if config.finetune.start_from:
        return check_start(config)
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
    """The settings of `train_loop`. The name `run` is the same when the training is continued."""
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
        "run": f"{folder_name(name)}-{key}",
        "run_dir": config.run_dir,
        "token": lease.current_token(config.run_dir),
        "online": online,
    }


def finetune(config: RunConfig, selected: str, destination: str, previous_adapter: str | None, name: str) -> dict:
    """Fine-tune an adapter on the selected candidates. Ray must be initialised.

    A second call continues from the last checkpoint, or returns at once if the training has ended.

    Args:
        selected: URI of a table of schema `tables.SELECTED`.
        destination: URI of the adapter's folder. In the end it contains adapter_config.json, adapter_model.safetensors
            (PEFT), pytorch_lora_weights.safetensors (diffusers), comfyui.safetensors, training.jsonl, tensorboard/ and
            summary.json; before that also checkpoints/. With several nodes it must be on a shared disk or an object
            store.
        previous_adapter: URI of the folder of the adapter to start from: of an earlier round, or of the user.
        name: name of the training run in Ray and in the trackers.

    Returns:
        The content of summary.json: steps, trainable_parameters, outputs_changed, output_change (relative L2
        distance of the model's predictions before and after, on a fixed batch) and seconds (since the last start).

    Raises:
        ConfigError: a target has no matching layer, or a tracker is not installed.
        lease.Lost: another driver has taken over the run.
        ray.train.TrainingFailedError: more than `finetune.max_failures` failures.
    """
    summary = join(destination, SUMMARY)
    if not exists(summary):
        write_json(summary, train(config, loop_settings(config, selected, destination, previous_adapter, name)))
    remove_checkpoints(destination)
    return read_json(summary)


def train(config: RunConfig, settings: dict) -> dict:
    """Run `train_loop` on the workers of the run. Returns its summary.

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
            # Ray does not start a worker that requests no resources. A worker without CPUs requests a byte of memory.
            resources_per_worker=({"CPU": resources.train_cpus} if resources.train_cpus else {"memory": 1})
            | ({"GPU": resources.train_gpus} if resources.train_gpus else {}),
        ),
        run_config=RayRunConfig(
            name=settings["run"],
            storage_path=storage_path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=config.finetune.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": _ENVIRONMENT},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    ).fit()
    # Raise this error also if the workers have ended for this reason without a summary.
    lease.refuse_if_superseded(settings["run_dir"], settings["token"], join(settings["destination"], SUMMARY))
    return result.return_value


def remove_checkpoints(destination: str):
    """Remove the checkpoints of a training that has ended."""
    system, path = filesystem(join(destination, CHECKPOINTS))
    if system.get_file_info(path).type != pafs.FileType.NotFound:
        with suppress(FileNotFoundError):  # GCS raises it after the last file, because folders do not exist there
            system.delete_dir(path)
