"""Pre-training of the embedded model with Ray Train: first the autoencoder, then the denoiser and its text encoders."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch.utils.data import DataLoader, Dataset

from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.shapes import model
from mi_ray.shapes.scenes import BACKGROUND
from mi_ray.training.pretrain_denoiser import DenoiserTraining, PretrainConfig, learning_rate_factor

_PIECE = 10_000  # pairs in a file


def _to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """n images (h, w, 3) uint8 -> (n, 3, h, w) in [-1, 1], on the worker's device."""
    return torch.from_numpy(np.stack(images)).to(get_device()).permute(0, 3, 1, 2).float() / 127.5 - 1


class _Drawn(Dataset):
    """A worker's endless stream of draws. Draw n depends only on (seed, phase, rank, n), so training can resume."""

    def __init__(self, draw: Callable[[np.random.Generator], Any], seed: int, phase: int, rank: int):
        self.draw, self.key = draw, (seed, phase, rank)

    def __getitem__(self, n: int):
        return self.draw(np.random.default_rng((*self.key, n)))


def _batches(draw: Callable, config: PretrainConfig, phase: int, indices: range, batch_size: int) -> DataLoader:
    """Batches of `batch_size` draws, as lists: the draws number `indices` of the worker's stream."""
    drawn = _Drawn(draw, config.seed, phase, ray.train.get_context().get_world_rank())
    return DataLoader(drawn, batch_size, sampler=indices, num_workers=config.drawing_processes, collate_fn=list)


def _draw_image(rng: np.random.Generator) -> np.ndarray:
    return model.draw_pair(rng)[1]


class _Checkpoints:
    """Saves modules, optimiser, averaged weights and the step; restores them when the run continues."""

    def __init__(self, **parts):
        self.parts = parts
        self.step = 0
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as folder:
                state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu")
            self.step = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def save(self, step: int, metrics: dict):
        if ray.train.get_context().get_world_rank() != 0:
            return ray.train.report(metrics)
        with tempfile.TemporaryDirectory() as folder:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            torch.save({"step": step, **state}, Path(folder) / "state.pt")
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


class _Progress:
    """The log of rank 0: a line in `<phase>.jsonl` every 20 steps, a line on the terminal every 100 steps."""

    def __init__(self, folder: str | Path, phase: str, start: int, total: int):
        self.path, self.phase, self.start, self.total = Path(folder) / f"{phase}.jsonl", phase, start, total
        self.began = time.monotonic()
        self.active = ray.train.get_context().get_world_rank() == 0

    def step(self, step: int, **values: torch.Tensor):
        if not self.active or step % 20:
            return
        values = {name: float(value) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if step % 100 == 0:
            left = (self.total - step) * (time.monotonic() - self.began) / (step - self.start) / 60
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"{self.phase} {step}/{self.total}: {shown}, {left:.0f} min left", flush=True)


