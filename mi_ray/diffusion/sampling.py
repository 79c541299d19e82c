"""Solvers as tables of linear coefficients, and the sampling loop with classifier-free guidance."""

import math
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.families.family import Rescale
from mi_ray.diffusion.kernels import Kernel, guided_step, statistics_parts
from mi_ray.diffusion.schedules import FLOW, PREDICTION_TYPES, NoiseSchedule, Schedule

SOLVERS = ("ddpm", "ddim", "dpm++2m", "dpm++2m-sde")
_MULTISTEP = ("dpm++2m", "dpm++2m-sde")

StepNoise = Callable[[int], Tensor]  # index of the step -> noise (n, *latent_shape) fp32


# ---------------------------------------------------------------------------------------------- plans
@dataclass(frozen=True, eq=False)
class SolverPlan:
    """The S steps of a solver: next = A * x_t + B * x0 + C * previous_x0 + D * noise."""

    timesteps: Tensor  # (S,) decreasing: long, or fp32 of a flow
    coefficients: Tensor  # (S, 6) float64: A, B, C, D, and alpha, sigma of x_t = alpha x0 + sigma epsilon

    @property
    def stochastic(self) -> bool:
        """Whether the solver adds noise at its steps."""
        return bool((self.coefficients[:, 3] != 0).any())

    @property
    def multistep(self) -> bool:
        """Whether the solver needs the x0 of the previous step."""
        return bool((self.coefficients[:, 2] != 0).any())

    def guided(self, interval: tuple[float, float] | None) -> list[bool]:
        """For each step: whether both branches are evaluated, because its log SNR is in the interval. None: always."""
        if interval is None:
            return [True] * len(self.timesteps)
        alpha, sigma = self.coefficients[:, 4:].unbind(1)
        log_snr = 2 * (alpha / sigma).log()
        return ((log_snr >= interval[0]) & (log_snr <= interval[1])).tolist()

    def noisy(self, log_snr_max: float | None) -> Tensor:
        """Indices of the steps that add noise, at log SNRs up to log_snr_max; None: at all. (K,) long."""
        low = self.guided((-math.inf, math.inf if log_snr_max is None else log_snr_max))
        return (torch.tensor(low) & (self.coefficients[:, 3] != 0)).nonzero()[:, 0]

    def target(self, step: int, latents: Tensor, previous_x0: Tensor | None, following: Tensor) -> Tensor:
        """The x0 with which a step would give `following` without noise: y = x0 + (D / B) noise, of any shape.

        The log-probability of the step is -(B / D)^2 ||y - x0||^2 / 2 and a constant, with the x0 of the policy.

        Args:
            previous_x0: of the step before; None if C is 0.
            following: the latents after the step.
        """
        keep, clean, momentum = self.coefficients[step, :3].tolist()
        rest = following - keep * latents
        return (rest if momentum == 0 else rest - momentum * previous_x0) / clean

    def precision(self, prediction_type: str) -> Tensor:
        """(B kp / D)^2 of each step, (S,) float64; infinite without noise. The log-probability of a step is -1/2 of it
        times the squared distance of the prediction to the one that gives x0 = `target`."""
        table = self.table(prediction_type)
        return (table[:, 1] * table[:, 5] / table[:, 3]).square()

    def table(self, prediction_type: str) -> Tensor:
        """The steps as `kernels.guided_step` takes them, (S, 8) float64: the columns of `kernels.Coefficients`.

        x0 = kx x_t + kp prediction, of what a model of that type predicts. The statistics are of
        epsilon = p prediction + q x_t; those of a flow are of its velocity, with p = 1 and q = 0.

        Raises:
            ValueError: for a prediction type other than epsilon, v_prediction, sample, flow_prediction.
        """
        *solver, alpha, sigma = self.coefficients.unbind(1)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        match prediction_type:
            case "epsilon":  # Ho et al. 2020, eq. 15
                conversion = 1 / alpha, -sigma / alpha, one, zero
            case "v_prediction":  # Salimans & Ho 2022, appendix D
                conversion = alpha, -sigma, alpha, sigma
            case "sample":
                conversion = zero, one, -alpha / sigma, 1 / sigma
            case "flow_prediction":  # x_t = (1 - s) x0 + s epsilon and u = epsilon - x0: Liu et al. 2023
                conversion = one, -sigma, one, zero
            case _:
                known = ", ".join((*PREDICTION_TYPES, FLOW))
                raise ValueError(f"prediction_type {prediction_type!r} is not supported: one of {known}")
        return torch.stack([*solver, *conversion], 1)


