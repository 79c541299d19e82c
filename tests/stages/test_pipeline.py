"""The main job, run as a process like a user runs it: its folder and its exit code."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from mi_ray import storage
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.folders import resolve_model
from mi_ray.report.summary import summarise
from mi_ray.runs.status import run_status
from mi_ray.stages.pipeline import Plan, open_run, run_pipeline

ROOT = Path(__file__).parents[2]
SMOKE = ["--config", "jobs/configs/shapes-smoke.yaml"]
TOTAL, HOURS, COST = r"total .* ([\d.]+) min", r"cost +([\d.]+) GPU-hours", r"at 4 each: ([\d.]+)"  # in the plan
MINE = "dark_pixels:DarkPixels"  # a metric of the user
CONTROLLED = ["--evaluation.controls", "random", "--finetune.baseline", "0.5"]
CONTROLLED += ["--generate.alignment", "oracle", MINE]
CONTROLLED += ["--evaluation.alignment", "blip-vqa@shapes", "clip-score@shapes", "oracle", MINE]


def job(name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, f"jobs/{name}.py", *SMOKE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, ray_head):
    """The folder of a complete smoke run."""
    folder = tmp_path_factory.mktemp("run")
    done = job("pipeline", "--run-dir", str(folder), *CONTROLLED, env=ray_head)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tuned − base" in done.stdout
    assert re.search(r"^dark pixels, pixels +[\d.]+", done.stdout, re.MULTILINE)
    assert str(folder / "report" / "index.html") in done.stdout
    return folder


@pytest.mark.ray
@pytest.mark.slow
class TestWholeRun:
    def test_report_contains_the_documented_values(self, run_dir):
        report = json.loads((run_dir / "report/report.json").read_text())
        for model in ("base", "tuned", "random"):
            exact = report["alignment"][model]["exact"]
            assert exact["n_prompts"] == 6
            assert exact["n_images"] == 12
            assert "low" in exact
            assert "value" in report["alignment"][model]["pmi"]
            for metric in ("blip_vqa", "clip_score", "dark_pixels"):
                assert report["alignment"][model][metric]["n_images"] == 12
        assert {"generate_s", "finetune_s", "finetune_random_s", "evaluate_base_s", "total_s"} <= set(report["timing"])
        assert report["throughput"]["candidates_per_s"] > 0
        assert report["denoiser_evaluations"]["generate"] == 12 * 4 * 6 * 2
        assert report["training"]["tuned"]["outputs_changed"]
        assert report["errors"] == []
        page = (run_dir / "report/index.html").read_text()
        assert "<h1>blip vqa: " in page  # the first metric is the headline

    def test_diffusers_pipeline_makes_the_same_tuned_images(self, run_dir):
        row = pd.read_parquet(run_dir / "evaluation/tuned").iloc[0]
        pipe = StableDiffusionPipeline.from_pretrained(resolve_model("shapes"), safety_checker=None)
        pipe.load_lora_weights(
            run_dir / "round-0/adapter-less-baseline", weight_name="pytorch_lora_weights.safetensors"
        )
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(int(row["seed"])))
        image = pipe(row["prompt"], num_inference_steps=6, guidance_scale=3.0, latents=noise, output_type="np").images[
            0
        ]
        ours = np.array(Image.open(io.BytesIO(row["image"]["bytes"]))).astype(int)
        assert np.abs(ours - (image * 255).round().astype(int)).max() <= 2

    def test_second_run_of_the_same_command_writes_nothing(self, run_dir, ray_head):
        parts = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.parquet")}
        again = job("pipeline", "--run-dir", str(run_dir), *CONTROLLED, env=ray_head)
        assert again.returncode == 0
        assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.parquet")} == parts

    def test_folder_of_a_run_with_another_config_is_refused(self, run_dir, ray_head):
        refused = job("pipeline", "--run-dir", str(run_dir), "--seed", "1", env=ray_head)
        assert refused.returncode == 2
        assert "seed was 0 and is 1" in refused.stderr
        assert "evaluation.controls" in refused.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_run_continues_after_its_driver_was_killed(run_dir, tmp_path, ray_head):
    """Committed parts are kept. The result equals that of the complete run, although its shards have another size."""
    small, killed = ["--generate.prompts-per-shard", "1"], tmp_path / "killed"
    command = [sys.executable, "jobs/generate.py", *SMOKE, "--run-dir", str(killed), *small]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=ray_head, **silent)
    deadline = time.monotonic() + 120
    while not list(killed.glob("round-0/candidates/part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = {p.name: p.stat().st_mtime_ns for p in killed.glob("round-0/candidates/part-*")}
    assert 0 < len(survived) < 12
    two = ["--resources.num-actors", "2,2"]
    assert job("generate", "--run-dir", str(killed), *small, *two, env=ray_head).returncode == 0
    kept_files = {p.name: p.stat().st_mtime_ns for p in killed.glob("round-0/candidates/part-*")}
    assert survived.items() <= kept_files.items()
    key = ["prompt_id", "candidate_index"]
    one, two = (
        pd.read_parquet(d / "round-0/candidates").sort_values(key).reset_index(drop=True) for d in (run_dir, killed)
    )
    assert not two.duplicated(key).any()
    pd.testing.assert_frame_equal(one[[*key, "seed", "kept"]], two[[*key, "seed", "kept"]])
    for column in one.filter(like="score_"):
        np.testing.assert_allclose(one[column], two[column], rtol=1e-3, atol=1e-3)


def broken_model(tmp_path: Path) -> Path:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(resolve_model("shapes"), folder)
    shutil.rmtree(folder / "vae")
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompts.file"),
        (b"", "empty"),
        (b"\x00\x01\xff\xfe", "prompts.file"),
        (b"a red circle\na blue star\na red circle\n", "prompts.duplicates"),
        (b"a red circle and " * 40 + b"a star\n", "prompts.overlong"),
    ],
)
def test_bad_prompt_file_gives_one_message_and_starts_nothing(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    run_dir = tmp_path / "run"
    arguments = ["--run-dir", str(run_dir), "--prompts.file", str(file), "--generate.alignment", "none"]
    with pytest.raises(ConfigError) as refused:
        run_pipeline(load_config([*SMOKE, *arguments])[0])
    assert len(refused.value.faults) == 1
    assert message in refused.value.faults[0]
    assert not list(run_dir.rglob("*")), "something was written"


def test_skipped_prompts_are_in_events_status_and_report(tmp_path):
    """Of 40 lines 30 are broken and one is a duplicate. The first ones are listed and the others counted, also after a
    resume."""
    prompts = [f"a {color} circle" for color in ("red", "blue", "green")] + [
        f"{n} stars" for n in ("two", "three", "four")
    ]
    prompts += ["a red star", "a blue star", "a green star", "a red star"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n".join(prompts).encode() + b"\n\xff\xfe" * 30)
    skip = ["--prompts.broken", "skip", "--prompts.duplicates", "drop", "--prompts.file", str(file)]
    whole = [f"--{name}=none" for name in ("prompts.limit", "evaluation.file")]
    whole += [f"--{name}.alignment=none" for name in ("generate", "evaluation")]
    config, _ = load_config([*SMOKE, *skip, *whole, "--run-dir", str(tmp_path / "run")])
    for _ in range(2):
        open_run(Plan(config))
    folder = tmp_path / "run" / "prompts"
    used = pd.concat([pd.read_parquet(folder / f"{stage}.parquet") for stage in ("train", "evaluation")])
    assert sorted(used["prompt"]) == sorted(set(prompts))
    events = storage.read_lines(str(tmp_path / "run" / "events.jsonl"))
    counts = {e["stage"]: e for e in events if e["event"] == "prompts_read"}
    assert counts["train"]["read"] + counts["evaluation"]["read"] == len(prompts) + 30
    assert counts["train"]["skipped"] == 31
    assert len(events) < 60
    assert run_status(config.run_dir)["prompts_skipped"] == 31
    errors = summarise(config.run_dir, config)["errors"]
    assert sum(error["count"] for error in errors) == 31
    assert {"line 11 is not UTF-8", "10 more: not UTF-8", "line 10 repeats line 7"} <= {e["message"] for e in errors}
    file.write_text("\n".join(prompts).replace("two", "five"))
    with pytest.raises(ConfigError, match=r"prompts\.file: the run folder holds a run with other prompts"):
        Plan(config)


def test_pool_of_neighbours_is_evenly_spaced_and_needs_two_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("mi_ray.stages.pipeline.NEIGHBOUR_POOL", 4)
    prompts = [f"a {color} {shape}" for color in ("red", "blue", "green", "pink") for shape in ("star", "heart")]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    arguments = ["--prompts.file", str(file), "--evaluation.file", "jobs/configs/prompts/shapes-test.jsonl"]
    arguments += ["--prompts.limit=none", "--run-dir", str(tmp_path / "run")]
    assert Plan(load_config([*SMOKE, *arguments])[0]).pool == prompts[::2]
    file.write_text(prompts[0])
    alone = load_config([*SMOKE, *arguments, "--score.names", '["pmi_contrastive"]', "--select.by", "pmi_contrastive"])[
        0
    ]
    with pytest.raises(ConfigError, match="pmi_contrastive compares prompts"):
        Plan(alone)


def test_all_faults_are_reported_together(tmp_path):
    done = job(
        "pipeline",
        *("--run-dir", "/proc/nowhere", "--model.path", str(broken_model(tmp_path)), "--prompts.file", "missing.txt"),
    )
    assert done.returncode == 2
    for field in ("run_dir", "model.path", "vae", "prompts.file"):
        assert field in done.stderr


def test_unknown_option_is_refused_with_a_suggestion(tmp_path):
    done = job("pipeline", "--run-dir", str(tmp_path), "--finetune.lerning-rate", "1")
    assert done.returncode == 2
    assert "finetune.learning_rate" in done.stderr


def test_dry_run_reads_crlf_prompts_and_prints_the_plan(tiny_pipeline, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a red circle\r\na blue star")
    run_dir = tmp_path / "run"
    gpus = ["--resources.gpus-per-actor", "1", "--resources.train-gpus", "1", "--resources.price-per-gpu-hour", "4"]
    gpus += ["--model.path", str(tiny_pipeline)]  # a model whose speed is measured quickly
    done = job("pipeline", "--dry-run", "--run-dir", str(run_dir), "--prompts.file", str(file), *gpus)
    assert done.returncode == 0, done.stderr
    assert "2 to train on" in done.stdout
    assert "denoiser evaluations" in done.stdout
    total, hours, cost = (float(re.search(found, done.stdout)[1]) for found in (TOTAL, HOURS, COST))
    assert hours == pytest.approx(total / 60, abs=0.01)  # one GPU all the time
    assert cost == pytest.approx(4 * hours, abs=0.03)
    assert not list(run_dir.rglob("*"))
