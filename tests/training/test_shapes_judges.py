"""Training of the judges with a few steps: deterministic, continued after an interruption, loaded by the metrics."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mi_ray.alignment.metric import load_metrics, measure
from mi_ray.training import shapes_judges
from mi_ray.training.shapes_judges import JudgeConfig, train_judge

SMALL = {"groups": 6, "steps": 5, "images": 8, "questions": 2, "checkpoint_every": 2, "bfloat16": False}


@pytest.mark.parametrize(("judge", "metric"), [("blip", "blip-vqa"), ("clip", "clip-score")])
def test_training_continues_from_its_checkpoint_with_the_same_weights(tmp_path, monkeypatch, judge, metric):
    config = JudgeConfig(judge=judge, **SMALL)
    whole = train_judge(config, tmp_path / "whole")
    batch = shapes_judges._batch

    def interrupted(config, pool, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(config, pool, step)

    monkeypatch.setattr(shapes_judges, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_judge(config, tmp_path / "stopped")
    assert torch.load(tmp_path / "stopped" / f"{judge}.pt")["step"] == 2
    monkeypatch.setattr(shapes_judges, "_batch", batch)
    continued = train_judge(config, tmp_path / "stopped")
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, continued))
    assert {weight.dtype for weight in expected.values()} <= {torch.float16, torch.int64}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    (values,) = measure(load_metrics([f"{metric}@{continued}"]), images, ["a red circle", "two stars"]).values()
    assert len(values) == 2


def test_the_loss_of_the_contrast_leaves_out_pairs_that_are_also_right():
    """With equal embeddings the loss is the logarithm of the number of captions that count."""
    config = JudgeConfig(judge="clip", **SMALL)
    training = shapes_judges._Training(config, shapes_judges.judges.build_tokenizer())
    with torch.no_grad():
        training.judge.logit_scale.fill_(-20.0)
    truth = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    truth[0, 0, 1:] = True  # the first image is right for all captions of its group
    texts, labels = ["a red circle"] * 8, torch.zeros(8, 64, 6, dtype=torch.long)
    loss = training.clip(torch.zeros(8, 3, 64, 64), texts, truth, labels)["loss"]
    of_images, of_captions = [5] + [8] * 7, [8, 7, 7, 7] + [8] * 4
    assert loss.item() == pytest.approx(np.mean(np.log(of_images) + np.log(of_captions)) / 2, abs=1e-4)
