"""Noise schedules, and conversions between prediction types.

x_t = alpha * x0 + sigma * epsilon. In variance-preserving diffusion alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t)
(Ho et al. 2020, arXiv 2006.11239, eq. 4); in a rectified flow alpha = 1 - s, sigma = s (`flows`). alpha and sigma below
are tensors that broadcast against x_t.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of variance-preserving models
FLOW = "flow_prediction"  # the prediction type of a rectified flow: u = epsilon - x0
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# The diffusers schedulers for variance-preserving models with discrete timesteps. Their configs describe a model in the
# same way.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
_ZERO_SNR = -80.0  # log SNR of a timestep without signal: alpha is 4e-18
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # their default of clip_sample is true


# ---------------------------------------------------------------------------------------------- conversions
def x0_from_epsilon(epsilon: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that `epsilon` implies (Ho et al. 2020, eq. 15)."""
    return (x_t - sigma * epsilon) / alpha


def epsilon_from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that `x0` implies; inverse of `x0_from_epsilon`."""
    return (x_t - alpha * x0) / sigma


def velocity(x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha * epsilon - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
    return alpha * epsilon - sigma * x0


def epsilon_from_velocity(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """epsilon = alpha * v + sigma * x_t (Salimans & Ho 2022, appendix D), since alpha^2 + sigma^2 = 1."""
    return alpha * v + sigma * x_t


def epsilon_from_flow(u: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that u = epsilon - x0 of a rectified flow implies (Liu et al. 2023, arXiv 2209.03003).

    On the axis of log SNR: the flow's own z = (1 - t) x0 + t epsilon is x_t / (alpha + sigma) at t = sigma / (alpha +
    sigma), and epsilon = z + (1 - t) u.
    """
    return (x_t + alpha * u) / (alpha + sigma)


