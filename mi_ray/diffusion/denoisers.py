"""Denoisers: one protocol for what sampling and scoring need of a model, and the Stable Diffusion 1/2 family.

A model is an ordinary diffusers folder, read with the stock `from_pretrained` of each part: safetensors only, no code
from the model's repository.
"""

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.schedules import NoiseSchedule, alpha_sigma_at, epsilon_from

SHIPPED = {"shapes": "shapes/weights"}  # name -> folder inside the package
CHUNK = 32  # images or prompts that the autoencoder or the text encoder takes at a time

_SUPPORTED = "supported is the Stable Diffusion 1 and 2 family (StableDiffusionPipeline; epsilon- or v-prediction)"
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")  # and a branch, a tag or a commit
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Denoiser(Protocol):
    """A text-conditioned denoiser of latents, whatever its architecture and prediction type."""

    schedule: NoiseSchedule
    latent_shape: tuple[int, ...]  # of one candidate
    device: torch.device
    max_tokens: int  # that the text encoder reads, with those of start and end
    calls: int  # of the denoiser and the autoencoder that were begun so far

    def token_ids(self, prompt: str) -> list[int]:
        """Tokens of the whole prompt, with those of start and end, uncut."""

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Embeddings (n, tokens, dim); what exceeds `max_tokens` is cut."""

    def predict(self, x_t: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The model's own prediction (n, *latent_shape), of `schedule.prediction_type` and in the model's dtype.

        Args:
            x_t: (n, *latent_shape) fp32.
            timesteps: (n,) whole or fractional.
            embeddings: (n, tokens, dim).
        """

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Predicted noise (n, *latent_shape) fp32, whatever the model predicts; the arguments are `predict`'s."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (n, *latent_shape) fp32 -> images (n, h, w, 3) uint8."""

    def encode_images(self, images: np.ndarray) -> Tensor:
        """Images (n, h, w, 3) uint8 -> latents (n, *latent_shape) fp32: posterior mode times scaling factor."""


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
        size = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
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
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        with self._tokenizing:
            ids = self.tokenizer(
                prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
            ).input_ids
        return torch.cat([self.text_encoder(part.to(self.device)).last_hidden_state for part in ids.split(CHUNK)])

    def predict(self, x_t: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        self.calls += 1
        inputs = x_t.to(self.dtype), timesteps, embeddings.to(self.dtype)
        size = next((size for size in self._rows if size >= len(x_t)), None)
        if size is None:
            return self.unet(*inputs).sample
        if size > len(x_t):
            inputs = [torch.cat([values, values[-1:].expand(size - len(x_t), *values.shape[1:])]) for values in inputs]
        else:
            inputs = [values.contiguous() for values in inputs]  # a layout of its own would be compiled anew
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(*inputs).sample[: len(x_t)]

    def predict_epsilon(self, x_t: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        prediction = self.predict(x_t, timesteps, embeddings).float()
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
) -> UNetDenoiser:
    """Load a model, and merge an adapter into it so that inference pays nothing for it.

    Args:
        path: a shipped name ("shapes"), a diffusers folder or a hub id.
        dtype: of the denoiser: "float32", "float16", "bfloat16"; "auto": float16 on a GPU, float32 without.
        device: as torch names it; "auto": a GPU if there is one.
        adapter: local folder with adapter_config.json and adapter_model.safetensors of PEFT, for the UNet.
        beside: the same model, loaded already: all but the UNet is shared with it.

    Raises:
        ValueError: with a line for each thing that is wrong with the model or the adapter.
    """
    folder = fetch_model(path)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype == "auto":
        dtype = "float16" if chosen.type == "cuda" else "float32"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    if adapter is not None:
        check_adapter(adapter)
        unet = PeftModel.from_pretrained(unet.float(), str(adapter), torch_device="cpu").merge_and_unload()
    if beside is not None:
        text_encoder, tokenizer, vae = beside.text_encoder, beside.tokenizer, beside.vae
    else:
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
    return UNetDenoiser(
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=vae,
        schedule=NoiseSchedule.from_config(_read_json(folder / "scheduler" / _CONFIGS["scheduler"])),
        dtype=getattr(torch, dtype),
        device=chosen,
    )


def load_schedule(path: str) -> NoiseSchedule:
    """The noise schedule alone, cheap to load.

    Raises:
        ValueError: if the model has none that is supported, or the hub cannot be asked.
    """
    config, fault = _part_config(_folder_with(path, "scheduler/*"), "scheduler")
    if config is None:
        _refuse(path, [fault])
    return NoiseSchedule.from_config(config)


def load_tokenizer(path: str) -> CLIPTokenizer:
    """The tokenizer alone, cheap to load: for counting a prompt's tokens before the model is there.

    Raises:
        ValueError: if the model has none, or the hub cannot be asked.
    """
    folder = _folder_with(path, "tokenizer/*")
    _refuse(path, _vocabulary_faults(folder))
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def resolve_model(path: str) -> str:
    """The folder of a shipped name, a folder as it is, or a hub id as it is, with its revision if it has one.

    Raises:
        ValueError: if `path` has the form of none of them.
    """
    if path in SHIPPED:
        return str(files("mi_ray") / SHIPPED[path])
    if (path and Path(path).is_dir()) or _HUB_ID.fullmatch(path):
        return path
    shipped = ", ".join(SHIPPED)
    raise ValueError(
        f"{path!r} is no model: give a shipped name ({shipped}), an existing folder or a hub id owner/name, or"
        " owner/name@revision"
    )


def check_model(path: str) -> None:
    """Check all that can be checked of a model without loading it; of a hub id, only its form.

    Raises:
        ValueError: with a line for each thing that is wrong.
    """
    folder = _local_folder(path)
    if folder is not None:
        _refuse(path, _folder_faults(folder))


def check_adapter(folder: str | Path) -> None:
    """Check that a local folder holds a PEFT adapter.

    Raises:
        ValueError: naming the file that is missing.
    """
    for name in _ADAPTER_FILES:
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{str(folder)!r} is no adapter: it has no {name}; give a folder that PEFT saved")


def _local_folder(path: str) -> Path | None:
    """The folder of a shipped or local model; None of a hub id."""
    folder = Path(resolve_model(path))
    return folder if path in SHIPPED or folder.is_dir() else None


def _folder_with(path: str, pattern: str) -> Path:
    """A folder that holds some files of the model; of a hub id, named by its commit, nothing else is fetched."""
    folder = _local_folder(path)
    if folder is not None:
        return folder
    name, revision = _HUB_ID.fullmatch(path).groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[pattern]))
    except OSError as error:
        raise _not_had(path, error) from error


