"""The losses of fine-tuning, one function per method, and one module that computes the predictions they need.

Every loss uses squared errors of predictions of the model's own target (epsilon, v or x0), at one noise level per row.
Notation: l is the mean squared error of a row, `new` the policy in training, `old` the policy that sampled the
candidates, `reference` the frozen base model, A the advantage of a candidate within its prompt, in [-1, 1].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from mi_ray.config import BETA, FinetuneConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families import Predict, unet_prediction
from mi_ray.diffusion.schedules import FLOW, Schedule, prediction_from


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one forward pass of a loss: n rows. The rows of the candidates of a prompt are consecutive."""

    x0: Tensor  # (n, *latent_shape) fp32, clean latents
    noise: Tensor  # (n, *latent_shape) fp32
    timesteps: Tensor  # (n,) long
    conditioning: Conditioning  # of n prompts
    weights: Tensor  # (n,) weight of each row in the mean
    advantages: Tensor | None = None  # (n,) in [-1, 1], mean about zero within a prompt
    rewards: Tensor | None = None  # (n,) in [0, 1]
    group: Tensor | None = None  # (n,) long, from 0: rows of one prompt at one noise level have the same number
    held: Tensor | None = None  # (n,) bool: rows that are trained towards the reference prediction alone
    # Rows that are sampling steps, see `training.transitions`:
    guidance: Tensor | None = None  # (n,) guidance_scale of the step; None: no guidance
    precision: Tensor | None = None  # (n,) the log-probability is -1/2 of it times the squared error, and a constant

    def to(self, device: torch.device) -> "Batch":
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in given.items() if value is not None})


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions (n, *latent_shape) fp32 for the same noised latents; None if the method does not need them."""

    target: Tensor
    new: Tensor
    old: Tensor | None
    reference: Tensor | None

    def error(self, prediction: Tensor) -> Tensor:
        """Mean squared error of each row, (n,)."""
        return _mean_square(prediction - self.target)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------- the methods
def supervised(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """l(new): Ho et al. 2020, eq. 14. MI-TUNE's loss on the kept candidates."""
    return p.error(p.new)