def epsilon_from(prediction_type: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a model's prediction implies.

    Raises:
        ValueError: the prediction type is not epsilon, v_prediction, sample or flow_prediction.
    """
    match prediction_type:
        case "epsilon":
            return prediction
        case "v_prediction":
            return epsilon_from_velocity(prediction, x_t, alpha, sigma)
        case "sample":
            return epsilon_from_x0(prediction, x_t, alpha, sigma)
        case "flow_prediction":
            return epsilon_from_flow(prediction, x_t, alpha, sigma)
    raise ValueError(_unknown_type(prediction_type))


def prediction_from(prediction_type: str, x0: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The target of a model of this prediction type at x_t = alpha * x0 + sigma * epsilon; inverse of `epsilon_from`.

    Raises:
        ValueError: the prediction type is not epsilon, v_prediction, sample or flow_prediction.
    """
    match prediction_type:
        case "epsilon":
            return epsilon
        case "v_prediction":
            return velocity(x0, epsilon, alpha, sigma)
        case "sample":
            return x0
        case "flow_prediction":
            return epsilon - x0
    raise ValueError(_unknown_type(prediction_type))


def _unknown_type(prediction_type: str) -> str:
    known = ", ".join((*PREDICTION_TYPES, FLOW))
    return f"prediction_type {prediction_type!r} is not supported; use one of {known}"


# ---------------------------------------------------------------------------------------------- schedules
class Levels(NamedTuple):
    """Noise levels: timesteps as the model takes them, and alpha and sigma of x_t = alpha x0 + sigma epsilon."""

    timesteps: Tensor  # (K,)
    alpha: Tensor  # (K,)
    sigma: Tensor  # (K,)


class Steps(NamedTuple):
    """The S steps of a solver, float64: it evaluates the model at one level and arrives at the next."""

    timesteps: Tensor  # (S,) as the model takes them, decreasing
    alpha: Tensor  # (S,) where the model is evaluated
    sigma: Tensor  # (S,)
    next_alpha: Tensor  # (S,) where the step arrives
    next_sigma: Tensor  # (S,)


class Schedule(Protocol):
    """What sampling, scoring and training need of a noise schedule, variance-preserving or of a flow."""

    prediction_type: str
    num_train_timesteps: int

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the whole timesteps 0 .. T - 1: (T,) float64 each."""

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The lowest and the highest log SNR at which the model can be evaluated."""

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps (n,), whole or fractional: (n,) fp32 each, on the device of the timesteps."""

    def log_snr_at(self, timesteps: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at the timesteps of a solver (S,): (S,) float64 on the CPU."""

    def levels_at(self, log_snr: Tensor) -> Levels:
        """The levels with these log SNRs (K,), fp32; the timesteps are those that the model can take."""

    def steps(self, count: int, spacing: str | None, extra: bool) -> Steps:
        """The levels of `count` solver steps.

        Args:
            spacing: of the timesteps, in variance-preserving diffusion; None: as the model's scheduler config says.
            extra: whether the grid has one point more, the clean end, as that of DPM-Solver++ in diffusers.

        Raises:
            ValueError: the model has fewer timesteps, or no such spacing.
        """


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variance-preserving schedule that a model was trained with, and the timestep spacing of its config."""

    alphas_cumprod: Tensor  # (T,) float64 on the CPU, decreasing, within (0, 1); the last one may be 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    final_alpha_cumprod: float = 1.0  # abar after DDIM's last step: 1, or alphas_cumprod[0]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read a diffusers scheduler config. A missing key has the default value of DDPMScheduler.

        Raises:
            ValueError: a setting is not supported; one line for each such setting.
        """
        try:
            faults = _faults(config)
        except TypeError as error:
            faults = [f"a number of the schedule is missing or has another type ({error}); fetch the file again"]
        if faults:
            raise ValueError("\n".join(faults))
        alphas_cumprod = torch.cumprod(1 - _betas(config), 0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _rescaled_to_zero_snr(alphas_cumprod)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0].item(),
        )

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def alphas(self) -> Tensor:
        """alpha_t = abar_t / abar_{t-1}: (T,) float64. Not the alpha = sqrt(abar_t) of the conversions."""
        return torch.cat([self.alphas_cumprod[:1], self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]])

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha_t: (T,) float64."""
        return 1 - self.alphas

    @property
    def log_snr(self) -> Tensor:
        """log(abar_t / (1 - abar_t)): (T,) float64, decreasing; -80 stands for abar_t = 0."""
        return torch.logit(self.alphas_cumprod).clamp(min=_ZERO_SNR)

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        return self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Without a timestep of zero SNR: epsilon is not defined there."""
        noisiest, clearest = self.log_snr[self.alphas_cumprod > 0][[-1, 0]].tolist()
        return noisiest, clearest

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return alpha_sigma_at(_log_snr_on(self, timesteps.device), timesteps)

    def log_snr_at(self, timesteps: Tensor) -> Tensor:
        return self.log_snr[timesteps.long().cpu()]

    def levels_at(self, log_snr: Tensor) -> Levels:
        timesteps = self.timestep_at(log_snr).float()
        return Levels(timesteps, torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt())

    def steps(self, count: int, spacing: str | None, extra: bool) -> Steps:
        timesteps = self._timesteps(count, spacing or self.timestep_spacing, extra)
        abar = self.alphas_cumprod[timesteps]
        target = torch.cat([abar[1:], abar.new_ones(1)])
        return Steps(timesteps, abar.sqrt(), (1 - abar).sqrt(), target.sqrt(), (1 - target).sqrt())

    def _timesteps(self, count: int, spacing: str, extra: bool) -> Tensor:
        """The timesteps with the spacing of diffusers: (S,) long, decreasing."""
        total, points = self.num_train_timesteps, count + extra
        if not 1 <= points <= total:
            raise ValueError(
                f"num_inference_steps is {count}, but the model has {total} timesteps; give 1 to {total - extra}"
            )
        match spacing:
            case "leading":
                grid = (np.arange(points) * (total // points))[::-1] + self.steps_offset
            case "linspace":
                grid = np.linspace(0, total - 1, points).round()[::-1]
            case "trailing":  # rounding may add a point below zero, which diffusers' DDPM and DDIM keep
                grid = np.arange(total, 0, -total / count).round() - 1
            case _:
                raise ValueError(f"timestep_spacing {spacing!r} is unknown: one of {', '.join(TIMESTEP_SPACINGS)}")
        timesteps = torch.from_numpy(grid[:count].astype(np.int64))
        if timesteps[0] >= total:
            raise ValueError(
                f"num_inference_steps {count} with steps_offset {self.steps_offset} begins at timestep {timesteps[0]},"
                f" beyond the model's last, {total - 1}: take fewer steps or another timestep_spacing"
            )
        return timesteps

    def timestep_at(self, log_snr: Tensor) -> Tensor:
        """The fractional timesteps in [0, T - 1] with these log SNRs; same shape and dtype.

        Linear interpolation between timesteps. Values outside the schedule give the first or last timestep.
        """
        table = -self.log_snr.to(log_snr.device)
        wanted = -log_snr.double()
        upper = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        below, above = table[upper - 1], table[upper]
        fraction = ((wanted - below) / (above - below)).clamp(0, 1)
        return (upper - 1 + fraction).to(log_snr.dtype)


def alpha_sigma_at(log_snr_table: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) at integer or fractional timesteps (n,): two tensors (n,) in the table's dtype.

    Args:
        log_snr_table: (T,) `NoiseSchedule.log_snr` on the device of the timesteps. It is interpolated linearly, so
            this function inverts `NoiseSchedule.timestep_at`.
    """
    lower = timesteps.long().clamp(0, len(log_snr_table) - 2)
    fraction = timesteps.to(log_snr_table.dtype) - lower
    log_snr = torch.lerp(log_snr_table[lower], log_snr_table[lower + 1], fraction)
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


@lru_cache(maxsize=8)
def _log_snr_on(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """The table of log SNR in fp32, copied to a device once."""
    return schedule.log_snr.to(device, torch.float32)


# ---------------------------------------------------------------------------------------------- scheduler configs
def _betas(config: Mapping[str, Any]) -> Tensor:
    """beta_t as diffusers defines it: (T,) float64."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    count = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":  # Ho et al. 2020, section 4
            return torch.linspace(start, end, count, dtype=torch.float64)
        case "scaled_linear":  # Rombach et al. 2022: linear in sqrt(beta)
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        case _:  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17, capped at 0.999
            time = torch.linspace(0, 1, count + 1, dtype=torch.float64)
            abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
            return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def _rescaled_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """sqrt(abar) shifted so that the last is 0, and scaled so that the first stays (Lin et al. 2024, arXiv 2305.08891,
    algorithm 1)."""
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()


def _faults(config: Mapping[str, Any]) -> list[str]:
    """One error message for each setting that is not supported."""
    faults = []
    name = config.get("_class_name")
    if name is not None and name not in SCHEDULERS:
        faults.append(f"_class_name {name!r} is not supported; use a model with one of {', '.join(SCHEDULERS)}")
    for key, known, default in (
        ("prediction_type", PREDICTION_TYPES, "epsilon"),
        ("timestep_spacing", TIMESTEP_SPACINGS, "leading"),
        ("beta_schedule", BETA_SCHEDULES, "linear"),
    ):
        value = config.get(key, default)
        if value not in known and not (key == "beta_schedule" and config.get("trained_betas") is not None):
            faults.append(f"{key} {value!r} is not supported; use a model with one of {', '.join(known)}")
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        faults.append(
            "rescale_betas_zero_snr true with prediction_type 'epsilon' is not supported: the model was trained to zero"
            " SNR, where epsilon says nothing of x0, and another schedule would give wrong images and scores; use a"
            " model that predicts v"
        )
    if config.get("clip_sample", name in _CLIPPING):
        faults.append("clip_sample true is not supported: latents have no fixed range; set it to false")
    if config.get("thresholding"):
        faults.append("thresholding true is not supported: latents have no fixed range; set it to false")
    if config.get("use_flow_sigmas"):
        faults.append(
            "use_flow_sigmas true is not supported: flow-matching models are not variance-preserving; use another model"
        )
    if str(config.get("variance_type")).startswith("learned"):
        faults.append(
            f"variance_type {config['variance_type']!r} is not supported: a predicted variance is not used; use a model"
            " that predicts no variance"
        )
    if not faults:
        betas = _betas(config)
        if len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            faults.append(
                "the betas are not two or more numbers between 0 and 1; correct beta_start, beta_end or trained_betas"
            )
    return faults
