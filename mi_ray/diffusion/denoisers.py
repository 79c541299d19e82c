"""Denoisers: one protocol for what sampling and scoring need of a model, and the Stable Diffusion 1/2 family.

A model is an ordinary diffusers folder, read with the stock `from_pretrained` of each part: safetensors only, no code
from the model's repository.
"""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import PeftModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.folders import check_adapter, fetch_model, read_config
from mi_ray.diffusion.schedules import NoiseSchedule, alpha_sigma_at, epsilon_from
from mi_ray.diffusion.sizes import Sizes
from mi_ray.diffusion.weights import refuse_report

CHUNK = 32  # images or prompts that the autoencoder or the text encoder takes at a time


class Denoiser(Protocol):
    """A text-conditioned denoiser of latents, whatever its architecture and prediction type."""

    schedule: NoiseSchedule
    image_size: tuple[int, int]  # height and width in pixels
    latent_shape: tuple[int, ...]  # of one candidate
    own_latent_shape: tuple[int, ...]  # likewise, at the size that the model was trained at
    device: torch.device
    max_tokens: int  # that the text encoder reads, with those of start and end
    calls: int  # of the denoiser and the autoencoder that were begun so far

    def token_ids(self, prompt: str) -> list[int]:
        """Tokens of the whole prompt, with those of start and end, uncut."""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """One row a prompt; what exceeds `max_tokens` is cut, and shorter prompts are padded to one length."""

    def prompt_distances(self, some: Conditioning, others: Conditioning) -> Tensor:
        """Euclidean distances (n, m) fp32 between n and m prompts in the text encoder's space."""

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's own prediction (n, *latent_shape), of `schedule.prediction_type` and in the model's dtype.

        Args:
            x_t: (n, *latent_shape) fp32.
            timesteps: (n,) whole or fractional.
            conditioning: n rows.
        """

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted noise (n, *latent_shape) fp32, whatever the model predicts; the arguments are `predict`'s."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, *latent_shape) fp32 -> images (n, *image_size, 3) uint8."""

    def encode_images(self, images: np.ndarray) -> Tensor:
        """Images (n, *image_size, 3) uint8 -> latents (n, *latent_shape) fp32: posterior mode times scaling factor."""


def unet_arguments(conditioning: Conditioning) -> dict[str, Tensor]:
    """What the UNet is called with beside x_t and timesteps, by keyword: in `UNetDenoiser`, and where it is trained."""
    return {"encoder_hidden_states": conditioning["embeds"]}