def nft(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117, eq. 5): (r l(old + b d) + (1 - r) l(old - b d)) / b with d = new - old,
    r = (1 + A) / 2, b = `beta`. A good candidate attracts the prediction, a bad one repels it."""
    beta, r = _beta(config), (1 + batch.advantages) / 2
    move = beta * (p.new - p.old)
    return (r * p.error(p.old + move) + (1 - r) * p.error(p.old - move)) / beta


def awm(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """Advantage-weighted matching (arXiv 2509.25050): -A exp(l(old) - l(new)) + ||new - old||^2. The exponential is the
    likelihood ratio of the two policies. The last term keeps the update small (KL_EMA in the paper)."""
    ratio = (p.error(p.old) - p.error(p.new)).exp()
    return _mean_square(p.new - p.old) - batch.advantages * ratio


def dgpo(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """Group DPO (arXiv 2510.08425): log(1 + exp(b sum_i A_i (l_i(new) - l_i(reference)))) / b over a prompt's
    candidates, b = `beta`. With two candidates it is Diffusion-DPO. Division by b keeps the size of the gradient."""
    gained = batch.advantages * (p.error(p.new) - p.error(p.reference))
    beta = _beta(config)
    return softplus(beta * _sum_of_group(gained, batch.group)) / beta


def crd(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """Centred reward distillation (arXiv 2603.14128): (b (r_i - mean r) - A_i)^2, b = `beta`, with the policy's implied
    reward r = l(old) - l(new) times the number of latent elements. The anchor is `anchor` at `anchor_guidance`."""
    implied = (p.error(p.old) - p.error(p.new)) * p.new[0].numel()
    centred = implied - _mean_of_group(implied, batch.group)
    return (_beta(config) * centred - batch.advantages).square()


def gors(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """GORS (T2I-CompBench, arXiv 2307.06350, eq. 1): reward times l(new), for candidates above their prompt's mean.

    The paper's thresholds are for its own metrics. Other scores have no threshold, so the mean of the prompt is used.
    """
    return batch.rewards * (batch.advantages > 0) * p.error(p.new)


def hn_itm(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """HN-ITM (arXiv 2305.16397, eq. 3): l(best) - min(l(worst), l(best)) of a prompt's candidates, at the same noise.
    The l(best) inside the minimum has no gradient. The worst candidate is used as the negative image."""
    error, size = p.error(p.new), int(batch.group.max()) + 1
    best, worst = (_extreme_of_group(sign * batch.advantages, batch.group, size) for sign in (1, -1))
    value = error[best] - torch.minimum(error[worst], error[best].detach())
    return value[batch.group]


def dpok(p: Predictions, batch: Batch, config: FinetuneConfig) -> Tensor:
    """DPOK (arXiv 2305.16381): -A times the ratio of the likelihoods of a sampling step under new and old.

    As in the released code, log(ratio) is the mean over the latent elements, and the ratio is clamped to 1 +-
    `ratio_clip`, where it has no gradient. `anchor` is the KL regularisation, with the guidance of the step. A replaces
    the reward minus its learnt value: A is centred within the prompt.
    """
    ratio = (batch.precision / 2 * (p.error(p.old) - p.error(p.new))).exp()
    return -batch.advantages * ratio.clamp(1 - config.ratio_clip, 1 + config.ratio_clip)


@dataclass(frozen=True)
class Method:
    """A loss (predictions, batch, config) -> (n,), and whether it needs the predictions of `old` and `reference`."""

    loss: Callable[[Predictions, Batch, FinetuneConfig], Tensor]
    old: bool = False
    reference: bool = False


METHODS = {
    "supervised": Method(supervised),
    "nft": Method(nft, old=True),
    "awm": Method(awm, old=True),
    "dgpo": Method(dgpo, reference=True),
    "crd": Method(crd, old=True),
    "gors": Method(gors),
    "hn-itm": Method(hn_itm),
    "dpok": Method(dpok, old=True),
}


def _beta(config: FinetuneConfig) -> float:
    """`finetune.beta`, or the default of the method."""
    return config.beta or BETA[config.method]


def _sum_of_group(values: Tensor, group: Tensor) -> Tensor:
    """For each row the sum over its group, (n,)."""
    return values.new_zeros(int(group.max()) + 1).index_add(0, group, values)[group]


def _mean_of_group(values: Tensor, group: Tensor) -> Tensor:
    return _sum_of_group(values, group) / _sum_of_group(torch.ones_like(values), group)


def _extreme_of_group(values: Tensor, group: Tensor, size: int) -> Tensor:
    """For each group the index of the row with the largest value, (size,)."""
    rows = torch.arange(len(values), device=values.device)
    greatest = values.new_full((size,), -torch.inf).scatter_reduce(0, group, values, "amax")
    first = torch.full((size,), len(values), device=values.device)
    return first.scatter_reduce(0, group, torch.where(values == greatest[group], rows, len(values)), "amin")


# ---------------------------------------------------------------------------------------------- the module
def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """The weights min(SNR, gamma) of the x0 loss (Hang et al. 2023, eq. 5), converted to the model's prediction_type.

    The squared error of x0 is 1/SNR times that of epsilon and 1/(SNR + 1) times that of v (ibid., section 3.4), and s^2
    times that of the velocity of a flow.

    Args:
        snr: alpha^2 / sigma^2, any shape.

    Returns:
        The weights, of the same shape.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # stays finite at SNR 0
    if prediction_type == FLOW:  # x0 = x_s - s u, and s = 1 / (1 + sqrt(SNR))
        return snr.clamp(max=gamma) / (1 + snr.sqrt()).square()
    return snr.clamp(max=gamma) / (snr + 1) if prediction_type == "v_prediction" else snr.clamp(max=gamma)


@contextmanager
def weights_of(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]):
    """Context in which the parameters have these values. Afterwards they have their own values again. No copies."""
    own = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


