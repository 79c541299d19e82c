"""Denoisers: one protocol for what sampling and scoring need of a model, and one class that serves every family.

A model is an ordinary diffusers folder, read with the stock `from_pretrained` of its pipeline: safetensors only, no
code from the model's repository.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Protocol

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor, nn

from mi_ray.diffusion.compiling import WORTH_PADDING, compile_blocks
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families import Family
from mi_ray.diffusion.families.family import Rescale
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.folder_checks import family_of, folder_parts, has_weights, read_config, read_index, schedule_of
from mi_ray.diffusion.folders import check_adapter, fetch_model
from mi_ray.diffusion.quantisation import is_placed, quantisation_of
from mi_ray.diffusion.residence import Residence
from mi_ray.diffusion.schedules import Schedule, epsilon_from
from mi_ray.diffusion.sizes import Sizes
from mi_ray.diffusion.weights import part_class, quiet_loading, report_faults, weight_variant

CHUNK = 32  # images or prompts that the autoencoder or the text encoder takes at a time
_TOKENIZING = Lock()  # a tokenizer stores how to pad and truncate, and threads need different settings


class Denoiser(Protocol):
    """A text-conditioned denoiser of latents, whatever its architecture and prediction type."""

    schedule: Schedule
    image_size: tuple[int, int]  # height and width in pixels
    latent_shape: tuple[int, ...]  # of one candidate
    own_latent_shape: tuple[int, ...]  # likewise, at the size that the model was trained at
    device: torch.device
    max_tokens: int  # number of tokens that the text encoder reads, with the start and the end token
    calls: int  # number of calls of the denoiser and the autoencoder so far
    rescale: Rescale | None  # change of the guided prediction in sampling; None: no change

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens of the whole prompt, not truncated, with the start and the end token."""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """One row per prompt. Prompts are truncated to `max_tokens` and padded to one length."""

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

    def make_room(self) -> bool:
        """Free memory: from now on the text encoders are on the device only while they encode. False: nothing to
        free."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, *latent_shape) fp32 -> images (n, *image_size, 3) uint8."""

    def encode_images(self, images: np.ndarray) -> Tensor:
        """Images (n, *image_size, 3) uint8 -> latents (n, *latent_shape) fp32: posterior mode times scaling factor."""