def solver_plan(
    schedule: Schedule, solver: str, num_inference_steps: int, timestep_spacing: str | None = None
) -> SolverPlan:
    """The steps of "ddpm", "ddim", "dpm++2m" or "dpm++2m-sde", equal to diffusers' DDPMScheduler, DDIMScheduler (eta 0)
    and DPMSolverMultistepScheduler (its defaults: second-order midpoint, first-order last step to sigma 0; for the last
    one with algorithm_type "sde-dpmsolver++"). Of a flow, "ddim" is Euler, as in FlowMatchEulerDiscreteScheduler.

    A step goes from level t to level s. alpha and sigma are those of x_t = alpha x0 + sigma epsilon:

    - DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 7, with beta = 1 - abar_t / abar_s), for any alpha and sigma: let
      a = alpha_t / alpha_s and b = sigma_t^2 - a^2 sigma_s^2, which is beta if the variance is preserved (Kingma et al.
      2021, arXiv 2107.00630, appendix A). A = a sigma_s^2 / sigma_t^2, B = alpha_s b / sigma_t^2,
      D^2 = sigma_s^2 b / sigma_t^2.
    - DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma 0): alpha_s x0 + sigma_s epsilon, and
      epsilon = (x_t - alpha_t x0) / sigma_t, hence A = sigma_s / sigma_t, B = alpha_s - alpha_t A. With alpha = 1 -
      sigma this is x_t + (sigma_s - sigma_t) u, the Euler step of a flow.
    - DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): A x_t - alpha_s (exp(-h) - 1) m with
      m = (1 + 1/2r) x0 - 1/2r previous_x0, lambda = log(alpha / sigma), h = lambda_s - lambda_t and
      r = h_before / h. Since exp(-h) = A alpha_t / alpha_s, the factor of m is DDIM's B, hence
      B = B_ddim (1 + 1/2r), C = -B_ddim / 2r; the first step has no x0 before it and the last an infinite h: C = 0.
    - SDE-DPM-Solver++(2M) (Lu et al. 2022, algorithm 4): the same m in place of x0, in DDPM's step, which is the first
      order of the reverse SDE: B = B_ddpm (1 + 1/2r), C = -B_ddpm / 2r, and DDPM's A and D.

    Args:
        timestep_spacing: "leading", "linspace" or "trailing" (Lin et al. 2024, arXiv 2305.08891, table 2);
            None: as the model's scheduler config says.

    Raises:
        ValueError: for an unknown solver or spacing, and for more steps than the model's timesteps allow.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown: one of {', '.join(SOLVERS)}")
    multistep = solver in _MULTISTEP
    timesteps, alpha, sigma, next_alpha, next_sigma = schedule.steps(num_inference_steps, timestep_spacing, multistep)
    if solver == "ddim" and isinstance(schedule, NoiseSchedule):
        next_alpha, next_sigma = _ddim_arrival(schedule, timesteps, num_inference_steps)
    if solver in ("ddpm", "dpm++2m-sde"):
        ratio = alpha / next_alpha
        added = sigma.square() - (ratio * next_sigma).square()
        keep = ratio * (next_sigma / sigma).square()
        first_order = next_alpha * added / sigma.square()
        spread = added.sqrt() * next_sigma / sigma
    else:
        keep = next_sigma / sigma
        first_order = next_alpha - alpha * keep
        spread = torch.zeros_like(alpha)
    momentum = torch.zeros_like(alpha)  # 1 / 2r
    if multistep:
        h = torch.diff((alpha / sigma).log())
        momentum[1:-1] = h[1:] / (2 * h[:-1])
    columns = keep, first_order * (1 + momentum), -first_order * momentum, spread, alpha, sigma
    return SolverPlan(timesteps, torch.stack(columns, 1))


def _ddim_arrival(schedule: NoiseSchedule, timesteps: Tensor, num_inference_steps: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma after each step: diffusers steps by T // S, which need not be where the next timestep lies."""
    arrival = timesteps - schedule.num_train_timesteps // num_inference_steps
    final = torch.tensor(schedule.final_alpha_cumprod, dtype=torch.float64)
    target = torch.where(arrival >= 0, schedule.alphas_cumprod[arrival.clamp(min=0)], final)
    return target.sqrt(), (1 - target).sqrt()