class UNetDenoiser:
    """Stable Diffusion 1 and 2: UNet2DConditionModel, CLIPTextModel, AutoencoderKL.

    The UNet runs in `dtype`; text encoder and autoencoder too on a GPU, in fp32 on a CPU. An autoencoder that asks for
    it (`force_upcast`) runs in fp32 everywhere. The modules are frozen and in evaluation mode.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        schedule: NoiseSchedule,
        sizes: Sizes,
        image_size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        beside = torch.float32 if device.type == "cpu" else dtype
        self.unet = unet.to(device, dtype).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(device, beside).eval().requires_grad_(False)
        self.vae = vae.to(device, torch.float32 if vae.config.force_upcast else beside).eval().requires_grad_(False)
        self.tokenizer, self.schedule, self.dtype, self.device = tokenizer, schedule, dtype, device
        self._autoencoder = SimpleNamespace(batch_size=CHUNK)
        self._tokenizing = Lock()  # it holds how to pad and cut, and threads ask it for both
        self.image_size, channels = image_size, unet.config.in_channels
        self.latent_shape = (channels, *sizes.latent(image_size))
        self.own_latent_shape = (channels, *sizes.latent(sizes.own))
        self.max_tokens = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self._log_snr = schedule.log_snr.to(device, torch.float32)
        self._compiled, self._rows = None, ()
        self.calls = 0

    def specialise(self, *, channels_last: bool, compiled: str | None, rows: tuple[int, ...]):
        """Trade generality for speed; what is computed stays the same.

        Args:
            channels_last: memory layout of the UNet's weights and activations.
            compiled: "default": torch.compile; "cuda-graphs": and replayed as one launch, on a CUDA GPU; None: neither.
            rows: the batch sizes that are compiled, rising; another is filled up to the next of them, or, beyond the
                last, runs uncompiled.
        """
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if compiled:
            mode = {"default": "default", "cuda-graphs": "reduce-overhead"}[compiled]
            self._compiled, self._rows = torch.compile(self.unet, mode=mode, dynamic=False), rows

    def token_ids(self, prompt: str) -> list[int]:
        with self._tokenizing:
            return self.tokenizer(prompt, verbose=False).input_ids

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        with self._tokenizing:
            ids = self.tokenizer(
                prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
            ).input_ids
        states = [self.text_encoder(part.to(self.device)).last_hidden_state for part in ids.split(CHUNK)]
        return Conditioning({"embeds": torch.cat(states)})

    def prompt_distances(self, some: Conditioning, others: Conditioning) -> Tensor:
        return torch.cdist(*(prompts["embeds"].flatten(1).float() for prompts in (some, others)))

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls += 1
        count, x_t, conditioning = len(x_t), x_t.to(self.dtype), conditioning.to(dtype=self.dtype)
        size = next((size for size in self._rows if size >= count), None)
        if size is None:
            return self.unet(x_t, timesteps, **unet_arguments(conditioning)).sample

        def filled(rows: Tensor) -> Tensor:
            if size == count:
                return rows.contiguous()  # another memory layout would be compiled anew
            return torch.cat([rows, rows[-1:].expand(size - count, *rows.shape[1:])])

        torch.compiler.cudagraph_mark_step_begin()
        inputs = filled(x_t), filled(timesteps)
        return self._compiled(*inputs, **unet_arguments(conditioning.map(filled))).sample[:count]

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction = self.predict(x_t, timesteps, conditioning).float()
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma_at(self._log_snr, timesteps))
        return epsilon_from(self.schedule.prediction_type, prediction, x_t, alpha, sigma)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        def decoded(part: Tensor) -> Tensor:
            scaled = part.to(self.device, torch.float32) / self.vae.config.scaling_factor
            image = self.vae.decode(scaled.to(self.vae.dtype)).sample.float()
            image = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            return image.permute(0, 2, 3, 1).cpu()

        return self._by_chunks(decoded, latents).numpy()

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        def encoded(part: Tensor) -> Tensor:
            image = part.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode().float()

        return self._by_chunks(encoded, torch.from_numpy(images)) * self.vae.config.scaling_factor

    def _by_chunks(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Run the autoencoder on a few rows at a time; where memory does not suffice, on half as many from then on."""
        done: list[Tensor] = []
        while len(rows):
            self.calls += 1
            done.append(fitting(self._autoencoder, lambda left=rows: run(left[: self._autoencoder.batch_size])))
            rows = rows[len(done[-1]) :]
        return torch.cat(done)


# ---------------------------------------------------------------------------------------------- loading
def load_denoiser(
    path: str,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | None = None,
    beside: UNetDenoiser | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> UNetDenoiser:
    """Load a model, and merge an adapter into it so that inference pays nothing for it.

    Args:
        path: a shipped name ("shapes"), a diffusers folder or a hub id.
        dtype: of the denoiser: "float32", "float16", "bfloat16"; "auto": float16 on a GPU, float32 without.
        device: as torch names it; "auto": a GPU if there is one.
        adapter: local folder with adapter_config.json and adapter_model.safetensors of PEFT, for the UNet.
        beside: the same model, loaded already: all but the UNet is shared with it.
        size: height and width of the images in pixels; None: the model's own.

    Raises:
        ValueError: with a line for each thing that is wrong with the model, the adapter or the size.
    """
    folder = fetch_model(path)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype == "auto":
        dtype = "float16" if chosen.type == "cuda" else "float32"
    sizes = Sizes.of_unet(read_config(folder, "unet"), read_config(folder, "vae"))
    image_size = sizes.image(*size)
    unet = _loaded(UNet2DConditionModel, folder, "unet")
    if adapter is not None:
        check_adapter(adapter)
        unet = PeftModel.from_pretrained(unet.float(), str(adapter), torch_device="cpu").merge_and_unload()
    if beside is not None:
        text_encoder, tokenizer, vae = beside.text_encoder, beside.tokenizer, beside.vae
    else:
        text_encoder = _loaded(CLIPTextModel, folder, "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        vae = _loaded(AutoencoderKL, folder, "vae")
    return UNetDenoiser(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=vae,
        schedule=NoiseSchedule.from_config(read_config(folder, "scheduler")),
        sizes=sizes,
        image_size=image_size,
        dtype=getattr(torch, dtype),
        device=chosen,
    )


def _loaded(kind: type, folder: Path, part: str):
    """A part of a model folder, with all its weights and no others.

    Raises:
        ValueError: its loader reports weights that are missing, unexpected or of another shape.
    """
    model, report = kind.from_pretrained(folder, subfolder=part, use_safetensors=True, output_loading_info=True)
    try:
        refuse_report(part, report)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} {error}") from error
    return model
