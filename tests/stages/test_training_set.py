from collections import Counter

import pytest
import torch

from mi_ray.section import ConfigError
from mi_ray.stages.training_set import TrainingSet, draw_microbatch, sample_indices, trained_timesteps


@pytest.mark.parametrize(("count", "batch_size", "accumulation"), [(7, 2, 6), (12, 3, 2), (2, 5, 2)])
def test_every_epoch_holds_each_sample_once(count, batch_size, accumulation):
    microbatches = range(count * accumulation)  # a whole number of epochs
    drawn = torch.cat([sample_indices(5, m, batch_size, count) for m in microbatches]).view(-1, count)
    assert all(Counter(epoch) == Counter(range(count)) for epoch in drawn.tolist())
    assert count < 5 or not torch.equal(drawn[0], drawn[1])


def test_prompt_dropout_takes_the_null_prompt_and_weights_follow_their_samples():
    count = 20
    data = TrainingSet(
        latents=torch.arange(count).float().view(-1, 1, 1, 1),
        weights=torch.arange(count) / 10,
        prompts=torch.arange(count),
        embeddings=torch.arange(count + 1).float().view(-1, 1, 1),
    )
    batches = [draw_microbatch(data, 0, m, 50, range(1000), 0.3) for m in range(40)]
    latents, noise, timesteps, embeddings, weights = (
        torch.cat(parts).flatten() for parts in zip(*batches, strict=True)
    )
    dropped = embeddings == count
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)  # 2000 draws: 5 standard errors
    assert torch.equal(embeddings[~dropped], latents[~dropped])
    assert torch.equal(weights, latents / 10)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert timesteps.min() < 20
    assert timesteps.max() > 980


def test_only_timesteps_up_to_a_log_snr_are_trained():
    log_snr = torch.tensor([3.0, 1.0, 0.0, -4.0])
    assert trained_timesteps(log_snr, None) == range(4)
    assert trained_timesteps(log_snr, 0.0) == range(2, 4)
    with pytest.raises(ConfigError, match=r"finetune.log_snr_max: -5.0 is below"):
        trained_timesteps(log_snr, -5.0)
