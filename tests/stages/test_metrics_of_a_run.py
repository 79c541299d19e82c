"""A run with the oracle and a metric of the user, and a run with prompts that the oracle cannot read."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from mi_ray import storage
from mi_ray.alignment.oracle import Oracle
from mi_ray.config import RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompts import prompt_id
from mi_ray.inputs.shard_plan import Shard, read_shard
from mi_ray.report.page import alignment_table, write_report
from mi_ray.runs.status import run_status
from mi_ray.scoring.work import Work
from mi_ray.stages.evaluate import Evaluator
from mi_ray.stages.generate import CandidateGenerator
from mi_ray.stages.pipeline import Plan, open_run
from mi_ray.storage import tables
from mi_ray.training.select import select

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "tests" / "alignment"
MINE = "dark_pixels:DarkPixels"
SHAPES = ["a red circle", "a blue square left of a green star", "two pink hearts", "a yellow star"]
FOREIGN = ["a cat", "a photo of an owl", "a small house by the sea"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(METRICS)


def config_of(run_dir: Path, prompts: list[str], metrics: list[str], **sections) -> RunConfig:
    file = run_dir.parent / f"{run_dir.name}.txt"
    file.write_text("\n".join(prompts))
    sampler = {"solver": "dpm++2m", "num_inference_steps": 6, "guidance_scale": 3.0}
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "prompts": {"file": str(file)},
            "sampler": sampler,
            "generate": {"candidates_per_prompt": 6, "alignment": metrics, "preview_prompts": 1},
            "evaluation": {"images_per_prompt": 2, "sampler": sampler, "alignment": metrics, "pmi": False},
            **sections,
        }
    )


def measured_run(config: RunConfig, prompts: list[str]):
    """Candidates, and images of the base model as base and tuned, made by the actors without Ray."""
    dumped, nothing = config.model_dump(mode="json"), [None] * len(prompts)
    shard = Shard(0, "part-00000.parquet", [prompt_id(p) for p in prompts], prompts, nothing, nothing)
    run_dir = config.run_dir
    keep_by = [config.select.by, *config.generate.alignment]
    generator = CandidateGenerator(dumped, 0, run_dir, None, keep_by, [prompt_id(prompts[0])], prompts)
    parts = {"round-0/candidates": generator}
    parts |= {f"evaluation/{model}": Evaluator(dumped, model, run_dir, None) for model in ("base", "tuned")}
    for folder, actor in parts.items():
        rows = actor._rows(shard, list(range(len(prompts))), Work())
        table = pa.Table.from_pylist(rows, schema=actor.write.schema)
        storage.write_table(storage.join(run_dir, folder, shard.name), table)


def report_of(config: RunConfig) -> tuple[dict, str]:
    page = Path(write_report(config.run_dir, config)).read_text()
    return storage.read_json(storage.join(config.run_dir, "report", "report.json")), page


def figure(page: str, alt: str) -> str:
    source = re.search(rf'src="data:image/svg\+xml;base64,([^"]+)" alt="{alt}', page)
    return base64.b64decode(source[1]).decode()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(METRICS)
        config = config_of(tmp_path_factory.mktemp("both") / "run", SHAPES, ["oracle", MINE])
        measured_run(config, SHAPES)
        return config, *report_of(config)


def test_tables_have_the_columns_of_both_metrics(both):
    config, _, _ = both
    for folder in ("round-0/candidates", "evaluation/base"):
        table = storage.read_tables(storage.join(config.run_dir, folder))
        declared = tables.metric_columns(table.schema)
        assert list(declared) == ["oracle", MINE]
        assert declared["oracle"] == Oracle.columns
        assert table["exact"].null_count == table["dark_pixels"].null_count == 0
        assert 0 <= min(table["dark_pixels"].to_pylist()) < max(table["dark_pixels"].to_pylist())


def test_report_has_both_metrics_and_the_first_as_headline(both):
    _, report, page = both
    assert list(report["metrics"]) == ["oracle", MINE]
    assert {"exact", "relation", "dark_pixels", "darkest"} <= set(report["alignment"]["base"])
    assert {"exact", "dark_pixels"} <= set(report["comparison"]["tuned-base"])
    assert "<h1>exact: " in page
    assert "<th>exact, %</th>" in page
    assert "<th>dark pixels, pixels</th>" in page
    assert "number of pixels darker than half, lower is better" in page
    assert re.search(r"exact, %: [\d.]+.* among all candidates", page)
    table = alignment_table(report)
    assert re.search(r"^exact, % +[\d.]+", table, re.MULTILINE)
    assert re.search(r"^dark pixels, pixels +[\d.]+", table, re.MULTILINE)


def test_auc_figure_has_both_metrics(both):
    _, report, page = both
    assert set(report["selection"]["auc"]) == {"exact", "dark_pixels"}
    drawn = figure(page, "AUC of each score")
    assert "AUC within prompts by exact (" in drawn
    assert "AUC within prompts by dark pixels (" in drawn


def test_metric_name_selects_by_its_columns(both, tmp_path):
    config, _, _ = both
    pool = storage.read_tables(storage.join(config.run_dir, "round-0/candidates")).to_pandas()
    destination = str(tmp_path / "selected.parquet")
    assert select(config, storage.join(config.run_dir, "round-0/candidates"), destination, MINE)["kept"] == len(SHAPES)
    kept = storage.read_table(destination).to_pandas().merge(pool, on=["prompt_id", "candidate_index"])
    fewest = pool.groupby("prompt_id")["dark_pixels"].min()
    np.testing.assert_array_equal(kept.set_index("prompt_id")["dark_pixels"].sort_index(), fewest)
    assert all(len(latents) for latents in kept["latents_x"])


def test_metric_of_the_user_is_the_headline_without_the_oracle(tmp_path):
    config = config_of(tmp_path / "run", FOREIGN, [MINE])
    measured_run(config, FOREIGN)
    report, page = report_of(config)
    assert list(report["metrics"]) == [MINE]
    assert "<h1>dark pixels: " in page
    assert "exact" not in page.partition("<h2>Alignment</h2>")[2]
    assert "AUC within prompts by dark pixels (" in figure(page, "AUC of each score")
    assert 'class="corner number"' in page


def test_run_without_metrics_has_no_metric_columns(tmp_path):
    config = config_of(tmp_path / "run", FOREIGN, [])
    measured_run(config, FOREIGN)
    for folder in ("round-0/candidates", "evaluation/base"):
        names = storage.read_tables(str(tmp_path / "run" / folder)).column_names
        assert not {column.name for column in Oracle.columns} & {*names}
    report, _ = report_of(config)
    assert report["metrics"] == report["selection"]["auc"] == {}


def test_invalid_metrics_are_reported_before_the_start(tmp_path):
    both_fields = ["oracle", "dark_pixels:Exact"]
    with pytest.raises(ConfigError) as refused:
        Plan(config_of(tmp_path / "a", SHAPES, both_fields))
    assert [fault.partition(":")[0] for fault in refused.value.faults] == ["generate.alignment", "evaluation.alignment"]
    with pytest.raises(ConfigError, match=r"generate\.alignment: 'nowhere:Metric' cannot be loaded"):
        Plan(config_of(tmp_path / "b", SHAPES, ["nowhere:Metric"]))
    with pytest.raises(
        ConfigError, match=r"evaluation\.alignment: the oracle reads only prompts of the shapes grammar"
    ):
        Plan(config_of(tmp_path / "c", FOREIGN, ["oracle"]))


def test_wrong_weights_of_a_judge_are_one_message_before_the_start(tmp_path):
    """A plan is all that a dry run makes; the run folder does not begin to exist."""
    from tiny_judges import save_clip  # in METRICS

    judge = tmp_path / "judge"
    save_clip(judge)
    weights = load_file(judge / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, judge / "model.safetensors", {"format": "pt"})
    config = config_of(tmp_path / "run", SHAPES, [f"clip-score@{judge}"])
    with pytest.raises(ConfigError) as refused:
        Plan(config)
    why = f"'clip-score@{judge}' '{judge}' lacks 1 of the weights of CLIPModel, such as text_projection.weight: give"
    assert [fault.partition(why)[:2] for fault in refused.value.faults] == [
        (f"{section}.alignment: ", why) for section in ("generate", "evaluation")
    ]
    assert not (tmp_path / "run").exists()


def test_metrics_find_the_columns_of_a_prompt_set_and_others_are_refused(tmp_path):
    config, wanted = config_of(tmp_path / "run", SHAPES, []), "dark_pixels:Wanted"
    rows = [{"prompt": p, "tag": f"t{i}", "include": [{"class": p}] * (i + 1)} for i, p in enumerate(SHAPES)]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sections = config.model_dump(mode="json")
    for section in ("generate", "evaluation"):
        sections[section]["alignment"] = [wanted]
    with pytest.raises(
        ConfigError, match=r"generate\.alignment: the dark_pixels:Wanted reads only prompts with the col"
    ):
        Plan(RunConfig.model_validate(sections))
    sections["prompts"]["file"] = sections["evaluation"]["file"] = str(tmp_path / "evaluation_metadata.jsonl")
    plan = Plan(RunConfig.model_validate(sections))
    open_run(plan)
    shard = read_shard(plan.shards.row(0), storage.ParquetRows(plan.shards.source))
    dumped = plan.config.model_dump(mode="json")
    actors = [
        Evaluator(dumped, "base", config.run_dir, None),
        CandidateGenerator(dumped, 0, config.run_dir, None, ["mitune"], [], SHAPES),
    ]
    for actor in actors:
        found = actor._rows(shard, [0, 1], Work())
        assert {(row["category"], row["wanted"]) for row in found} == {("t0", 1), ("t1", 2)}


@pytest.mark.parametrize(("metrics", "evaluated"), [(["oracle", MINE], True), ([MINE], False)])
def test_status_includes_the_evaluation_of_real_images(tmp_path, metrics, evaluated):
    config = config_of(tmp_path / "run", SHAPES, metrics)
    open_run(Plan(config))
    assert ("reference" in {stage["model"] for stage in run_status(config.run_dir)["stages"]}) == evaluated


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_complete_run_with_a_metric_of_the_user_that_selects(tmp_path):
    """The actors import the metric. The arm that it selects has its name in the folder and in the report."""
    command = [sys.executable, "jobs/pipeline.py", "--config", "jobs/configs/shapes-smoke.yaml"]
    command += ["--run-dir", str(tmp_path), "--evaluation.controls", MINE]
    command += [f"--{section}.alignment=oracle,{MINE}" for section in ("generate", "evaluation")]
    path = os.pathsep.join([str(METRICS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^dark pixels, pixels +[\d.]+", done.stdout, re.MULTILINE)
    assert f"{MINE} − base" in done.stdout
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["errors"] == []
    assert {"base", "tuned", MINE} == set(report["alignment"])
    assert {f"{MINE}-base", f"tuned-{MINE}"} <= set(report["comparison"])
    pool = pd.read_parquet(tmp_path / "round-0/candidates")
    kept = pd.read_parquet(tmp_path / "controls" / MINE / "round-0/selected.parquet").merge(
        pool, on=["prompt_id", "candidate_index"]
    )
    fewest = pool.groupby("prompt_id")["dark_pixels"].min()
    np.testing.assert_array_equal(kept.set_index("prompt_id")["dark_pixels"].sort_index(), fewest)