# ---------------------------------------------------------------------------------------------- sampling
@dataclass(frozen=True, eq=False)
class Trajectory:
    """What sampling n candidates leaves, on the denoiser's device. The predictions are of epsilon, or of a flow's
    velocity."""

    latents: Tensor  # (n, *latent_shape) fp32, clean
    timesteps: Tensor  # (S,) of the plan, on the CPU
    delta_sq: Tensor  # (n, S) fp32: ||conditional - unconditional prediction||^2 at each step
    cross: Tensor  # (n, S) fp32: <conditional prediction, conditional - unconditional prediction> at each step
    guidance_scale: float | Tensor = 1.0  # that they were sampled with; (n,) if each had its own
    transitions: Tensor | None = None  # (n, K, 2, *latent_shape): K steps, latents before and `SolverPlan.target`

    def of(self, rows: Tensor) -> "Trajectory":
        """The trajectories of the candidates with these indices."""
        rows, w = rows.to(self.latents.device), self.guidance_scale
        of_rows = w[rows.to(w.device)] if isinstance(w, Tensor) else w
        return Trajectory(self.latents[rows], self.timesteps, self.delta_sq[rows], self.cross[rows], of_rows)


@dataclass(frozen=True, eq=False)
class State:
    """The state of sampling after a step."""

    step: int  # index of the step
    latents: Tensor  # (n, *latent_shape) fp32
    x0: Tensor | None  # (n, *latent_shape) fp32, the clean latents that the step predicted; None if not requested
    statistics: Tensor  # (S, 2, n, parts) fp32, see `kernels.guided_step`; NaN for steps that are not done

    @property
    def delta_sq(self) -> Tensor:
        """||conditional - unconditional epsilon||^2 of each step: (n, S) fp32."""
        return self.statistics[:, 0].sum(-1).T

    @property
    def cross(self) -> Tensor:
        """<conditional epsilon, conditional - unconditional epsilon> of each step: (n, S) fp32."""
        return self.statistics[:, 1].sum(-1).T