def _pixel_loss(reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 + L2 loss of images (n, 3, h, w) in [-1, 1], with a higher weight for pixels that are not background."""
    error = reconstruction - x
    background = x.new_tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    drawn = 1 + 2.0 * ((x - background).abs().amax(1, keepdim=True) > 0.1)
    return (drawn * (error.abs() + error.square())).mean()


class _AutoencoderLoss(torch.nn.Module):
    """Pixel loss plus a small KL term: images -> loss."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(x).latent_dist
        return _pixel_loss(self.vae.decode(posterior.sample()).sample, x) + self.kl_weight * posterior.kl().mean()


class _DecoderLoss(torch.nn.Module):
    """Pixel loss plus L1 loss of the differences between neighbouring pixels, which makes stripes and dots sharp."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = self.vae.encode(x).latent_dist.sample()
        y = self.vae.decode(latents).sample
        edges = sum((y.diff(dim=axis) - x.diff(dim=axis)).abs().mean() for axis in (2, 3))
        return _pixel_loss(y, x) + edges


def train_vae(settings: dict):
    """Worker loop: train the autoencoder."""
    config, folder = PretrainConfig(**settings["config"]), settings["folder"]
    torch.set_num_threads(config.threads_per_worker)
    torch.manual_seed(config.seed)
    vae = model.build_vae().to(get_device())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=1e-4)
    checkpoints = _Checkpoints(vae=vae, optimizer=optimizer)
    objective = prepare_model(_AutoencoderLoss(vae, config.kl_weight))
    batch_size = config.vae_batch_size // ray.train.get_context().get_world_size()
    indices = range(checkpoints.step * batch_size, config.vae_steps * batch_size)
    batches = _batches(_draw_image, config, 0, indices, batch_size)
    progress = _Progress(folder, "vae", checkpoints.step, config.vae_steps)
    for step, images in enumerate(batches, checkpoints.step):
        for group in optimizer.param_groups:
            group["lr"] = config.vae_learning_rate * learning_rate_factor(step, config.vae_steps)
        loss = objective(_to_tensor(images))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.step(step + 1, loss=loss)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.vae_steps:
            checkpoints.save(step + 1, {"loss": loss.item()})
    if ray.train.get_context().get_world_rank() == 0:
        _set_scaling_factor(vae, config)
        vae.save_pretrained(Path(folder) / "vae")


def train_decoder(settings: dict):
    """Worker loop: train only the decoder, so that the latents do not change."""
    config, folder = PretrainConfig(**settings["config"]), Path(settings["folder"])
    torch.set_num_threads(config.threads_per_worker)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(get_device())
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.decoder_learning_rate, weight_decay=1e-4)
    checkpoints = _Checkpoints(vae=vae, optimizer=optimizer)
    objective = prepare_model(_DecoderLoss(vae))
    context = ray.train.get_context()
    batch_size = config.vae_batch_size // context.get_world_size()
    indices = range(checkpoints.step * batch_size, config.decoder_steps * batch_size)
    batches = _batches(model.draw_textured, config, 3, indices, batch_size)
    progress = _Progress(folder, "decoder", checkpoints.step, config.decoder_steps)
    for step, images in enumerate(batches, checkpoints.step):
        for group in optimizer.param_groups:
            group["lr"] = config.decoder_learning_rate * learning_rate_factor(step, config.decoder_steps)
        loss = objective(_to_tensor(images))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        progress.step(step + 1, loss=loss)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.decoder_steps:
            checkpoints.save(step + 1, {"loss": loss.item()})
    if context.get_world_rank() == 0:
        vae.save_pretrained(folder / "vae-refined")


@torch.no_grad()
def _set_scaling_factor(vae: AutoencoderKL, config: PretrainConfig):
    """Set the scaling factor, with which latents have unit variance (Rombach et al. 2022, section G)."""
    images = _batches(_draw_image, config, 2, range(512), 64)
    latents = torch.cat([vae.encode(_to_tensor(batch)).latent_dist.mode() for batch in images])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def _cached_pairs(config: PretrainConfig, folder: Path, vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """This worker's share of the pairs as token ids and latents, drawn and encoded once. They are stored on disk in
    pieces, so that drawing can resume too."""
    context, tokenizer = ray.train.get_context(), model.build_tokenizer()
    count, pieces = config.pairs // context.get_world_size(), []
    for start in range(0, count, _PIECE):
        indices = range(start, min(start + _PIECE, count))
        path = folder / f"pairs-{context.get_world_rank()}-of-{context.get_world_size()}-{start}-{indices.stop}.pt"
        if not path.exists():
            captions, latents = [], []
            for batch in _batches(model.draw_pair, config, 1, indices, 500):
                texts, images = zip(*batch, strict=True)
                captions += texts
                encoded = vae.encode(_to_tensor(images)).latent_dist.mode()
                latents.append((encoded * vae.config.scaling_factor).half().cpu())
            ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
            torch.save({"ids": ids.short(), "latents": torch.cat(latents)}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        pieces.append(torch.load(path, weights_only=True))
    return {name: torch.cat([piece[name] for piece in pieces]).to(get_device()) for name in ("ids", "latents")}


def train_denoiser(settings: dict):
    """Worker loop: train text encoders and denoiser together; save the averaged weights."""
    config, folder = PretrainConfig(**settings["config"]), Path(settings["folder"])
    torch.set_num_threads(config.threads_per_worker)
    context = ray.train.get_context()
    data = _cached_pairs(config, folder, AutoencoderKL.from_pretrained(folder / "vae").to(get_device()))
    start = _start(config) if config.start_from else None
    training = DenoiserTraining(config, data, start, context.get_world_rank(), context.get_world_size())
    checkpoints = _Checkpoints(**training.parts)
    if config.use_gpu:  # without a CUDA graph, launching the many small kernels takes nearly four times as long
        training.loss = torch.cuda.make_graphed_callables(training.loss, training.draw(0))
    training.loss = prepare_model(training.loss)
    running = None
    progress = _Progress(folder, "denoiser", checkpoints.step, config.steps)
    for step in range(checkpoints.step, config.steps):
        loss, norm = training.step(step)
        running = loss if running is None else running.lerp(loss, 0.02)
        progress.step(step + 1, loss=running, grad_norm=norm)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            checkpoints.save(step + 1, {"loss": float(running)})
    if context.get_world_rank() == 0:
        save_pipeline(training, folder)


def save_pipeline(training: DenoiserTraining, folder: Path):
    """Write `folder`/model, a standard diffusers folder. Autoencoder and denoiser are stored in half precision."""
    refined = folder / "vae-refined"
    half_vae = AutoencoderKL.from_pretrained(refined if refined.exists() else folder / "vae", torch_dtype=torch.float16)
    half_vae.register_to_config(_name_or_path="shapes")  # do not store a local path
    training.pipeline(half_vae).save_pretrained(folder / "model")


def _start(config: PretrainConfig) -> DiffusionPipeline:
    """The pipeline that training continues from, in single precision."""
    return load_denoiser(config.start_from, dtype="float32", device="cpu").pipeline


def pretrain(config: PretrainConfig, folder: Path) -> Path:
    """Start or continue training in `folder`; return the path of the finished diffusers folder."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if config.start_from and not (folder / "vae-refined").exists():
        vae = _start(config).vae
        vae.save_pretrained(folder / "vae")
        vae.save_pretrained(folder / "vae-refined")
    for name, loop, done in (
        ("vae", train_vae, folder / "vae" / "config.json"),
        ("decoder", train_decoder, folder / "vae-refined" / "config.json"),
        ("denoiser", train_denoiser, None),
    ):
        if done is None or not done.exists():
            TorchTrainer(
                loop,
                train_loop_config={"config": config.model_dump(), "folder": str(folder)},
                scaling_config=ScalingConfig(
                    num_workers=config.num_workers,
                    use_gpu=config.use_gpu,
                    resources_per_worker={"CPU": config.threads_per_worker, "GPU": int(config.use_gpu)},
                ),
                run_config=RunConfig(
                    name=name,
                    storage_path=str(folder / "ray"),
                    failure_config=FailureConfig(max_failures=3),
                    checkpoint_config=CheckpointConfig(num_to_keep=2),
                ),
            ).fit()
    return folder / "model"
