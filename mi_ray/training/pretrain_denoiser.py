"""Pre-training of an embedded denoiser and its text encoder, in plain PyTorch: settings, losses, steps.

Two architectures: `unet`, the embedded model, which predicts noise; `flow`, a small Stable Diffusion 3.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import fast_bfloat16
from mi_ray.shapes import flow, model
from mi_ray.training.losses import mixed_precision


class PretrainConfig(BaseModel):
    """Settings of pre-training. The model card shapes/weights/README.md has the settings of the embedded model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["unet", "flow"] = Field(
        "unet", description="unet: a small Stable Diffusion; flow: a small Stable Diffusion 3, a rectified flow"
    )
    seed: int = Field(0, description="random seed of weights, pairs and batches")
    num_workers: int = Field(1, description="number of data-parallel workers")
    threads_per_worker: int = Field(2, description="number of CPU threads per worker")
    use_gpu: bool = Field(
        False, description="one GPU per worker: forward pass in bfloat16, weights in float32, steps as CUDA graphs"
    )
    drawing_processes: int = Field(
        0, description="number of data-loading processes per worker; 0: the worker draws its pairs itself"
    )
    vae_steps: int = Field(2200, description="number of training steps of the autoencoder")
    vae_batch_size: int = Field(16, description="number of images in a step of all workers")
    vae_learning_rate: float = Field(1.5e-3, description="learning rate of the autoencoder")
    kl_weight: float = Field(
        1e-6, description="weight of the KL divergence, summed over a latent; the pixel loss is a mean"
    )
    decoder_steps: int = Field(
        1500, description="number of training steps of the decoder alone, on frozen latents of textured scenes"
    )
    decoder_learning_rate: float = Field(1e-3, description="learning rate of the decoder alone")
    pairs: int = Field(60_000, description="number of caption-image pairs, drawn and encoded once")
    steps: int = Field(6500, description="number of training steps of the denoiser and the text encoder")
    batch_size: int = Field(64, description="number of pairs in a step of all workers")
    learning_rate: float = Field(2e-3, description="highest learning rate, after a warm-up of 200 steps")
    prompt_dropout: float = Field(0.1, description="share of the pairs that are trained without their caption")
    min_snr_gamma: float = Field(5.0, description="unet: gamma of Min-SNR, Hang et al. 2023, eq. 5")
    ema_decay: float = Field(0.999, description="decay of the moving average of the weights, which is saved")
    checkpoint_every: int = Field(500, description="number of steps between two checkpoints")
    start_from: ModelPath = Field(
        "",
        description="take the autoencoder and the parts of the same name from it: a folder or shapes; empty: nothing",
    )
    layout_share: float = Field(
        0.0, ge=0, lt=1, description="unet: share of timesteps around 690, where captions matter most"
    )
    logit_mean: float = Field(0.0, description="flow: mean of the logit of a time, Esser et al. 2024, eq. 19")
    logit_std: float = Field(1.0, gt=0, description="flow: standard deviation of the logit of a time")


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over 200 steps, then cosine decay to 2 %."""
    warm = min(1.0, (step + 1) / min(200, total))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))


def timestep_frequency(alphas_cumprod: Tensor, min_snr_gamma: float, layout_share: float) -> Tensor:
    """The sampling probability of each timestep: (T,), with sum 1.

    The probability is proportional to the min-SNR weight (Hang et al. 2023, eq. 5), and the loss is not weighted. This
    is the same objective with less variance. A share `layout_share` of the timesteps is instead drawn from a
    logit-normal distribution (Esser et al. 2024, section 3.1) around 0.69 T, where the caption helps the denoiser most.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    base = (min_snr_gamma / snr).clamp(max=1)
    t = (torch.arange(len(snr)) + 0.5) / len(snr)
    layout = torch.exp(-0.5 * ((torch.logit(t) - 0.8) / 0.6) ** 2) / (t * (1 - t))
    return (1 - layout_share) * base / base.sum() + layout_share * layout / layout.sum()


