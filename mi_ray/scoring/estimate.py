"""Estimates of memory, speed and cost on GPUs from a model's configuration. Nothing here is measured.

    memory = weights + activations(rows) + candidates
    weights      numbers of all parts x bytes of the dtype; an autoencoder with force_upcast is in fp32
    activations  peak of live tensors in one denoiser batch, counted (`diffusion.footprint`)
    candidates   `_STATES` fp32 latents per candidate
    seconds per evaluation = floating-point operations / (`EFFICIENCY` x peak of the card)

Where the text encoders do not fit beside the network, they are left out: they leave the GPU after encoding.
"""

import math
import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from mi_ray.config import FinetuneConfig, ModelConfig, RunConfig
from mi_ray.diffusion.denoisers import dtype_of
from mi_ray.diffusion.folders import (
    load_encoders_on_meta,
    load_network_on_meta,
    load_sizes,
    model_family,
    prompt_length,
    weights_are_here,
)
from mi_ray.diffusion.footprint import Counted, CountedTraining, count, count_training, stored_numbers

GIB = 2**30
USABLE = 0.9  # of a card's memory; the rest is for the CUDA context, workspaces and fragmentation
EFFICIENCY = 0.27  # of a card's peak: Stable Diffusion 1.5 in fp16 on one H100 (README, "Speed"), 3.0 ms of 0.803 TFLOP
_STATES = 6  # latents of a candidate: x_t, x0 of two steps, noise, both predictions
_FP32 = 4


@dataclass(frozen=True)
class Card:
    """A GPU, from its maker's data sheet. Peaks in TFLOP/s, dense."""

    name: str
    memory: int  # GB
    half: float  # fp16 and bf16 with fp32 accumulation, tensor cores
    single: float  # fp32


