"""Features of a named encoder, and the kernel distance and diversity that the report computes from them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny_detectors import save_dinov2
from transformers import Dinov2Model

from mi_ray.alignment.encoder import Encoder, OwnLatents, check_encoder, load_encoder
from mi_ray.alignment.metric import Unusable
from mi_ray.config import RunConfig
from mi_ray.report.statistics import cosine_diversity, kernel_distance
from mi_ray.report.summary import _quality
from mi_ray.storage import write_table
from mi_ray.storage.tables import evaluation_schema

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)


def test_features_are_the_class_token_of_dinov2(tmp_path):
    """The short side is 32 pixels, bicubic; then the central 28 x 28."""
    folder = save_dinov2(tmp_path)
    model = Dinov2Model.from_pretrained(folder).eval()
    expected = []
    for image in IMAGES:
        scaled = np.asarray(Image.fromarray(image).resize((53, 32), Image.Resampling.BICUBIC))[2:30, 12:40] / 255
        pixels = torch.tensor((scaled - (0.485, 0.456, 0.406)) / np.array((0.229, 0.224, 0.225)))
        with torch.no_grad():
            hidden = model(pixel_values=pixels.permute(2, 0, 1)[None].float()).last_hidden_state
        expected.append(hidden[0, 0].numpy())
    encoder = Encoder(str(folder))
    encoder.batch_size = 2
    np.testing.assert_allclose(encoder.features(IMAGES), expected, atol=1e-4)
    assert (encoder.column.model, encoder.column.revision) == (str(folder), encoder.revision)


def test_without_a_name_the_latents_are_the_features():
    encoder = load_encoder(None, lambda images: torch.from_numpy(images).permute(0, 3, 1, 2))
    assert isinstance(encoder, OwnLatents)
    assert encoder.features(IMAGES).shape == (3, 2 * 16 * 3)


def test_a_missing_encoder_is_told_before_a_run(tmp_path):
    check_encoder(None)
    with pytest.raises(Unusable, match=r"is neither an existing folder nor a hub id|needs weights"):
        check_encoder(str(tmp_path / "none"))


def test_statistics_of_raw_features():
    """KID's kernel on features as they are, and 1 - cosine by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(1, 1, size=(6, 4))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    own = sum((k.sum() - np.trace(k)) / 30 for k in (kernel(x, x), kernel(y, y)))
    assert kernel_distance(x, y, standard=False) == pytest.approx(own - 2 * kernel(x, y).mean())
    features = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 1.0]])
    ids = np.array(["a", "a", "b", "b"])
    assert cosine_diversity(features, ids) == pytest.approx((1 + 0) / 2)
    assert cosine_diversity(features[:1], ids[:1]) is None


def test_report_uses_the_named_encoder(tmp_path: Path):
    rng = np.random.default_rng(1)
    column = Encoder(str(save_dinov2(tmp_path / "dino"))).column
    features = {"base": rng.normal(1, 1, (8, 4)), "tuned": rng.normal(0, 1, (8, 4))}
    for model, of_model in features.items():
        rows = [{"prompt_id": f"p{i // 2}", "seed": i, "features": f} for i, f in enumerate(of_model.tolist())]
        table = pa.Table.from_pylist(rows, evaluation_schema({}, column))
        write_table(str(tmp_path / "run" / "evaluation" / model / "part-0.parquet"), table)
    quality = _quality(str(tmp_path / "run"), ["base", "tuned"], None)
    single = {model: of_model.astype(np.float32).astype(float) for model, of_model in features.items()}
    ids = np.repeat(["p0", "p1", "p2", "p3"], 2)
    assert quality["tuned"]["kernel_distance"] == kernel_distance(single["tuned"], single["base"], standard=False)
    spread = {model: cosine_diversity(of_model, ids) for model, of_model in single.items()}
    assert quality["tuned"]["relative_diversity"] == pytest.approx(spread["tuned"] / spread["base"])
    assert quality["base"]["encoder"] == f"{column.model} ({column.revision})"


def test_the_hash_of_other_runs_is_stable():
    least = {"run_dir": "x", "prompts": {"file": "x"}}
    assert "encoder" not in RunConfig.model_validate(least).results_config()["evaluation"]
    named = RunConfig.model_validate({**least, "evaluation": {"encoder": "facebook/dinov2-base"}})
    assert named.results_config()["evaluation"]["encoder"] == "facebook/dinov2-base"
    assert named.hash() != RunConfig.model_validate(least).hash()
