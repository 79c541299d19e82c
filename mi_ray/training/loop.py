"""Fine-tuning on Ray Train: an adapter learns the kept (latents, prompt) pairs, data-parallel and resumable."""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs
import ray.train
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import PeftModel
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from safetensors.torch import load as load_safetensors
from torch import Tensor

from mi_ray.config import FinetuneConfig, RunConfig, without_revision
from mi_ray.config.section import ConfigError, flatten
from mi_ray.diffusion.adapters import (
    adapter_state,
    attach_adapter,
    load_adapter_state,
    save_adapter,
    save_weighted_sum,
    target_faults,
)
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.folders import part_config, resolve_model
from mi_ray.runs import lease
from mi_ray.runs.layout import SUMMARY
from mi_ray.scoring.machine import take_cpus
from mi_ray.storage import (
    exists,
    filesystem,
    join,
    local_folder,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)
from mi_ray.training.log import TrainingLog, check_loggers
from mi_ray.training.losses import DenoisingLoss
from mi_ray.training.training_set import TrainingSet, draw_microbatch, read_training_set, trained_timesteps

CHANGED = 1e-6  # relative; what floating-point noise alone may move an output by
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray's tee prints every line twice
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def learning_rate_at(step: int, config: FinetuneConfig) -> float:
    """Of the step-th step, from 0: linear warm-up, then as `lr_schedule` says."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------- training
def optimizer_step(
    objective: torch.nn.Module,
    microbatches: list[Callable[[], tuple[Tensor, ...]]],
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    share: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step over accumulated microbatches; workers exchange gradients once, at the last.

    Args:
        share: weight of each microbatch in this worker's loss; None: their mean is taken. Workers with unequal numbers
            of microbatches all take workers / microbatches of the step, so that the mean over them is the step's.

    Returns:
        This worker's loss, and the norm of the gradient before it was clipped to `max_grad_norm`.
    """
    share = share or 1 / len(microbatches)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parameters[0].device)
    for number, draw in enumerate(microbatches, 1):
        hold = isinstance(objective, torch.nn.parallel.DistributedDataParallel) and number < len(microbatches)
        with objective.no_sync() if hold else nullcontext():
            loss = objective(*draw()) * share
            scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return total, norm


def _prepare(config: RunConfig, settings: dict, device: torch.device) -> tuple[DenoisingLoss, TrainingSet]:
    """The model under its starting adapter and its data; the text encoder and the VAE are let go."""
    tuning = config.finetune
    # Half precision is for GPUs, under autocast; on a CPU it would be slow and coarse.
    dtype = config.model.dtype if device.type == "cuda" else "float32"
    denoiser = load_denoiser(settings["model"], dtype, str(device), size=config.model.size)
    denoiser.specialise(channels_last=config.model.channels_last, compiled=None, rows=())
    drawn = tuning.steps * tuning.gradient_accumulation * tuning.batch_size
    data = read_training_set(settings["selected"], denoiser, config.seed, drawn)
    torch.manual_seed(config.seed)  # of the adapter's random A: the same on every worker and after a restart
    model = attach_adapter(
        denoiser.unet,
        rank=tuning.rank,
        alpha=tuning.alpha,
        target_modules=tuning.target_modules,
        use_dora=tuning.adapter == "dora",
    )
    if settings["previous_adapter"]:
        weights = read_bytes(join(settings["previous_adapter"], "adapter_model.safetensors"))
        load_adapter_state(model, load_safetensors(weights))
    if tuning.activation_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    half = denoiser.unet.dtype if denoiser.unet.dtype != torch.float32 else None
    return DenoisingLoss(model, denoiser.schedule, tuning.min_snr_gamma, half), data


@dataclass
class _Training:
    """What a checkpoint holds: the adapter, the average of its weights if there is one, and the optimiser's state."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: EMAModel | None

    def state(self) -> dict:
        state = {"adapter": adapter_state(self.model), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict()}
        return state | ({"average": self.average.state_dict()} if self.average else {})

    def load(self, state: dict):
        load_adapter_state(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])


def _restore(training: _Training) -> list[dict]:
    """Continue from the run's last checkpoint, if there is one; returns the log's lines up to it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
    training.load(state)
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
    take_cpus(min(config.resources.train_cpus, cores))
    began = time.monotonic()

    objective, data = _prepare(config, settings, device)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=tuning.learning_rate, weight_decay=tuning.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=objective.autocast_dtype == torch.float16)
    average = EMAModel(parameters, decay=tuning.ema_decay) if tuning.ema_decay else None
    training = _Training(objective.model, optimizer, scaler, average)
    timesteps = trained_timesteps(2 * torch.log(objective.alpha / objective.sigma), tuning.log_snr_max)

    def draw(microbatch: int) -> tuple[Tensor, ...]:
        batch = draw_microbatch(data, config.seed, microbatch, tuning.batch_size, timesteps, tuning.prompt_dropout)
        return tuple(part.to(device) for part in batch)

    probe = draw(0)[:4]
    with torch.no_grad():
        before = objective.predict(*probe)
    lines = _restore(training)
    parallel = prepare_model(objective)

    log, notice = nullcontext(), None
    if rank == 0:
        shown = flatten(config.results_config())
        log = TrainingLog(settings["destination"], settings["run"], tuning.steps, tuning.log_to, shown, lines, refuse)
    with log:
        for step in range(len(lines), tuning.steps):
            rate = learning_rate_at(step, tuning)
            for group in optimizer.param_groups:
                group["lr"] = rate
            first = step * tuning.gradient_accumulation
            turns = range(first + rank, first + tuning.gradient_accumulation, workers)
            loss, norm = optimizer_step(
                parallel,
                [lambda turn=turn: draw(turn) for turn in turns],
                parameters,
                optimizer,
                scaler,
                tuning.max_grad_norm,
                workers / tuning.gradient_accumulation,
            )
            if average:
                average.step(parameters)
            if workers > 1:
                dist.all_reduce(loss)
            mean_loss = loss.item() / workers
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {mean_loss} at step {step + 1}: lower finetune.learning_rate")
            if rank == 0:
                log.step(step + 1, mean_loss, norm.item(), rate)
            earlier, notice = notice, ray.train.get_preemption_info()  # of a node that will go: the same on every rank
            due = (step + 1) % tuning.checkpoint_every == 0 or notice != earlier
            # Reporting takes about two seconds of Ray's time and halts every worker: at checkpoints only.
            if due and step + 1 < tuning.steps:
                refuse()
                _report(training, log.lines if rank == 0 else None)
    if rank != 0:
        return None
    if average:
        average.copy_to(parameters)
    with torch.no_grad():
        after = objective.predict(*probe)
    change = float((after - before).norm() / before.norm())
    if change <= CHANGED:
        print(
            f"warning: fine-tuning changed no output of the model (by {change:.1e}); raise finetune.learning_rate",
            flush=True,
        )
    refuse()
    _upload_adapter(objective.model, without_revision(config.model.path), settings["destination"])
    return {
        "steps": tuning.steps,
        "trainable_parameters": sum(p.numel() for p in parameters),
        "outputs_changed": change > CHANGED,
        "output_change": change,
        "seconds": time.monotonic() - began,
    }