def model_commit(path: str) -> str | None:
    """The commit of a hub model as it is now; None of a shipped model or a folder.

    Raises:
        ValueError: the hub cannot be asked, or it is a pipeline that is not supported.
    """
    if _local_folder(path) is not None:
        return None
    folder = _folder_with(path, "model_index.json")
    _refuse(path, _index_faults(folder))
    return folder.name


def unet_config(path: str) -> dict:
    """Of the UNet, without its weights.

    Raises:
        ValueError: the model has none, or the hub cannot be asked.
    """
    config, fault = _part_config(_folder_with(path, f"unet/{_CONFIGS['unet']}"), "unet")
    if config is None:
        _refuse(path, [fault])
    return config


def fetch_model(path: str) -> Path:
    """The model's local folder, checked; a hub id is downloaded, or found in the hub's cache."""
    check_model(path)
    folder = _local_folder(path)
    if folder is not None:
        return folder
    unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    try:
        name, revision = _HUB_ID.fullmatch(path).groups()
        # Before gigabytes are fetched.
        _refuse(path, _class_faults(StableDiffusionPipeline.load_config(name, revision=revision)))
        folder = Path(StableDiffusionPipeline.download(name, revision=revision, use_safetensors=True, **unused))
    except OSError as error:
        raise _not_had(path, error) from error
    _refuse(path, _folder_faults(folder))
    return folder


def _not_had(path: str, error: OSError) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path!r} cannot be had from the hub: check the name and the network, or give a local folder ({reason})"
    )


def _refuse(path: str, faults: list[str]):
    if faults:
        raise ValueError("\n".join(f"{path!r} {fault}" for fault in faults))


def _read_json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    return content


def _class_faults(index: dict) -> list[str]:
    """One line for each class of a model_index.json that is not supported."""
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        return [f"is a {pipeline}, which is not supported; {_SUPPORTED}"]
    named = {part: (index.get(part) or (None, None))[1] for part in _CLASSES}
    return [
        f"has as its {part} a {name}, which is not supported; {_SUPPORTED}"
        for part, name in named.items()
        if name not in (None, *_CLASSES[part])
    ]


def _index_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a folder's model_index.json."""
    try:
        return _class_faults(_read_json(folder / "model_index.json"))
    except FileNotFoundError:
        return ["has no model_index.json; give a folder that a diffusers pipeline's save_pretrained wrote"]
    except ValueError as error:
        return [f"has a model_index.json that is not JSON ({error}); fetch it again"]


def _folder_faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with a diffusers folder."""
    if faults := _index_faults(folder):
        return faults
    configs = {}
    for part in _CONFIGS:
        config, fault = _part_config(folder, part)
        if config is None:
            faults.append(fault)
            continue
        configs[part] = config
        if part in _WEIGHTS:
            faults += _weight_faults(folder / part, part)
    if "tokenizer" in configs:
        faults += _vocabulary_faults(folder)
    if "scheduler" in configs:
        try:
            NoiseSchedule.from_config(configs["scheduler"])
        except ValueError as error:
            faults += [f"has in scheduler/scheduler_config.json {fault}" for fault in str(error).split("\n")]
    if "unet" in configs and "vae" in configs:
        channels = configs["unet"].get("in_channels", 4), configs["unet"].get("out_channels", 4)
        wanted = configs["vae"].get("latent_channels", 4)
        if channels != (wanted, wanted):
            faults.append(
                f"has a UNet that takes {channels[0]} and gives {channels[1]} channels for latents of {wanted}"
                " (an inpainting or upscaling model?); give a text-to-image model"
            )
    return faults


def _part_config(folder: Path, part: str) -> tuple[dict | None, str]:
    """A part's configuration, or None and what is wrong with it."""
    name = f"{part}/{_CONFIGS[part]}"
    try:
        return _read_json(folder / name), ""
    except FileNotFoundError:
        return None, f"lacks its {part}: there is no {name}; complete the folder"
    except ValueError as error:
        return None, f"has a {name} that is not JSON ({error}); fetch it again"


def _vocabulary_faults(folder: Path) -> list[str]:
    """Whether the tokenizer's vocabulary is there: transformers builds an empty one without a word."""
    if any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return []
    return ["lacks its tokenizer's vocabulary, tokenizer/tokenizer.json or tokenizer/vocab.json; complete the folder"]


def _weight_faults(folder: Path, part: str) -> list[str]:
    """Whether the safetensors are there and whole; reads their headers only."""
    index = folder / f"{_WEIGHTS[part]}.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [_WEIGHTS[part]]
    faults = []
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            faults.append(f"lacks {part}/{name}; complete the folder (only safetensors are read, no pickled weights)")
        except (SafetensorError, OSError) as error:
            faults.append(f"has a {part}/{name} that cannot be read ({error}); fetch it again, whole (git lfs pull?)")
    return faults