@contextmanager
def mixed_precision(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype` for the forward pass of a training step; None: no autocast."""
    if dtype is None:
        yield
        return
    # On a CPU, the backward pass of flash attention is slow in half precision.
    plain = device == "cpu" and torch.is_grad_enabled()
    with torch.autocast(device, dtype), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


class Objective(nn.Module):
    """The model with its adapter and the loss of a method: batch -> scalar.

    It is a module, so that data-parallel training has one forward pass. The noised latents and the errors are fp32;
    only the model runs in `autocast_dtype`.

    Args:
        model: the denoiser with the PEFT adapter that the run starts from: the base model of the losses.
        null: conditioning of one empty prompt, for predictions with guidance.
        network_prediction: how the model's family calls its network, `Family.predict`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        config: FinetuneConfig,
        autocast_dtype: torch.dtype | None = None,
        null: Conditioning | None = None,
        network_prediction: Predict = unet_prediction,
    ):
        super().__init__()
        self.model, self.config, self.autocast_dtype = model, config, autocast_dtype
        self.method, self.null, self.network_prediction = METHODS[config.method], null, network_prediction
        self.parameters_trained = [p for p in model.parameters() if p.requires_grad]
        # Values of these parameters, set by the loop: at the start of training, and of the policy that samples.
        self.start: list[Tensor] = []
        self.old: list[Tensor] = []
        self.base = [p.detach().clone() for p in self.parameters_trained] if config.method != "supervised" else []
        self.prediction_type = schedule.prediction_type
        alpha, sigma = schedule.table
        snr, gamma = (alpha / sigma).square(), config.min_snr_gamma
        weights = min_snr_weights(snr, gamma, self.prediction_type) if gamma else torch.ones_like(snr)
        # Not buffers: data-parallel training sends buffers to every worker before each forward pass.
        device = next(model.parameters(), weights).device
        self.alpha, self.sigma, self.snr_weights = (values.float().to(device) for values in (alpha, sigma, weights))
        self.figures: dict[str, float] = {}  # logged values of the last forward pass

    def _coefficients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (batch.x0.ndim - 1))
        return self.alpha[batch.timesteps].view(shape), self.sigma[batch.timesteps].view(shape)

    def predict(self, batch: Batch, conditioning: Conditioning | None = None) -> Tensor:
        """The model's fp32 output (n, *latent_shape) at alpha x0 + sigma noise."""
        alpha, sigma = self._coefficients(batch)
        device, dtype = batch.x0.device.type, self.autocast_dtype
        conditioning = batch.conditioning if conditioning is None else conditioning
        with mixed_precision(device, dtype):
            x_t = alpha * batch.x0 + sigma * batch.noise
            prediction = self.network_prediction(self.model, x_t, batch.timesteps, conditioning)
        return prediction.float()

    def guided(self, batch: Batch, scale: float) -> Tensor:
        """The prediction with the guidance_scale of the rows, or with `scale` if they have none: Ho & Salimans 2022,
        eq. 6."""
        prediction = self.predict(batch)
        w = scale if batch.guidance is None else batch.guidance.view(-1, *[1] * (prediction.ndim - 1))
        if batch.guidance is None and scale == 1:
            return prediction
        null = self.predict(batch, self.null.expand(len(batch.x0)))
        return null + w * (prediction - null)

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """The base model's prediction, with guidance_scale `anchor_guidance` or that of the rows."""
        with weights_of(self.base, self.parameters_trained):
            return self.guided(batch, self.config.anchor_guidance)

    def forward(self, batch: Batch) -> Tensor:
        """The loss: mean over rows of weight * min-SNR weight * (value of the method + anchor)."""
        config, method = self.config, self.method
        target = prediction_from(self.prediction_type, batch.x0, batch.noise, *self._coefficients(batch))
        anchored = config.method != "supervised" and config.anchor > 0
        old = None
        if method.old:
            with torch.no_grad(), weights_of(self.old, self.parameters_trained):
                old = self.guided(batch, 1)
        needed = anchored or method.reference or batch.held is not None
        reference = self.reference(batch) if needed else None
        p = Predictions(target, self.guided(batch, 1), old, reference)
        values = method.loss(p, batch, config)
        if reference is not None:
            distance = _mean_square(p.new - reference)
            self.figures["distance_to_base"] = distance.detach().mean().item()
            values = values + config.anchor * distance
            if batch.held is not None:
                values = torch.where(batch.held, distance, values)
        return (batch.weights * self.snr_weights[batch.timesteps] * values).mean()
