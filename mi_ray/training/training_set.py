"""The training set of fine-tuning: the kept candidates, and the samples, timesteps and noise of each microbatch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mi_ray.config import RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.diffusion.flows import FlowSchedule
from mi_ray.storage import ParquetRows
from mi_ray.training.losses import Batch

ENCODED_AT_ONCE = 1024  # prompts per call of the text encoder; the conditioning is then moved to the CPU


@dataclass(frozen=True)
class TrainingSet:
    """The kept candidates that a training run uses, encoded once and held in memory.

    rows: (n,) row numbers in the table of `count` rows, ascending.
    latents: (n, *latent_shape) fp32.
    weights: (n,) weights in the loss.
    prompts: (n,) row of `conditioning` for each sample.
    conditioning: one row per distinct prompt; the last row is the null prompt.
    """

    rows: Tensor
    count: int
    latents: Tensor
    weights: Tensor
    prompts: Tensor
    conditioning: Conditioning


def read_training_set(uri: str, denoiser: Denoiser, seed: int, drawn: int) -> TrainingSet:
    """Read the rows that a training run uses from a table of schema `tables.SELECTED`, and encode the distinct prompts.

    Args:
        drawn: number of samples that the run draws. If it is less than the number of rows, only these are read, and
            memory does not depend on the length of the table.

    Raises:
        ValueError: the table has no rows, or the shape of its latents is not that of the model.
    """
    source = ParquetRows(uri)
    count = len(source)
    rows = torch.arange(count) if drawn >= count else _permutation(seed, 0, count)[:drawn].sort().values
    columns, parts, start = ["prompt", "latents", "latents_shape", "weight"], [], 0
    for batch in source.batches(columns, size=1024):
        first, last = torch.searchsorted(rows, torch.tensor([start, start + len(batch)])).tolist()
        if last > first:
            parts.append(batch.take(pa.array(rows[first:last].numpy() - start)))
        start += len(batch)
    shapes = {tuple(shape) for part in parts for shape in part["latents_shape"].to_pylist()}
    if shapes != {tuple(denoiser.latent_shape)}:
        found = ", ".join(map(str, sorted(shapes))) or "no rows"
        raise ValueError(
            f"{uri} holds latents of shape {found}; the model has latents {tuple(denoiser.latent_shape)}; use the model"
            " that generated the table"
        )
    table = pa.Table.from_batches(parts)
    # Part by part: one Arrow list column holds at most 2**31 numbers.
    latents = np.concatenate([part["latents"].flatten().to_numpy(zero_copy_only=False) for part in parts])
    texts = table["prompt"].to_pylist()
    distinct = list(dict.fromkeys(texts))
    numbers = {text: number for number, text in enumerate(distinct)}
    distinct.append("")
    chunks = [distinct[i : i + ENCODED_AT_ONCE] for i in range(0, len(distinct), ENCODED_AT_ONCE)]
    return TrainingSet(
        rows=rows,
        count=count,
        latents=torch.from_numpy(latents).float().view(-1, *denoiser.latent_shape),
        weights=torch.tensor(table["weight"].to_pylist()),
        prompts=torch.tensor([numbers[text] for text in texts]),
        conditioning=Conditioning.cat(denoiser.encode_prompts(chunk).cpu() for chunk in chunks),
    )


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=_generator("order", seed, epoch))


def sample_indices(seed: int, microbatch: int, batch_size: int, count: int) -> Tensor:
    """Indices (batch_size,) among `count` samples of the run's microbatch number `microbatch`.

    Each epoch is a permutation of the samples. The permutations are joined into one sequence, and microbatches are
    consecutive pieces of it, so every epoch uses each sample once. Of the microbatches of an optimiser step, rank r
    takes number r, r + workers, and so on: the samples of a step do not depend on the number of workers.
    """
    positions = range(microbatch * batch_size, (microbatch + 1) * batch_size)
    return torch.stack([_permutation(seed, i // count, count)[i % count] for i in positions])


def draw_microbatch(
    data: TrainingSet,
    seed: int,
    microbatch: int,
    batch_size: int,
    timesteps: range,
    prompt_dropout: float,
    levels: Tensor | None = None,
) -> Batch:
    """Draw a microbatch: a pure function of (seed, microbatch).

    Args:
        timesteps: that are drawn uniformly, if there are no levels.
        levels: (L,) timesteps in the order of their noise, whose place is drawn from a logit-normal density.
    """
    chosen = torch.searchsorted(data.rows, sample_indices(seed, microbatch, batch_size, data.count))
    generator = _generator("noise", seed, microbatch)
    latents = data.latents[chosen]
    noise = torch.randn(latents.shape, generator=generator)
    if levels is None:
        drawn = torch.randint(timesteps.start, timesteps.stop, (batch_size,), generator=generator)
    else:
        drawn = levels[(torch.randn(batch_size, generator=generator).sigmoid() * len(levels)).long()]
    dropped = torch.rand(batch_size, generator=generator) < prompt_dropout
    prompts = torch.where(dropped, len(data.conditioning) - 1, data.prompts[chosen])
    return Batch(latents, noise, drawn, data.conditioning.rows(prompts), data.weights[chosen])


def trained_timesteps(log_snr: Tensor, log_snr_max: float | None) -> range:
    """The timesteps with a log SNR of at most `log_snr_max`; None: all timesteps that have noise.

    Args:
        log_snr: (T,) decreasing, of all timesteps.

    Raises:
        ConfigError: there is no such timestep.
    """
    first = int((log_snr.isposinf() if log_snr_max is None else log_snr > log_snr_max).sum())
    if first == len(log_snr):
        lowest = float(log_snr[-1])
        raise ConfigError(
            [
                f"finetune.log_snr_max: {log_snr_max} is below every log SNR of the model; set at least {lowest:.2f},"
                " the lowest one"
            ]
        )
    return range(first, len(log_snr))


def weighted_levels(schedule: FlowSchedule, timesteps: range, density: str) -> Tensor | None:
    """The trained noise levels of a flow for a logit-normal density, see `draw_microbatch`. None: a uniform density."""
    if density == "uniform":
        return None
    levels = schedule.training_timesteps
    return levels[(levels >= timesteps.start) & (levels < timesteps.stop)]


class KeptCandidates:
    """The batches of every optimiser step for training on kept candidates: a `Source` of the loop."""

    def __init__(
        self,
        data: TrainingSet,
        config: RunConfig,
        timesteps: range,
        device: torch.device,
        levels: Tensor | None = None,
    ):
        self.data, self.seed, self.tuning = data, config.seed, config.finetune
        self.timesteps, self.device, self.steps = timesteps, device, config.finetune.steps
        self.levels = levels

    def _draw(self, microbatch: int) -> Batch:
        tuning = self.tuning
        drawn = self.data, self.seed, microbatch, tuning.batch_size, self.timesteps, tuning.prompt_dropout, self.levels
        return draw_microbatch(*drawn).to(self.device)

    def open(self, step: int) -> bool:
        return True

    def parts(self, step: int, rank: int, workers: int) -> list[tuple[Callable[[], Batch], float]]:
        each = self.tuning.gradient_accumulation
        turns = range(step * each + rank, (step + 1) * each, workers)
        return [(lambda turn=turn: self._draw(turn), workers / each) for turn in turns]

    def close(self, step: int) -> dict[str, float]:
        return {}

    def due(self, step: int) -> bool:
        return (step + 1) % self.tuning.checkpoint_every == 0

    def probe(self) -> Batch:
        return self._draw(0)

    def state(self) -> dict:
        return {}

    def load(self, state: dict, lines: list[dict]):
        pass