class StepGuide(Protocol):
    """What changes the steps with guidance, for the n candidates of one batch: a guidance method."""

    raw: bool  # whether both predictions are the model's own, so that the statistics of the step are those of scores

    def moved(self, step: int, x_t: Tensor) -> Tensor:
        """The latents that the step starts from, (n, *latent_shape) fp32."""

    def predictions(self, step: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction, each (n, *latent_shape)."""

    def combined(self, step: int, guided: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The prediction that the solver follows, (n, *latent_shape) fp32; guided: that of classifier-free guidance."""


@torch.no_grad()
def sampling_steps(
    denoiser: Denoiser,
    plan: SolverPlan,
    conditioning: Conditioning,
    null: Conditioning,
    latents: Tensor,
    guidance_scale: float | Tensor,
    step_noise: StepNoise | None = None,
    *,
    guidance_interval: tuple[float, float] | None = None,
    kernel: Kernel = "eager",
    steps: range | None = None,
    previous_x0: Tensor | None = None,
    x0_at: Container[int] | None = None,
    guide: StepGuide | None = None,
) -> Iterator[State]:
    """Denoise with classifier-free guidance, and yield the state after each step. See `sample` for other arguments.

    Both branches are evaluated in one batch. The loop never waits for the device.

    Args:
        steps: the steps of the plan to do; None: all. A later call can continue, also in a batch with other candidates:
            the state of a candidate is its latents, its previous_x0 (if the plan is multistep) and its noise generator.
        x0_at: steps after which x0 is needed; None: all. A multistep plan always returns it.
        guide: changes the steps with guidance, which then use the eager kernel; None: classifier-free guidance.

    Raises:
        ValueError: the plan is stochastic and step_noise is None.
    """
    if plan.stochastic and step_noise is None:
        raise ValueError("this solver adds noise at its steps; give step_noise")
    device, n, count = denoiser.device, len(latents), len(plan.timesteps)
    timesteps = plan.timesteps.to(device)
    prediction_type = denoiser.schedule.prediction_type
    table = plan.table(prediction_type).float().to(device)
    noisy, guided = (plan.coefficients[:, 3] != 0).tolist(), plan.guided(guidance_interval)
    conditional = conditioning.to(device)
    both = Conditioning.cat([conditional, null.to(device).expand(n)])
    if kernel == "triton" and not isinstance(guidance_scale, Tensor):
        guidance_scale = torch.full((1,), guidance_scale, device=device)
    x_t, x0 = latents.to(device, torch.float32), previous_x0
    kernel = kernel if denoiser.rescale is None and guide is None else "eager"
    parts = statistics_parts(x_t.shape[1:], kernel)
    statistics = torch.full((count, 2, n, parts), torch.nan, device=device)
    for i in range(count) if steps is None else steps:
        branches, rescale = 2 if guided[i] else 1, denoiser.rescale
        if guide is not None and guided[i]:
            x_t = guide.moved(i, x_t)
            predictions = guide.predictions(i, x_t)
            rescale = _guided_by(guide, i, predictions[1], rescale)
        else:
            prediction = denoiser.predict(
                torch.cat([x_t] * branches), timesteps[i].expand(branches * n), both if guided[i] else conditional
            )
            predictions = prediction.chunk(2) if guided[i] else (prediction, None)
        x_t, x0 = guided_step(
            *predictions,
            latents=_like(x_t, predictions[0]),
            previous_x0=x0 if plan.multistep else None,
            noise=_to_device(step_noise(i), device) if noisy[i] else None,
            coefficients=table[i : i + 1],
            guidance_scale=guidance_scale,
            statistics=statistics[i],
            converted=prediction_type not in ("epsilon", FLOW),
            with_x0=plan.multistep or x0_at is None or i in x0_at,
            kernel=kernel,
            rescale=rescale,
        )
        if guide is not None and not guide.raw:
            statistics[i] = torch.nan
        yield State(i, x_t, x0, statistics)


def _guided_by(guide: StepGuide, step: int, unconditional: Tensor, then: Rescale | None) -> Rescale:
    """The combination of a guide as the `rescale` of a step, followed by that of the model's family."""

    def combined(guided: Tensor, conditional: Tensor) -> Tensor:
        followed = guide.combined(step, guided, conditional, unconditional)
        return followed if then is None else then(followed, conditional)

    return combined


def sample(
    denoiser: Denoiser,
    plan: SolverPlan,
    conditioning: Conditioning,
    null: Conditioning,
    latents: Tensor,
    guidance_scale: float | Tensor,
    step_noise: StepNoise | None = None,
    *,
    guidance_interval: tuple[float, float] | None = None,
    kernel: Kernel = "eager",
) -> Trajectory:
    """Sample n candidates, each with its own prompt.

    Args:
        conditioning: n rows, from `denoiser.encode_prompts`.
        null: conditioning of the empty prompt, n rows or one row.
        latents: (n, *latent_shape) standard normal noise, on any device.
        guidance_scale: one value, or one per candidate, (n,) fp32 on the device.
        step_noise: standard normal noise of a step. It is called in the order of the steps, and only for steps that add
            noise.
        guidance_interval: interval of log SNR with guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724). Outside it
            only the conditional branch is evaluated, and the statistics are NaN. None: guidance at all steps.
        kernel: implementation of the step, from `kernels.choose_kernel`.

    Raises:
        ValueError: the plan is stochastic and step_noise is None.
    """
    arguments = (denoiser, plan, conditioning, null, latents, guidance_scale, step_noise)
    steps = sampling_steps(*arguments, guidance_interval=guidance_interval, kernel=kernel, x0_at=())
    last = deque(steps, maxlen=1).pop()
    return Trajectory(last.latents, plan.timesteps, last.delta_sq, last.cross, guidance_scale)


def _like(latents: Tensor, prediction: Tensor) -> Tensor:
    """The latents in the memory layout of the prediction. They differ for a channels-last model."""
    if latents.ndim == 4 and prediction.ndim == 4 and not prediction.is_contiguous():
        return latents.contiguous(memory_format=torch.channels_last)
    return latents


def _to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Copy to the device. The copy to a GPU uses pinned memory, so that it does not wait."""
    if device.type == "cuda" and not noise.is_cuda:
        noise = noise.pin_memory()
    return noise.to(device, torch.float32, non_blocking=True)


class CandidateNoise:
    """The noise of candidates, fp32 on the CPU. Each candidate has its own generator, seeded with its seed, so it does
    not depend on its batch or the device.

    A generator gives the initial latents first, then the noise of the steps that add noise, in order.
    """

    def __init__(self, seeds: list[int], latent_shape: tuple[int, ...]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = latent_shape

    def draw(self, rows: list[int] | None = None) -> Tensor:
        """The next noise of the candidates `rows`, or of all: (n, *latent_shape)."""
        chosen = self._generators if rows is None else [self._generators[row] for row in rows]
        noise = torch.empty(len(chosen), *self._shape)
        for values, generator in zip(noise, chosen, strict=True):
            values.normal_(generator=generator)
        return noise

    @contextmanager
    def restored_on_error(self, rows: list[int]) -> Iterator[None]:
        """Context that resets the generators of these candidates if the block raises an error."""
        before = [self._generators[row].get_state() for row in rows]
        try:
            yield
        except BaseException:
            for row, state in zip(rows, before, strict=True):
                self._generators[row].set_state(state)
            raise


def candidate_noise(seeds: list[int], latent_shape: tuple[int, ...]) -> tuple[Tensor, StepNoise]:
    """Initial latents (n, *latent_shape) and the noise of the steps, for candidates that stay in one batch."""
    noise = CandidateNoise(seeds, latent_shape)
    return noise.draw(), lambda step: noise.draw()
