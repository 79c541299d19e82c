import json

import numpy as np
import pyarrow as pa
import pytest
from run_folder import EXACT_SHARE, HOSTILE, config_of
from scipy import stats

from mi_ray.report.summary import summarise
from mi_ray.storage import read_tables, write_table
from mi_ray.storage.tables import candidates_schema, evaluation_schema


@pytest.fixture(scope="module")
def report(run_dir, config):
    return summarise(str(run_dir), config)


def prompt_means(run_dir, model, column="exact", **only):
    frame = read_tables(str(run_dir / "evaluation" / model)).to_pandas()
    for key, value in only.items():
        frame = frame[frame[key] == value]
    return frame.groupby("prompt_id")[column].mean().astype(float)


def test_json_is_strict(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_run_and_times(report):
    assert report["run"]["config_hash"] == "abc"
    assert report["run"]["started"] == "2023-11-14T22:13:20+00:00"
    stages = {"generate_s": 10, "finetune_s": 8.5, "evaluate_base_s": 8, "evaluate_reference_s": 2}
    assert report["timing"] == {**stages, "total_s": 28.5}


def test_work_counts_all_sessions_but_rates_only_timed_ones(report):
    assert report["denoiser_evaluations"] == {"generate": 12000, "score": 1200, "evaluate": 10560}
    throughput = report["throughput"]
    assert throughput["candidates_per_s"] == 6  # 60 rows in 10 s; those of the killed session have no duration
    assert throughput["images_per_s"] == 12  # 96 images in 8 s; real images do not count
    assert throughput["denoiser_evaluations_per_s"] == pytest.approx((6600 + 10560) / 18)


def test_prompts(report):
    assert report["prompts"] == {"read": 26, "used": 25, "skipped": 1, "evaluation": 24}


def test_alignment_against_scipy(report, run_dir):
    for model in EXACT_SHARE:
        for column, key in (("exact", "exact"), ("score_pmi", "pmi")):
            means = prompt_means(run_dir, model, column)
            low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
            result = report["alignment"][model][key]
            assert [result["value"], result["low"], result["high"]] == pytest.approx([means.mean(), low, high])
            assert (result["n_prompts"], result["n_images"]) == (24, 96)
    assert "relation" not in report["alignment"]["base"]  # no prompt of the folder has it measured
    ood = report["alignment"]["tuned"]["by_split"]["ood"]["exact"]
    assert ood["value"] == pytest.approx(prompt_means(run_dir, "tuned", split="ood").mean())
    assert list(report["alignment"]["tuned"]["by_category"]) == ["color", "spatial", "complex"]


def test_comparison_against_scipy(report, run_dir):
    assert set(report["comparison"]) == {"tuned-base", "tuned-random", "random-base"}
    for pair, result in report["comparison"].items():
        model, baseline = pair.split("-")
        for only, got in (({}, result), ({"category": "color"}, result["by_category"]["color"])):
            means = [prompt_means(run_dir, name, **only) for name in (model, baseline)]
            low, high = stats.ttest_rel(*means).confidence_interval(0.95)
            expected = [(means[0] - means[1]).mean(), low, high]
            assert [got["exact"][k] for k in ("difference", "low", "high")] == pytest.approx(expected)


def test_selection(report, run_dir):
    pool = read_tables(str(run_dir / "round-0" / "candidates")).to_pandas()
    pool = pool[pool["error"].isna()]
    selection = report["selection"]
    assert selection["rounds"] == 1
    assert selection["pool_exact"]["value"] == pytest.approx(pool["exact"].mean())
    assert selection["kept_exact"]["value"] == pytest.approx(pool[pool["kept"].eq(True)]["exact"].mean())
    aucs = []
    for _, group in pool.groupby("prompt_id"):
        right, wrong = (group[group["exact"] == value]["score_pmi_negatives"] for value in (1, 0))
        if len(right) and len(wrong):
            aucs.append(np.mean([(r > w) + 0.5 * (r == w) for r in right for w in wrong]))
    result = selection["auc"]["exact"]["pmi_negatives"]
    low, high = stats.ttest_1samp(aucs, 0).confidence_interval(0.95)
    assert [result[k] for k in ("value", "low", "high")] == pytest.approx([np.mean(aucs), low, high])
    assert result["low"] > 0.6
    assert selection["auc"]["exact"]["mitune"]["low"] < 0.5 < selection["auc"]["exact"]["mitune"]["high"]


def test_training_counts_a_repeated_step_once(report):
    training = report["training"]["tuned"]
    assert set(report["training"]) == {"tuned", "random"}
    assert len(training["loss"]) == training["steps"] == 60
    assert training["loss"][-1] is None  # NaN
    assert training["outputs_changed"] is True


def test_quality_against_real_renders(report):
    quality = report["quality"]
    assert set(quality) == set(EXACT_SHARE)
    assert all(q["reference"] == "real" and not q["collapsed"] for q in quality.values())


def test_errors_are_counted_by_cause(report):
    assert report["errors"] == [
        {"prompt": "a b c", "stage": "prompts", "message": "longer than 77 tokens", "count": 1},
        {"prompt": HOSTILE, "stage": "generate", "message": "no <scene> drawn", "count": 1},
    ]


def test_report_of_an_empty_folder(tmp_path):
    report = summarise(str(tmp_path), config_of(tmp_path))
    assert report["timing"] == {"total_s": 0}
    assert report["alignment"] == report["comparison"] == report["quality"] == report["training"] == {}
    assert report["selection"] == {"auc": {}, "correlation": {}, "rounds": 0, "distributions": {}}
    assert report["errors"] == []
    json.dumps(report, allow_nan=False)


def test_report_without_metrics_and_categories_with_two_rounds(tmp_path):
    rng = np.random.default_rng(0)
    for number in (0, 1):
        rows = [{"prompt_id": p, "prompt": p, "kept": i == 0, "score_mitune": float(i)} for p in "ab" for i in range(3)]
        table = pa.Table.from_pylist(rows, candidates_schema(("mitune", "pmi_negatives")))
        write_table(str(tmp_path / f"round-{number}" / "candidates" / "part-0.parquet"), table)
    for model in ("base", "tuned"):
        rows = [{"prompt_id": p, "prompt": p, "seed": s, "score_pmi": rng.normal()} for p in "abc" for s in range(2)]
        rows.append({"prompt_id": "d", "prompt": "d", "seed": 0, "error": "broken"})
        table = pa.Table.from_pylist(rows, evaluation_schema())
        write_table(str(tmp_path / "evaluation" / model / "part-0.parquet"), table)
    report = summarise(str(tmp_path), config_of(tmp_path))
    json.dumps(report, allow_nan=False)
    assert report["metrics"] == {}
    assert report["selection"]["auc"] == {}
    base = report["alignment"]["base"]
    assert set(base) == {"pmi", "by_category", "by_split"}
    assert base["pmi"]["n_prompts"] == 3
    assert base["by_category"] == base["by_split"] == {}
    assert set(report["comparison"]["tuned-base"]) == {"pmi", "by_category", "by_split"}
    assert report["selection"]["rounds"] == len(report["selection"]["by_round"]) == 2
    assert report["quality"] == {}
    assert report["errors"] == [{"prompt": "d", "stage": "evaluate", "message": "broken", "count": 2}]


def test_rounds_of_a_prompt_count_as_one_prompt(run_dir, tmp_path):
    pool = read_tables(str(run_dir / "round-0" / "candidates"))
    for number in (0, 1):
        write_table(str(tmp_path / f"round-{number}" / "candidates" / "part-0.parquet"), pool)
    once = summarise(str(run_dir), config_of(run_dir))["selection"]
    twice = summarise(str(tmp_path), config_of(tmp_path))["selection"]
    assert twice["auc"] == once["auc"]  # the same candidates twice must not make an interval narrower
    assert twice["by_round"][1]["auc"] == once["auc"]