def _report(training: _Training, lines: list[dict] | None):
    """Checkpoint; every worker calls it, the one with the log's lines uploads."""
    if lines is None:
        return ray.train.report({})
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state() | {"lines": lines}, Path(folder) / "state.pt")
        ray.train.report(lines[-1], checkpoint=Checkpoint.from_directory(folder))


def _upload_adapter(model: PeftModel, base_model: str, destination: str):
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder), base_model)
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(destination, file.name), file.read_bytes())


# ---------------------------------------------------------------------------------------------- the stage
def check_targets(config: RunConfig):
    """Check that each of `finetune.target_modules` binds to a layer; reads the UNet's configuration, not its weights.

    Raises:
        ConfigError: with a message for each that binds to nothing.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(part_config(config.model.path, "unet"))
    if faults := target_faults(unet, config.finetune.target_modules):
        raise ConfigError([f"finetune.target_modules: {fault}" for fault in faults])


def _absolute(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).absolute())


def loop_settings(config: RunConfig, selected: str, destination: str, previous_adapter: str | None, name: str) -> dict:
    """What `train_loop` takes: paths made absolute, for they run elsewhere, and the name that a rerun finds again."""
    model = str(resolve_model(config.model.path))
    inputs = {
        "config": config.model_dump(mode="json", include={"seed", "model", "finetune"}),
        "selected": _absolute(selected),
        "previous_adapter": previous_adapter and _absolute(previous_adapter),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    return {
        **inputs,
        "config": config.model_dump(mode="json"),
        "model": _absolute(model) if Path(model).is_dir() else model,
        "destination": _absolute(destination),
        "run": f"{name}-{key}",
        "run_dir": _absolute(config.run_dir),
        "token": lease.current_token(config.run_dir),
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
    summary, checkpoints = join(destination, SUMMARY), _absolute(join(destination, "checkpoints"))
    system, storage_path = filesystem(checkpoints)
    if not exists(summary):
        check_loggers(config.finetune.log_to)
        check_targets(config)
        settings, resources = loop_settings(config, selected, destination, previous_adapter, name), config.resources
        least, most = resources.train_workers
        result = TorchTrainer(
            train_loop,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=least if least == most else (least, most),
                use_gpu=resources.train_gpus > 0,
                resources_per_worker={"CPU": resources.train_cpus}
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
        lease.refuse_if_superseded(settings["run_dir"], settings["token"], summary)
        write_json(summary, result.return_value)
    if system.get_file_info(storage_path).type != pafs.FileType.NotFound:
        with suppress(FileNotFoundError):  # of GCS, at the end, for a folder that is only in the names of its files
            system.delete_dir(storage_path)
    return read_json(summary)


def take_off_baseline(config: RunConfig, adapter: str, baseline: str, start: str | None, destination: str):
    """Write the adapter less `finetune.baseline` of what the baseline learnt: adapter - share (baseline - start).

    Learning from one's own images moves a model whatever is chosen among them. An adapter that learnt from a random
    selection of the same pool has made that move and no other, so what is left is due to the choice: the baseline of a
    policy gradient (Williams 1992, section 4), as task arithmetic.

    Args:
        adapter, baseline: URIs of two adapters' folders that started from the same one.
        start: URI of that one's folder; None: from none.
        destination: URI of the folder to write, like an adapter's, without its log.
    """
    if exists(join(destination, SUMMARY)):
        return
    share = config.finetune.baseline
    terms = [(1.0, adapter), (-share, baseline), *([(share, start)] if start else [])]
    with tempfile.TemporaryDirectory() as folder:
        save_weighted_sum([(weight, Path(local_folder(uri))) for weight, uri in terms], Path(folder))
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(destination, file.name), file.read_bytes())
    write_json(join(destination, SUMMARY), read_json(join(adapter, SUMMARY)) | {"baseline": share})
