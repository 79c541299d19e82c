from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mi_ray.config.section import ConfigError
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.flows import FlowSchedule, FlowTimes
from mi_ray.storage import tables
from mi_ray.training.training_set import (
    TrainingSet,
    draw_microbatch,
    read_training_set,
    sample_indices,
    trained_timesteps,
    weighted_levels,
)


@pytest.mark.parametrize(("count", "batch_size", "accumulation"), [(7, 2, 6), (12, 3, 2), (2, 5, 2)])
def test_every_epoch_has_each_sample_once(count, batch_size, accumulation):
    microbatches = range(count * accumulation)  # a whole number of epochs
    drawn = torch.cat([sample_indices(5, m, batch_size, count) for m in microbatches]).view(-1, count)
    assert all(Counter(epoch) == Counter(range(count)) for epoch in drawn.tolist())
    assert count < 5 or not torch.equal(drawn[0], drawn[1])


def test_prompt_dropout_uses_the_null_prompt_and_keeps_weights():
    count = 20
    data = TrainingSet(
        rows=torch.arange(count),
        count=count,
        latents=torch.arange(count).float().view(-1, 1, 1, 1),
        weights=torch.arange(count) / 10,
        prompts=torch.arange(count),
        conditioning=Conditioning({"embeds": torch.arange(count + 1).float()}),
    )
    batches = [draw_microbatch(data, 0, m, 50, range(1000), 0.3) for m in range(40)]
    latents, noise, timesteps, weights = (
        torch.cat([getattr(batch, name) for batch in batches]).flatten()
        for name in ("x0", "noise", "timesteps", "weights")
    )
    embeds = Conditioning.cat(batch.conditioning for batch in batches)["embeds"]
    dropped = embeds == count
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)  # 2000 draws: 5 standard errors
    assert torch.equal(embeds[~dropped], latents[~dropped])
    assert torch.equal(weights, latents / 10)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert timesteps.min() < 20
    assert timesteps.max() > 980


def test_only_needed_samples_are_read(tiny_pipeline, tmp_path):
    denoiser, count = load_denoiser(str(tiny_pipeline)), 60
    shape = list(denoiser.latent_shape)
    rows = {
        "prompt_id": [str(row) for row in range(count)],
        "prompt": [f"{row % 50} stars" for row in range(count)],
        "latents": [np.full(np.prod(shape), row, np.float16) for row in range(count)],
        "latents_shape": [shape] * count,
        "weight": [float(row) for row in range(count)],
    }
    columns = {name: rows.get(name, [None] * count) for name in tables.SELECTED.names}
    uri = str(tmp_path / "selected.parquet")
    pq.write_table(pa.table(columns, schema=tables.SELECTED), uri, row_group_size=7)
    microbatches, batch_size = 4, 3
    some, whole = (read_training_set(uri, denoiser, 5, drawn) for drawn in (microbatches * batch_size, 10**6))
    assert (len(some.latents), len(whole.latents), some.count) == (12, count, count)
    with pytest.raises(ValueError, match=r"holds latents of shape \(4, 8, 8\); the model has latents \(4, 12, 8\)"):
        read_training_set(uri, load_denoiser(str(tiny_pipeline), size=(96, None)), 5, 4)
    assert len(some.conditioning) <= 13
    for microbatch in range(microbatches):
        batches = [draw_microbatch(data, 5, microbatch, batch_size, range(1000), 0.3) for data in (some, whole)]
        for name in ("x0", "noise", "timesteps", "conditioning", "weights"):
            found, expected = (getattr(batch, name) for batch in batches)
            if name == "conditioning":
                found, expected = found["embeds"], expected["embeds"]
            torch.testing.assert_close(found, expected)


def test_timesteps_are_limited_by_log_snr():
    log_snr = torch.tensor([3.0, 1.0, 0.0, -4.0])
    assert trained_timesteps(log_snr, None) == range(4)
    assert trained_timesteps(log_snr, 0.0) == range(2, 4)
    with pytest.raises(ConfigError, match=r"finetune.log_snr_max: -5.0 is below"):
        trained_timesteps(log_snr, -5.0)


def test_logit_normal_timesteps_follow_the_levels_of_the_scheduler():
    """u = sigmoid(N(0, 1)), r = 1 - u, and s = 3 r / (1 + 2 r) with shift 3 (Esser et al. 2024, eq. 19 and 23)."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    schedule = FlowSchedule.from_config(config, FlowTimes(), (4, 8, 8))
    levels = weighted_levels(schedule, range(1, 1000), "logit-normal")
    assert weighted_levels(schedule, range(1, 1000), "uniform") is None
    conditioning = Conditioning({"embeds": torch.zeros(2, 1, 1)})
    data = TrainingSet(torch.arange(4), 4, torch.zeros(4, 1, 1, 1), torch.ones(4), torch.zeros(4).long(), conditioning)
    drawn = draw_microbatch(data, 0, 0, 20000, range(1, 1000), 0.0, levels).timesteps.double()
    for probability, logit in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        r = 1 / (1 + np.exp(-logit))  # the quantile of r, as the density is symmetric
        assert drawn.quantile(probability) == pytest.approx(1000 * 3 * r / (1 + 2 * r), abs=8)
    limited = weighted_levels(schedule, range(400, 1000), "logit-normal")
    assert limited.min() >= 400
    assert limited.max() == levels.max()
