"""The calibration job, run on the embedded model, and the use of its file by the pipeline."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from mi_ray.alignment.oracle import Oracle
from mi_ray.config import RunConfig
from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.inputs.labels import read_labels
from mi_ray.stages import calibrate as stage
from mi_ray.stages.calibrate import calibrate

ROOT = Path(__file__).parents[2]
SMOKE = ["--config", "jobs/configs/calibrate-smoke.yaml"]


@pytest.fixture
def config(tmp_path, monkeypatch) -> CalibrationConfig:
    monkeypatch.chdir(ROOT)
    # One thread: on busy cores, threads of one process wait for each other.
    flags = ["--threads", "1", "--out", str(tmp_path / "band.yaml")]
    return load_config([*SMOKE, *flags], model=CalibrationConfig)[0]


def test_pipeline_uses_the_calibrated_band(config, tmp_path, capsys):
    calibrate(config)
    output = capsys.readouterr().out
    found = yaml.safe_load((tmp_path / "band.yaml").read_text())
    arguments = ["--config", "jobs/configs/shapes-smoke.yaml", "--config", config.out, "--run-dir", "runs/x"]
    taken = load_config(arguments, model=RunConfig)[0].score
    assert (taken.log_snr_min, taken.log_snr_max) == (found["score"]["log_snr_min"], found["score"]["log_snr_max"])
    assert config.log_snr_min <= taken.log_snr_min < taken.log_snr_max <= config.log_snr_max
    assert re.search(r"the label-free band reaches \d+ % of the AUC of the band chosen by labels", output)
    assert (tmp_path / "band.yaml.bands.json").exists()


def test_range_outside_the_model_is_refused_and_a_wide_one_limited(config, monkeypatch):
    with pytest.raises(ConfigError, match=r"log_snr_max: .*outside the model's noise levels"):
        calibrate(config.model_copy(update={"log_snr_min": 20.0, "log_snr_max": 30.0}), dry_run=True)
    pool = torch.rand(4, 3, config.levels, 2), torch.tensor([0, 0, 1, 1]), None
    monkeypatch.setattr(stage, "probed_pool", lambda *arguments: pool)
    calibrate(config.model_copy(update={"log_snr_min": -50.0, "alignment": None}))
    assert yaml.safe_load(Path(config.out).read_text())["score"]["log_snr_min"] > -6


def test_overlong_prompt_is_reported(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n" + "a red circle and " * 20 + "a star\n")
    prompts = config.prompts.model_copy(update={"file": str(tmp_path / "prompts.txt"), "limit": None})
    with pytest.raises(ConfigError, match="overlong"):
        calibrate(config.model_copy(update={"prompts": prompts, "alignment": None}), dry_run=True)


def test_equal_labels_are_ignored_or_refused(config, monkeypatch, capsys):
    pool = torch.rand(4, 3, config.levels, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, False])
    monkeypatch.setattr(stage, "probed_pool", lambda *arguments: pool)
    calibrate(config)
    assert "the labels are ignored" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="use_labels: no prompt"):
        calibrate(config.model_copy(update={"use_labels": True}))


def test_labels_of_a_file_equal_labels_of_the_oracle(config, tmp_path, capsys):
    """The pool is written, labelled with the same oracle, and the labels are used."""
    pool, file, table = tmp_path / "pool", tmp_path / "labels.jsonl", tmp_path / "labels.parquet"
    calibrate(config.model_copy(update={"pool": str(pool)}))
    by_oracle = capsys.readouterr().out
    lines = pd.read_json(pool / "pool.jsonl", lines=True)
    assert len(lines) == 6 * 4
    images = np.stack([Image.open(pool / name) for name in lines["image"]])
    lines["label"] = Oracle().measure(images, lines["prompt"].tolist())["exact"]
    lines = lines.sample(frac=1, random_state=0)
    lines.to_json(file, orient="records", lines=True)
    lines.to_parquet(table)
    digest = lines["pool"][0]
    assert read_labels(str(file), digest) == read_labels(str(table), digest)
    calibrate(config.model_copy(update={"alignment": None, "labels": str(file)}))
    own = capsys.readouterr().out
    reported = [line for line in by_oracle.splitlines() if line.startswith(("label", "the label"))]
    assert len(reported) == 3
    assert reported == [line for line in own.splitlines() if line.startswith(("label", "the label"))]
    with pytest.raises(ConfigError, match="labels another pool"):
        calibrate(config.model_copy(update={"alignment": None, "labels": str(file), "seed": 1}))


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (None, "does not exist"),
        ("", "has no label for a candidate of these prompts"),
        ('{"prompt_id": "a", "candidate_index": 0, "label": 1}', "has no label for a candidate of these prompts"),
        ('{"prompt_id": "a", "label": 1}', "no field 'candidate_index'"),
        ('{"prompt_id": "a", "candidate_index": 0}', "has no label for a candidate of these prompts"),
        ('{"prompt_id": "a", "candidate_index": 0, "label": "good"}', "could not convert"),
    ],
)
def test_invalid_labels_are_refused(config, tmp_path, content, reported):
    if content is not None:
        (tmp_path / "labels.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=f"labels: .*{reported}"):
        calibrate(config.model_copy(update={"alignment": None, "labels": str(tmp_path / "labels.jsonl")}))


def test_pool_with_labels_is_not_overwritten(config):
    with pytest.raises(ConfigError, match="pool and labels are both set"):
        load_config(
            [*SMOKE, "--alignment=none", "--pool", "pool", "--labels", "pool/pool.jsonl"], model=CalibrationConfig
        )
