"""One optimiser step, its learning rate, and the training state that a checkpoint holds."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch import Tensor

from mi_ray.config import FinetuneConfig
from mi_ray.diffusion.adapters import adapter_state, load_adapter_state
from mi_ray.training.losses import Batch
from mi_ray.training.sharding import average_gradients


def learning_rate_at(step: int, config: FinetuneConfig, steps: int) -> float:
    """The learning rate of step number `step` (from 0) of `steps`: linear warm-up, then `lr_schedule`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_step(
    objective: torch.nn.Module,
    microbatches: Sequence[tuple[Callable[[], Batch], float]],
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    sharded: bool = False,
) -> tuple[Tensor, Tensor]:
    """One optimiser step over accumulated microbatches. Workers exchange gradients once, at the last microbatch.

    Args:
        microbatches: for each microbatch, a function that draws it, and its weight in this worker's loss. With these
            weights the mean of the workers' losses is the loss of the step, even if workers have different numbers of
            rows.
        sharded: the frozen weights are divided among several workers (`training.sharding`).

    Returns:
        This worker's loss, and the gradient norm before clipping to `max_grad_norm`.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=parameters[0].device)
    for number, (draw, share) in enumerate(microbatches, 1):
        hold = isinstance(objective, torch.nn.parallel.DistributedDataParallel) and number < len(microbatches)
        with objective.no_sync() if hold else nullcontext():
            loss = objective(draw()) * share
            scaler.scale(loss).backward()
        total += loss.detach()
    if sharded:
        average_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return total, norm


@dataclass
class Training:
    """The state that a checkpoint holds: adapter, optimiser, gradient scaler, and averaged weights if there are any."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: EMAModel | None  # moving average of the weights with `finetune.ema_decay`
    old: list[Tensor]  # weights of the old policy in an online run; empty otherwise

    def state(self) -> dict:
        state = {"adapter": adapter_state(self.model), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "old": [values.cpu() for values in self.old]}
        return state | ({"average": self.average.state_dict()} if self.average else {})

    def load(self, state: dict):
        load_adapter_state(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])  # it keeps the device of the state
            self.average.to(self.optimizer.param_groups[0]["params"][0].device)
        for values, stored in zip(self.old, state["old"], strict=True):
            values.copy_(stored)