CARDS = (
    Card("RTX 4090", 24, 165.2, 82.6),
    Card("L40S", 48, 362, 91.6),
    Card("H100 SXM", 80, 989, 66.9),
    Card("H200", 141, 989, 66.9),
)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model. Numbers are parameters and stored buffers."""

    network: int
    encoders: int
    autoencoder: int
    upcast: bool  # the autoencoder runs in fp32
    dtype: str  # on a GPU
    image_size: tuple[int, int]
    latent_shape: tuple[int, ...]
    own_latent_shape: tuple[int, ...]
    counted: Counted | None  # None: the family cannot be counted
    training: CountedTraining | None

    def weights(self, dtype: str, encoders: bool = True) -> int:
        """Bytes of the weights, with or without the text encoders."""
        size = getattr(torch, dtype).itemsize
        beside = self.autoencoder * (_FP32 if self.upcast else size)
        return (self.network + self.encoders * encoders) * size + beside

    def largest(self, card: Card, fixed: int, each: float) -> tuple[int, bool]:
        """The largest number of rows, and whether the text encoders fit beside them. 0: not even one row fits."""
        for encoders in (True, False):
            free = USABLE * card.memory * GIB - self.weights(self.dtype, encoders) - fixed
            if free >= each:
                return int(free / each), encoders
        return 0, False

    def largest_batch(self, card: Card) -> tuple[int, bool]:
        """Candidates in a denoiser batch of this image size, with both branches; see `largest`."""
        states = _STATES * _FP32 * math.prod(self.latent_shape)
        return self.largest(card, 0, 2 * self.counted.activations + states)

    def largest_training_batch(self, card: Card) -> tuple[int, bool]:
        """Rows of a fine-tuning batch; see `largest`."""
        return self.largest(card, self.training.state, self.training.activations)

    def seconds(self, card: Card) -> float:
        """The time of one denoiser evaluation."""
        peak = card.single if self.dtype == "float32" else card.half
        return self.counted.flops / (EFFICIENCY * peak * 1e12)


@lru_cache(maxsize=8)
def model_sizes(model: ModelConfig, tuning: FinetuneConfig) -> ModelSizes:
    """Read and count the configuration of a model; no weights are read.

    Raises:
        ValueError: the model lacks a configuration, or the hub cannot be asked.
    """
    path, family = model.path, model_family(model.path)
    network, parts, sizes = load_network_on_meta(path), load_encoders_on_meta(path), load_sizes(path)
    autoencoder = parts.pop("vae")
    dtype = dtype_of(model.dtype, family, on_gpu=True)
    channels, image_size = family.channels(network.config), sizes.image(*model.size)
    latent_shape, numbers = (channels, *sizes.latent(image_size)), stored_numbers(network)
    arguments = family, network, latent_shape, prompt_length(path), getattr(torch, dtype)
    counted = count(*arguments)
    training = count_training(*arguments, tuning.adapter_settings, tuning.activation_checkpointing)
    return ModelSizes(
        network=numbers,
        encoders=sum(map(stored_numbers, parts.values())),
        autoencoder=stored_numbers(autoencoder),
        upcast=bool(getattr(autoencoder.config, "force_upcast", False)),
        dtype=dtype,
        image_size=image_size,
        latent_shape=latent_shape,
        own_latent_shape=(channels, *sizes.latent(sizes.own)),
        counted=counted,
        training=training,
    )


def why_not_measured(model: ModelConfig, sizes: ModelSizes) -> str | None:
    """Why the speed of a model cannot be measured on this machine; None: it can."""
    if not weights_are_here(model.path):
        return "the weights are not on this machine"
    if torch.cuda.is_available():
        dtype, memory = sizes.dtype, torch.cuda.mem_get_info()[1]
    else:
        dtype = dtype_of(model.dtype, model_family(model.path), on_gpu=False)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = sizes.weights(dtype)
    if needed > USABLE * memory:
        return f"the weights take {needed / GIB:.1f} GiB in {dtype}, and this machine has {memory / GIB:.1f} GiB"
    return None


def _bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def estimate(config: RunConfig, counts: dict[str, int]) -> list[str]:
    """Lines for a dry run: memory by dtype, and for each card the largest batches, time and cost.

    Args:
        counts: denoiser evaluations of each stage, `runs.cost.evaluations`.
    """
    sizes = model_sizes(config.model, config.finetune)
    memory = ", ".join(f"{_bytes(sizes.weights(dtype))} in {dtype}" for dtype in ("float32", sizes.dtype))
    lines = [f"weights       {memory}; {_bytes(sizes.weights(sizes.dtype, False))} without text encoders"]
    if config.metrics:
        judges, alone = config.resources.judge_actors, "every generating actor, which loads their models too"
        by = f"{judges} judges" if judges else f"{alone}; resources.judge_actors separates them"
        lines.append(f"metrics       {', '.join(config.metrics)}: measured by {by}")
    if sizes.counted is None:
        return [*lines, "estimates     none: the activations of this model family cannot be counted"]
    lines += [
        f"estimates     counted from the configuration, not measured; {sizes.dtype},"
        f" {sizes.counted.flops / 1e9:,.1f} GFLOP per evaluation,"
        f" {_bytes(sizes.counted.activations)} of activations per row",
        f"  {'card':<18}{'candidates':>11}{'training rows':>15}{'ms/evaluation':>15}{'GPU-hours':>11}",
    ]
    price, total, without = config.resources.price_per_gpu_hour, sum(counts.values()), False
    lines[-1] += "" if price is None else f"{'cost':>12}"
    for card in CARDS:
        cells = []
        for largest, width in ((sizes.largest_batch(card), 11), (sizes.largest_training_batch(card), 15)):
            rows, encoders = largest
            without |= rows > 0 and not encoders
            cells.append(f"{'none' if not rows else f'{rows}' if encoders else f'{rows}*':>{width}}")
        seconds = sizes.seconds(card)
        hours = total * seconds / 3600
        cost = "" if price is None else f"{hours * price:>12,.2f}"
        name = f"{card.name}, {card.memory} GB"
        lines.append(f"  {name:<18}{''.join(cells)}{1e3 * seconds:>15.3g}{hours:>11,.3g}{cost}")
    if without:
        lines.append("  * without the text encoders, which leave the GPU after encoding")
    return lines