# ---------------------------------------------------------------------------------------------- objectives
class Objective(nn.Module):
    """The trained parts of a pipeline and their loss.

    Args:
        config: settings of the distribution of noise levels.
        parts: by their names in the pipeline.
    """

    bfloat16_with_amx = False  # forward pass in bfloat16 on a CPU that is fast with it

    def __init__(self, config: PretrainConfig, parts: dict[str, nn.Module]):
        super().__init__()
        self.config, self.parts = config, nn.ModuleDict(parts)

    def noised(self, latents: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the noise levels of n latents: noised latents (n, C, h, w), timesteps (n,) and target (n, C, h, w)."""
        raise NotImplementedError

    def predict(self, ids: Tensor, noised: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction (n, C, h, w) for token ids (n, MAX_TOKENS)."""
        raise NotImplementedError

    def pipeline(self, parts: nn.ModuleDict, vae: AutoencoderKL) -> DiffusionPipeline:
        """The pipeline of `parts`, for saving: its network is in half precision.

        Text encoders stay in single precision: transformers loads a model in the precision of its file, diffusers loads
        in single precision, and an unmodified `from_pretrained` must load all parts in the same precision.
        """
        raise NotImplementedError

    def forward(self, ids: Tensor, noised: Tensor, timesteps: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the prediction, which is computed in bfloat16 on a GPU."""
        device = noised.device.type
        half = device == "cuda" or (self.bfloat16_with_amx and fast_bfloat16())
        with mixed_precision(device, torch.bfloat16 if half else None):
            predicted = self.predict(ids, noised, timesteps)
        return mse_loss(predicted.float(), target)


class UNetObjective(Objective):
    """Noise prediction of the embedded model: text encoder and UNet."""

    def __init__(self, config: PretrainConfig):
        encoder = model.build_text_encoder(model.build_tokenizer())
        super().__init__(config, {"text_encoder": encoder, "unet": model.build_unet()})
        self.scheduler = model.build_scheduler()
        frequency = timestep_frequency(self.scheduler.alphas_cumprod, config.min_snr_gamma, config.layout_share)
        self.register_buffer("frequency", frequency, persistent=False)

    def noised(self, latents, noise, generator):
        timesteps = torch.multinomial(self.frequency, len(latents), replacement=True, generator=generator)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, noise

    def predict(self, ids, noised, timesteps):
        embeddings = self.parts["text_encoder"](ids).last_hidden_state
        return self.parts["unet"](noised, timesteps, encoder_hidden_states=embeddings).sample

    def pipeline(self, parts, vae):
        tokenizer, unet = model.build_tokenizer(), model.build_unet()
        unet.load_state_dict(parts["unet"].state_dict())
        return model.build_pipeline(vae, parts["text_encoder"], tokenizer, unet.half())


class FlowObjective(Objective):
    """Velocity prediction of a rectified flow: two text encoders and a transformer.

    x_s = (1 - s) x0 + s epsilon, the target is epsilon - x0, and logit(s) is normal (Esser et al. 2024, eq. 19).
    """

    bfloat16_with_amx = True

    def __init__(self, config: PretrainConfig):
        first, second = flow.build_text_encoders(model.build_tokenizer())
        transformer = flow.build_transformer()
        transformer.set_attn_processor(flow.RepeatedTokenAttention(flow.T5_TOKENS))
        super().__init__(config, {"text_encoder": first, "text_encoder_2": second, "transformer": transformer})

    def noised(self, latents, noise, generator):
        logit = torch.randn(len(latents), generator=generator, device=latents.device)
        s = torch.sigmoid(self.config.logit_mean + self.config.logit_std * logit)
        return torch.lerp(latents, noise, s.view(-1, 1, 1, 1)), 1000 * s, noise - latents

    def predict(self, ids, noised, timesteps):
        embeds, pooled = flow.encode(self.parts["text_encoder"], self.parts["text_encoder_2"], ids)
        return self.parts["transformer"](
            hidden_states=noised, timestep=timesteps, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample

    def pipeline(self, parts, vae):
        tokenizer, transformer = model.build_tokenizer(), flow.build_transformer()
        transformer.load_state_dict(parts["transformer"].state_dict())
        return flow.build_pipeline(vae, tokenizer, parts["text_encoder"], parts["text_encoder_2"], transformer.half())


OBJECTIVES = {"unet": UNetObjective, "flow": FlowObjective}


# ---------------------------------------------------------------------------------------------- steps
class DenoiserTraining:
    """Training on stored pairs. The draws of a step depend only on seed, rank and step, so training can resume.

    Args:
        data: token ids "ids" (n, MAX_TOKENS) int16 and "latents" (n, C, h, w) float16, on the device of training.
        start: pipeline whose parts of the same name give the first weights; None: random weights.
        rank: of this worker, of `world_size` workers that share a batch.

    Raises:
        RuntimeError: a part of `start` has other weights.

    Attributes:
        parts: what a checkpoint has to store.
        loss: called with what `draw` returns. Data-parallel training replaces it.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: dict[str, Tensor],
        start: DiffusionPipeline | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.config, self.data, self.rank = config, data, rank
        self.device, self.batch_size = data["ids"].device, config.batch_size // world_size
        null_ids = model.build_tokenizer()("", padding="max_length", return_tensors="pt").input_ids
        self.null_ids = null_ids.short().to(self.device)
        torch.manual_seed(config.seed)
        self.objective = OBJECTIVES[config.architecture](config)
        for name, module in self.objective.parts.items():
            if (trained := getattr(start, name, None)) is not None:
                if type(trained) is not type(module):  # of the text encoders, only a flow model's has a projection
                    module, trained = (getattr(part, "text_model", part) for part in (module, trained))
                module.load_state_dict(trained.state_dict())
        self.objective.to(self.device)
        modules = self.objective.parts
        average = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        optimizer = torch.optim.AdamW(
            modules.parameters(), lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.99), fused=True
        )
        self.parts = {"modules": modules, "average": average, "optimizer": optimizer}
        self.loss: Callable[..., Tensor] = self.objective

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of the loss at a step: (ids, noised latents, timesteps, target)."""
        seed = hash((self.config.seed, self.rank, step)) % 2**63
        generator = torch.Generator(self.device).manual_seed(seed)
        count, size = len(self.data["ids"]), self.batch_size
        chosen = torch.randint(count, (size,), generator=generator, device=self.device)
        latents = self.data["latents"][chosen].float()
        dropped = torch.rand(size, 1, generator=generator, device=self.device) < self.config.prompt_dropout
        ids = torch.where(dropped, self.null_ids, self.data["ids"][chosen]).long()
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        return ids, *self.objective.noised(latents, noise, generator)

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """Make the optimiser step number `step`, from 0: its loss and the norm of its gradient."""
        modules, average, optimizer = self.parts.values()
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(step, self.config.steps)
        loss = self.loss(*self.draw(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(modules)
        return loss.detach(), norm

    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The pipeline of the averaged weights around an autoencoder, as it is saved."""
        return self.objective.pipeline(self.parts["average"].module, vae)
