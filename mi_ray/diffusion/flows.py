"""The noise schedule of rectified flows: x_t = (1 - s) x0 + s epsilon, with s in [0, 1] (Liu et al. 2023, arXiv
2209.03003). The network predicts u = epsilon - x0.

A timestep is T times the time that the network is told, T = 1000. The time is s itself, except in CogView4, whose time
is s before the shift of the noise levels. log SNR = 2 log((1 - s) / s).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mi_ray.diffusion.schedules import FLOW, Levels, Steps

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True)
class FlowTimes:
    """How the pipeline of a family asks its scheduler for noise levels.

    sigmas: number of steps -> the levels before the shift (S,); None: the scheduler's own.
    mu: (scheduler config and is_distilled, tokens, number of steps) -> the strength of a shift by image size.
    tokens: latent shape (C, h, w) -> number of image tokens.
    unshifted: the network is told the time before the shift. `sigmas` are then whole timesteps over T.
    rounds: the network rounds the time to its own dtype.
    """

    sigmas: Callable[[int], np.ndarray] | None = None
    mu: Callable[[Mapping[str, Any], int, int], float] | None = None
    tokens: Callable[[tuple[int, ...]], int] = lambda shape: math.prod(shape[1:]) // 4
    unshifted: bool = False
    rounds: bool = False


def evenly(count: int) -> np.ndarray:
    """1, ..., 1 / S: the levels of most pipelines before the shift."""
    return np.linspace(1.0, 1 / count, count)


def linear_mu(config: Mapping[str, Any], tokens: int, steps: int) -> float:
    """A shift that grows linearly with the number of image tokens, as FLUX.1 has it (the reason for a shift by size:
    Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    start, end = config["base_shift"], config["max_shift"]
    return start + (end - start) * (tokens - low) / (high - low)


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """The noise levels of a flow model at one image size.

    Solvers visit the levels that the family's pipeline and the model's scheduler config give.
    """

    config: Mapping[str, Any]  # of the model's scheduler
    times: FlowTimes
    tokens: int  # image tokens
    is_distilled: bool = False  # as model_index.json says
    time_dtype: torch.dtype = torch.float32  # dtype in which the network takes the time
    prediction_type: str = FLOW
    num_train_timesteps: int = 1000

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], times: FlowTimes, latent_shape: tuple[int, ...], is_distilled: bool = False
    ) -> "FlowSchedule":
        """Read a diffusers scheduler config.

        Args:
            is_distilled: whether model_index.json says so.

        Raises:
            ValueError: a setting is not supported; one line for each such setting.
        """
        if faults := _faults(config):
            raise ValueError("\n".join(faults))
        try:
            scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        except TypeError as error:
            wrong = "a number of the schedule is missing or has another type"
            raise ValueError(f"{wrong} ({error}); fetch the file again") from error
        complete = {**scheduler.config, "_class_name": config["_class_name"]}  # with the defaults of missing keys
        count = complete["num_train_timesteps"]
        return cls(complete, times, times.tokens(latent_shape), is_distilled, num_train_timesteps=count)

    def rounded_to(self, dtype: torch.dtype) -> "FlowSchedule":
        """The schedule of a network of this dtype. Scores mix the noise at the level that the network is told."""
        return replace(self, time_dtype=dtype) if self.times.rounds else self

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(torch.arange(self.num_train_timesteps, dtype=torch.float64))
        return 1 - sigma, sigma

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The log SNRs of timesteps T - 1 and 1. Both ends of the flow have an infinite log SNR."""
        last = self.num_train_timesteps - 1
        noisiest, clearest = self.log_snr_at(torch.tensor([last, 1])).tolist()
        return noisiest, clearest

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(timesteps.float())
        return 1 - sigma, sigma

    def log_snr_at(self, timesteps: Tensor) -> Tensor:
        return 2 * torch.logit(1 - self._sigma(timesteps.double().cpu()))

    def levels_at(self, log_snr: Tensor) -> Levels:
        sigma, shift = torch.sigmoid(-log_snr.double() / 2), self._told_shift
        time = (sigma / (shift + (1 - shift) * sigma)).to(self.time_dtype).double()
        timesteps = self.num_train_timesteps * time
        sigma = self._sigma(timesteps)
        return Levels(*(values.to(log_snr.dtype) for values in (timesteps, 1 - sigma, sigma)))

    @property
    def training_timesteps(self) -> Tensor:
        """The timesteps (T,) long of the scheduler before it is asked for steps, from the noisiest, rounded."""
        if self.config["_class_name"] == "DPMSolverMultistepScheduler":
            return torch.arange(self.num_train_timesteps - 1, -1, -1)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        return scheduler.timesteps.round().long().clamp(0, self.num_train_timesteps - 1)

    def steps(self, count: int, spacing: str | None, extra: bool) -> Steps:
        if spacing is not None:
            raise ValueError(f"timestep_spacing is {spacing!r}, but a flow model has its own noise levels; set none")
        timesteps, sigmas = self._visited(count)
        sigma, following = sigmas.double()[:-1], sigmas.double()[1:]
        return Steps(timesteps, 1 - sigma, sigma, 1 - following, following)

    def _visited(self, count: int) -> tuple[Tensor, Tensor]:
        """Timesteps (S,) and levels (S + 1,) of the model's own scheduler, fp32."""
        if self.config["_class_name"] == "DPMSolverMultistepScheduler":
            scheduler = DPMSolverMultistepScheduler.from_config(self.config)
            scheduler.set_timesteps(count)
            return scheduler.timesteps.float(), scheduler.sigmas
        scheduler, times = FlowMatchEulerDiscreteScheduler.from_config(self.config), self.times
        sigmas = None if times.sigmas is None else times.sigmas(count)
        told = sigmas * self.num_train_timesteps if times.unshifted else None
        scheduler.set_timesteps(count, sigmas=sigmas, timesteps=told, mu=self._mu(count))
        return scheduler.timesteps, scheduler.sigmas

    def _mu(self, steps: int) -> float | None:
        if self.times.mu is None:
            return None
        return self.times.mu({**self.config, "is_distilled": self.is_distilled}, self.tokens, steps)

    @property
    def _told_shift(self) -> float:
        """m of s = m r / (1 + (m - 1) r), where r is the time that the network is told."""
        if not self.times.unshifted:
            return 1.0
        if self.config["use_dynamic_shifting"]:
            mu = self._mu(1)
            return mu if self.config["time_shift_type"] == "linear" else math.exp(mu)
        return self.config["shift"]

    def _sigma(self, timesteps: Tensor) -> Tensor:
        """s at timesteps of any shape, in their dtype."""
        time, shift = timesteps / self.num_train_timesteps, self._told_shift
        return time if shift == 1 else shift * time / (1 + (shift - 1) * time)


def _faults(config: Mapping[str, Any]) -> list[str]:
    """One error message for each setting that is not supported."""
    faults, name = [], config.get("_class_name")
    if name not in SCHEDULERS:
        return [f"_class_name {name!r} is not supported; use a flow model with one of {', '.join(SCHEDULERS)}"]
    if name == "DPMSolverMultistepScheduler":
        if not config.get("use_flow_sigmas") or config.get("prediction_type") != FLOW:
            faults.append(
                f"prediction_type {config.get('prediction_type')!r} with use_flow_sigmas"
                f" {config.get('use_flow_sigmas')} is not supported; use a flow model with {FLOW} and true"
            )
        if config.get("thresholding"):
            faults.append("thresholding true is not supported: latents have no fixed range; set it to false")
        if config.get("final_sigmas_type", "zero") != "zero":
            faults.append("final_sigmas_type other than zero is not supported; set it to zero")
    faults += [
        f"{key} true is not supported; set it to false"
        for key in ("invert_sigmas", "stochastic_sampling")
        if config.get(key)
    ]
    return faults