class PipelineDenoiser:
    """The parts of a diffusers pipeline, called as the model's family calls them.

    The network runs in `dtype`; text encoders and autoencoder too on a GPU, in fp32 on a CPU. An autoencoder that asks
    for it (`force_upcast`) runs in fp32 everywhere. The modules are frozen and in evaluation mode.

    Args:
        network: the UNet or transformer.
        pipeline: has the other parts as attributes.
        image_size: height and width of the images in pixels.
        beside: another denoiser with the same pipeline; None: none.
        placed: move the network to the device; false: its user does.
    """

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        pipeline: DiffusionPipeline,
        schedule: Schedule,
        sizes: Sizes,
        image_size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        beside: "PipelineDenoiser | None" = None,
        placed: bool = True,
    ):
        around = torch.float32 if device.type == "cpu" else dtype
        self.family, self.pipeline, self.schedule = family, pipeline, schedule
        self.rescale = family.rescale
        in_place = is_placed(network) or not placed
        self.network = network.eval().requires_grad_(False) if in_place else _placed(network, device, dtype)
        self.tokenizer = getattr(pipeline, family.tokenizer)
        self.vae = pipeline.vae
        upcast = getattr(pipeline.vae.config, "force_upcast", False)
        _placed(pipeline.vae, device, torch.float32 if upcast else around)
        names = [name for name in family.parts if name not in ("vae", family.network)]
        modules = [part for part in (getattr(pipeline, name, None) for name in names) if isinstance(part, nn.Module)]
        encoders = [_placed(module, module.device, around) for module in modules]
        self.encoders = Residence(encoders, device) if beside is None else beside.encoders
        self.dtype, self.device = dtype, device
        self._autoencoder = SimpleNamespace(batch_size=CHUNK)
        self.image_size, channels = image_size, family.channels(network.config)
        self.latent_shape = (channels, *sizes.latent(image_size))
        self.own_latent_shape = (channels, *sizes.latent(sizes.own))
        self.max_tokens = family.max_tokens(pipeline)
        self._compiled, self._rows, self._least = None, (), 0.0
        self.calls = 0

    def specialise(
        self, *, channels_last: bool, compiled: str | None, rows: tuple[int, ...], backend: str = "inductor"
    ):
        """Make the network faster for some batch sizes. Its outputs stay the same, up to rounding.

        Args:
            channels_last: use this memory layout for the network's weights and activations.
            compiled: what torch.compile compiles. "blocks": the repeated blocks of the network. "auto": the blocks on a
                CUDA GPU with Triton, else nothing. "default": the whole network. "cuda-graphs": the whole network,
                replayed as one launch, on a CUDA GPU. None: nothing.
            rows: the compiled batch sizes, rising. A smaller batch is padded to the next size. A batch above the last
                size runs uncompiled. With blocks, a batch that would be mostly padding also runs uncompiled.
            backend: backend of torch.compile, for blocks.
        """
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        if compiled == "auto":
            compiled = "blocks" if self.device.type == "cuda" and find_spec("triton") else None
        if compiled == "blocks":
            compile_blocks(self.network, backend)
            self._compiled, self._rows, self._least = self.network, rows, WORTH_PADDING
        elif compiled:
            mode = {"default": "default", "cuda-graphs": "reduce-overhead"}[compiled]
            self._compiled, self._rows = torch.compile(self.network, mode=mode, dynamic=False), rows

    def token_ids(self, prompt: str) -> list[int]:
        with _TOKENIZING:
            return self.tokenizer(prompt, verbose=False).input_ids

    def token_offsets(self, prompt: str) -> list[tuple[int, int]]:
        """The characters [start, end) of each of the `token_ids`; (0, 0) of the tokens of start and end."""
        with _TOKENIZING:
            return self.tokenizer(prompt, verbose=False, return_offsets_mapping=True).offset_mapping

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """The empty prompt means no prompt. The family encodes it as its pipeline does without a prompt."""
        family, empty = self.family, [not prompt for prompt in prompts]
        if family.encode_null is None or not any(empty):
            return self._encoded(family.encode, prompts)
        null = self._encoded(family.encode_null, [""])
        if all(empty):
            return null.expand(len(prompts)).map(Tensor.contiguous)
        texts = self._encoded(family.encode, [prompt for prompt in prompts if prompt])
        places = torch.tensor([len(texts) if no else i - sum(empty[:i]) for i, no in enumerate(empty)])
        return Conditioning.cat([texts, null]).rows(places)

    def _encoded(self, encode, prompts: list[str]) -> Conditioning:
        parts = []
        with _TOKENIZING, self.encoders.present():
            for start in range(0, len(prompts), CHUNK):
                rows = encode(self.pipeline, prompts[start : start + CHUNK], self.image_size)
                parts.append(Conditioning(rows).to(self.device))
        return Conditioning.cat(parts)

    def make_room(self) -> bool:
        return self.encoders.leave()

    def prompt_distances(self, some: Conditioning, others: Conditioning) -> Tensor:
        return torch.cdist(*(prompts["embeds"].flatten(1).float() for prompts in (some, others)))

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls += 1
        count, x_t, conditioning = len(x_t), x_t.to(self.dtype), conditioning.to(dtype=self.dtype)
        size = next((size for size in self._rows if size >= count), None)
        if size is None or count < self._least * size:
            with torch.compiler.set_stance("force_eager") if self._least else nullcontext():
                return self.family.predict(self.network, x_t, timesteps, conditioning)

        def filled(rows: Tensor) -> Tensor:
            if size == count:
                return rows.contiguous()  # another memory layout would be compiled anew
            return torch.cat([rows, rows[-1:].expand(size - count, *rows.shape[1:])])

        torch.compiler.cudagraph_mark_step_begin()
        inputs = filled(x_t), filled(timesteps), conditioning.map(filled)
        return self.family.predict(self._compiled, *inputs)[:count]

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction = self.predict(x_t, timesteps, conditioning).float()
        alpha, sigma = (a.view(-1, 1, 1, 1) for a in self.schedule.alpha_sigma(timesteps))
        return epsilon_from(self.schedule.prediction_type, prediction, x_t, alpha, sigma)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        def decoded(part: Tensor) -> Tensor:
            image = self.family.decode(self.vae, part.to(self.device, torch.float32)).float()
            image = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            return image.permute(0, 2, 3, 1).cpu()

        return self._by_chunks(decoded, latents).numpy()

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        def encoded(part: Tensor) -> Tensor:
            image = part.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.family.encode_image(self.vae, image)

        return self._by_chunks(encoded, torch.from_numpy(images))

    def _by_chunks(self, run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Run the autoencoder on a few rows at a time. If memory runs out, this number is halved and stays so."""
        done: list[Tensor] = []
        while len(rows):
            self.calls += 1
            part = partial(lambda left: run(left[: self._autoencoder.batch_size]), rows)
            done.append(fitting(self._autoencoder, part, make_room=self.make_room))
            rows = rows[len(done[-1]) :]
        return torch.cat(done)


def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module, frozen, on the device. A module that has the dtype already is not converted: some layers are fp32."""
    module = module.to(device) if module.dtype == dtype else module.to(device, dtype)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- loading
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (Intel AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def dtype_of(dtype: str, family: Family, on_gpu: bool) -> str:
    """The dtype that `auto` and `fast` of `model.dtype` mean for a model of the family."""
    if dtype not in ("auto", "fast"):
        return dtype
    if on_gpu:
        return family.half
    return "bfloat16" if dtype == "fast" and fast_bfloat16() else "float32"


def load_denoiser(
    path: str,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | Path | None = None,
    beside: PipelineDenoiser | None = None,
    size: tuple[int | None, int | None] = (None, None),
    quantize: str | None = None,
    placed: bool = True,
) -> PipelineDenoiser:
    """Load a model. An adapter is merged into its weights, so that it costs no time in inference.

    Args:
        path: a shipped name ("shapes"), a diffusers folder or a hub id.
        dtype: of the denoiser: "float32", "float16", "bfloat16"; "auto": on a GPU that of the family, else "float32";
            "fast": as auto, but "bfloat16" on a CPU that is faster with it.
        device: as torch names it; "auto": a GPU if there is one.
        adapter: local folder with adapter_config.json and adapter_model.safetensors of PEFT, for the network.
        beside: the same model, loaded already: all but the network is shared with it.
        size: height and width of the images in pixels; None: the model's own.
        quantize: quantisation of the network's weights, as `model.quantize`; not together with an adapter.
        placed: move the network to the device; false: it stays on the CPU, and its user moves it.

    Raises:
        ValueError: with a line for each thing that is wrong with the model, the adapter or the size.
    """
    folder = fetch_model(path)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    index, family = read_index(folder), family_of(folder)
    dtype = dtype_of(dtype, family, chosen.type == "cuda")
    config = read_config(folder, family.network)
    sizes = family.sizes(config, read_config(folder, "vae"))
    image_size = sizes.image(*size)
    of_network = getattr(torch, dtype)
    with quiet_loading():
        loaded = of_network if adapter is None else torch.float32
        network = load_part(folder, index, family.network, loaded, quantize)
        if adapter is not None:  # merged in fp32
            check_adapter(adapter)
            network = PeftModel.from_pretrained(network.float(), str(adapter), torch_device="cpu").merge_and_unload()
        if beside is None:
            pipeline = _pipeline(folder, network, torch.float32 if chosen.type == "cpu" else of_network)
        else:
            pipeline = beside.pipeline
    latent_shape = (family.channels(config), *sizes.latent(image_size))
    return PipelineDenoiser(
        family=family,
        network=network,
        pipeline=pipeline,
        schedule=schedule_of(index, read_config(folder, "scheduler"), latent_shape, of_network),
        sizes=sizes,
        image_size=image_size,
        dtype=of_network,
        device=chosen,
        beside=beside,
        placed=placed,
    )


def _pipeline(folder: Path, network: nn.Module, dtype: torch.dtype) -> DiffusionPipeline:
    """The stock pipeline around its network, without a scheduler. The autoencoder is in fp32, others in `dtype`."""
    index, family = read_index(folder), family_of(folder)
    given = {part: None for part in family.optional if part not in folder_parts(index)}
    for part in folder_parts(index):
        if has_weights(part) and part != family.network:
            given[part] = load_part(folder, index, part, torch.float32 if part == "vae" else dtype)
    given |= {**family.unused, "scheduler": None, family.network: network}
    return getattr(diffusers, index["_class_name"]).from_pretrained(folder, **given)


def load_part(folder: Path, index: dict, part: str, dtype: torch.dtype, quantize: str | None = None) -> nn.Module:
    """Load a part of a model folder. Its files must have exactly the weights of its class.

    Args:
        quantize: quantisation of the weights; None: as they are.

    Raises:
        ValueError: its loader reports weights that are missing, unexpected or of another shape; or the package of the
            quantisation is missing.
    """
    settings = {"subfolder": part, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    settings["variant"] = weight_variant(folder, index, part)
    if quantize:
        settings["quantization_config"] = quantisation_of(quantize, part, dtype).quant_mapping[part]
    model, report = part_class(index, part).from_pretrained(folder, **settings)
    if faults := report_faults(part, report):
        raise ValueError("\n".join(f"{str(folder)!r} {fault}" for fault in faults))
    return model
