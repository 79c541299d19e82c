"""The report of an online run, and of models that were evaluated at several guidance scales."""

import base64
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folder import GAMMA, GUIDED_SHARE, METRICS, STOPPED, UPDATES, online_config_of, write_online_run
from scipy import stats

from mi_ray.config import RunConfig
from mi_ray.report.guidance import SCALE, best_scale, guidance_section
from mi_ray.report.page import alignment_table, headline, previews, side_by_side, write_report
from mi_ray.report.summary import summarise
from mi_ray.storage import read_tables

EXACT = METRICS["oracle"][0]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    write_online_run(folder)
    return folder


@pytest.fixture(scope="module")
def config(run_dir):
    return online_config_of(run_dir)


@pytest.fixture(scope="module")
def report(run_dir, config):
    return summarise(str(run_dir), config)


@pytest.fixture(scope="module")
def page(run_dir, config):
    return Path(write_report(str(run_dir), config)).read_text()


def prompt_means(run_dir, model, scale):
    frame = read_tables(str(run_dir / "evaluation" / model)).to_pandas()
    frame = frame[frame[SCALE] == np.float32(scale)]
    return frame.groupby("prompt_id")["exact"].mean().astype(float)


# ------------------------------------------------------------------------------------------ guidance
def test_json_is_strict(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_headline_is_at_the_best_scale_of_the_base_model(report, run_dir):
    assert report["guidance"]["headline"] == report["guidance"]["best"]["base"] == 4.0
    for model in GUIDED_SHARE:
        result = report["alignment"][model]["exact"]
        assert result["value"] == pytest.approx(prompt_means(run_dir, model, 4.0).mean())
        assert (result["n_prompts"], result["n_images"]) == (24, 96)
    difference = report["comparison"]["tuned-base"]["exact"]
    means = [prompt_means(run_dir, model, 4.0) for model in ("tuned", "base")]
    low, high = stats.ttest_rel(*means).confidence_interval(0.95)
    assert [difference["low"], difference["high"]] == pytest.approx([low, high])
    title, verdict = headline(report)
    assert verdict.startswith("Compared at guidance 4, where the base model is best. The tuned model is better")
    assert f"exact: {100 * means[1].mean():.1f} %" in title
    assert "Compared at guidance 4, where the base model is best." in alignment_table(report)


def test_curves_have_a_point_for_every_scale(report, run_dir):
    for model, by_scale in GUIDED_SHARE.items():
        curve = report["guidance"]["curves"][model]
        assert [point[SCALE] for point in curve] == list(by_scale)
        for point in curve:
            means = prompt_means(run_dir, model, point[SCALE])
            low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
            assert [point["value"], point["low"], point["high"]] == pytest.approx([means.mean(), low, high])
    differences = {point[SCALE]: point["difference"] for point in report["guidance"]["differences"]["tuned"]}
    at_two = (prompt_means(run_dir, "tuned", 2.0) - prompt_means(run_dir, "base", 2.0)).mean()
    assert differences[2.0] == pytest.approx(at_two)


def test_rows_have_best_scales_base_near_gamma_and_model_without_guidance(report, run_dir):
    rows = {(row["model"], row[SCALE]): row for row in report["guidance"]["rows"]}
    best = report["guidance"]["best"]["tuned"]
    assert "its best" in rows["tuned", best]["notes"]
    assert rows["base", 4.0]["difference"] is None
    assert rows["base", 4.4]["notes"] == [f"near γ·w = 4.40 of {arm}" for arm in ("tuned", "random")]
    student = rows["tuned", 1.0]
    assert student["notes"] == ["guidance-free student, one branch"]
    assert (student["evaluations"], rows["tuned", 4.0]["evaluations"]) == (20, 40)
    less = (prompt_means(run_dir, "tuned", 1.0) - prompt_means(run_dir, "base", 4.0)).mean()
    assert student["difference"]["difference"] == pytest.approx(less)
    assert rows["tuned", 4.0]["effective_guidance"] == GAMMA


def test_evaluations_are_those_of_the_guidance_method_and_of_all_candidates(run_dir):
    """Perturbed-attention guidance evaluates three branches, and best-of-N samples N candidates for an image."""
    given = online_config_of(run_dir).model_dump(mode="json")
    given["evaluation"]["guidance_scales"] = [2.0, 4.0, 4.4]
    for changed, expected in (
        ({"guidance_method": "perturbed-attention"}, 3 * 20),
        ({"best_of": {"candidates": 5, "by": "pmi"}}, 5 * 2 * 20),
    ):
        sampler = given["evaluation"]["sampler"] | changed
        config = RunConfig.model_validate(given | {"evaluation": given["evaluation"] | {"sampler": sampler}})
        rows = summarise(str(run_dir), config)["guidance"]["rows"]
        assert {row["evaluations"] for row in rows if row[SCALE] > 1} == {expected}


def test_best_scale_is_the_lower_one_of_equal_scales():
    curve = [{SCALE: scale, "value": value} for scale, value in ((1.0, 0.2), (2.0, 0.8), (4.0, 0.8))]
    assert best_scale(curve, EXACT) == 2.0
    assert best_scale([], EXACT) is None


def test_headline_without_the_base_model_is_at_the_scale_of_the_sampler(config):
    rows = [{"prompt_id": p, "seed": 0, SCALE: scale, "exact": float(scale == 4)} for p in "ab" for scale in (2.0, 4.0)]
    found = guidance_section({"tuned": pd.DataFrame(rows)}, METRICS, config, {"tuned": GAMMA})
    assert (found["headline"], found["base_best"], found["best"]) == (2.0, False, {"tuned": 4.0})
    assert all(row["difference"] is None for row in found["rows"])


def test_quality_and_images_are_at_the_scale_of_the_headline(report, run_dir):
    assert {quality["n_images"] for quality in report["quality"].values()} == {96}
    assert report["quality"]["base"]["relative_diversity"] == 1
    assert 0.5 < report["quality"]["tuned"]["relative_diversity"] < 1.5
    frame = read_tables(str(run_dir / "evaluation" / "base")).to_pandas()
    at_headline = {image["bytes"] for image in frame[frame[SCALE] == 4]["image"]}
    cards = side_by_side(str(run_dir), 4.0)
    shown = {base64.b64decode(tile["source"].split(",")[1]) for card in cards for tile in card["tiles"]["base"]}
    assert len(cards) == 12
    assert shown <= at_headline


# ------------------------------------------------------------------------------------------ online
def test_report_has_the_updates_and_validations_of_an_online_run(report):
    tuned, random = report["online"]["tuned"], report["online"]["random"]
    assert [line["update"] for line in tuned["updates"]] == list(range(UPDATES))
    assert tuned["updates"][2] == {
        "update": 2,
        "reward": pytest.approx(1.4),
        "latent_std": 0.9,
        "diversity": 0.48,
        "distance_to_base": 0.06,  # from the last step of the update
        "effective_guidance": GAMMA,
    }
    assert [found["version"] for found in tuned["validations"]] == [0, 2, 4, 6]
    assert {"score_mitune", "score_pmi_negatives", "exact"} <= set(tuned["validations"][0]["columns"])
    assert tuned["validations"][0]["columns"]["exact"]["n_prompts"] == 6
    assert tuned["self_score"][1] == {"version": 2, "value": 1.2}
    assert (tuned["kept"], tuned["stopped"], tuned["effective_guidance"]) == (4, STOPPED, GAMMA)
    assert (random["finished"], random["kept"], random["self_score"]) == (False, None, [])


def test_report_counts_training_and_work_of_an_online_run(report):
    assert set(report["training"]) == {"tuned", "random"}
    assert report["training"]["tuned"]["steps"] == len(report["training"]["tuned"]["loss"]) == 2 * UPDATES
    assert report["denoiser_evaluations"]["generate"] == 360
    assert report["throughput"]["candidates_per_s"] == pytest.approx(1.8)


def test_selection_of_an_online_run_uses_the_candidates_of_updates(report, run_dir, config):
    selection = report["selection"]
    assert selection["pool_exact"]["n_images"] == UPDATES * 3 * 6  # without the validations
    assert selection["auc"]["exact"]["pmi_negatives"]["value"] > 0.8
    assert "kept_exact" not in selection
    assert previews(str(run_dir), config) == []


def test_page_of_an_online_run(page):
    for heading in ("Guidance", "Online training", "Fine-tuning", "Image quality"):
        assert f"<h2>{heading}</h2>" in page
    assert f"stopped: {STOPPED}" in page
    assert "guidance-free student, one branch" in page
    assert "6 of 6" in page
    for figure in ("AUC of each score", "exact against the guidance scale", "Reward, self-score, metrics and guards"):
        assert f'alt="{figure}' in page
    assert "Candidates by score" not in page


def test_report_of_an_online_run_that_has_just_started(tmp_path):
    config = online_config_of(tmp_path)
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "training.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "update": 0}))
    page = Path(write_report(str(tmp_path), config)).read_text()
    assert "1 of 6" in page
    assert "not finished" in page
