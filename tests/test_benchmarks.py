import copy
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from mi_ray import storage
from mi_ray.alignment.metric import Column, Metric
from mi_ray.config import OnlineConfig, RunConfig, SamplerConfig
from mi_ray.diffusion.adapter_files import save_adapter
from mi_ray.diffusion.adapters import attach_adapter
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.online_plan import OnlinePlan
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import ShardPlan, write_prompts
from mi_ray.runs.layout import final_adapter
from mi_ray.training.export import export

ROOT = Path(__file__).parents[1]
PROMPTS_READ = {"prompt_id": ["a", "b"], "prompt": ["a red circle", "two hearts"], "category": ["", ""]}


@pytest.fixture
def gates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gates

    return gates


def test_gates_hold_between_their_bounds(gates):
    assert gates.Gate(0.99, minimum=0.99).as_json() == {"value": 0.99, "min": 0.99, "holds": True}
    assert gates.Gate(1.2, maximum=1.1).as_json() == {"value": 1.2, "max": 1.1, "holds": False}
    assert not gates.Gate(0.98, minimum=0.99).holds
    assert not gates.Gate(float("nan"), minimum=0.0).holds


def test_tables_are_aligned_and_leave_gaps(gates):
    assert (
        gates.table([{"a": "x", "b": 1.23456}, {"a": "long", "c": False}])
        == "a     b      c\nx     1.235\nlong         NO"
    )


@pytest.mark.slow
def test_oracle_benchmark_finds_a_bad_autoencoder(run_benchmark, tiny_pipeline, tmp_path):
    """The autoencoder of the tiny pipeline is untrained: the oracle reads rendered images but not decoded ones."""
    out = tmp_path / "oracle.json"
    options = "--smoke", "--check", "--model", str(tiny_pipeline), "--out", str(out)
    status, stdout, stderr = run_benchmark("oracle.py", *options)
    assert status == 1, stderr
    report = json.loads(out.read_text())
    assert set(report) == {"question", "results", "gates", "environment"}
    assert report["gates"]["exact_fresh"] == {"value": report["results"][0]["all"], "min": 0.99, "holds": True}
    assert report["gates"]["exact_decoded"]["holds"] is False
    assert report["question"] in stdout
    assert "exact_decoded" in stdout


def test_oracle_benchmark_refuses_an_invalid_model(run_benchmark, tmp_path):
    status, _, stderr = run_benchmark("oracle.py", "--smoke", "--model", str(tmp_path))
    assert status == 2
    assert stderr.splitlines()[-1].startswith("error: model: ")
    assert "model_index.json" in stderr


@pytest.fixture
def guidance(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import guidance

    return guidance


def test_guidance_benchmark_compares_the_same_prompts_and_seeds(guidance):
    """Two prompts with two seeds: tuned has one more correct image than base, and the same number as the control."""
    images = {"prompt_id": ["a", "a", "b", "b"], "seed": [1, 2, 3, 4]}
    drawn = {
        "base": pd.DataFrame(images | {"exact": [1.0, 0.0, 0.0, 0.0]}),
        "tuned": pd.DataFrame(images | {"exact": [1.0, 1.0, 0.0, 0.0]}).iloc[::-1],
        "random": pd.DataFrame(images | {"exact": [0.0, 1.0, 0.0, 1.0]}),
    }
    column = Column("exact", "1 or 0", "yes/no", 0, 1)
    base, tuned = (guidance.findings(drawn, name, 3.0, column) for name in ("base", "tuned"))
    assert {"guidance_scale": 3.0, "model": "base", "exact": 25.0}.items() <= base.items()
    assert not any(key.startswith("minus") for key in base)
    assert (tuned["exact"], tuned["minus_base"], tuned["minus_random"]) == (50.0, 25.0, 0.0)
    half = 12.706 * 25.0  # t of one degree of freedom times the standard error of 50 and 0
    assert tuned["minus_base_low"] == pytest.approx(25.0 - half, rel=1e-3)


def test_guidance_benchmark_refuses_a_folder_without_a_run(guidance, tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        guidance.finished_run(str(tmp_path))


class Brightness(Metric):
    columns = (Column("brightness", "mean value of the pixels", "value", 0, 255),)

    def measure(self, images, prompts):
        return {"brightness": np.asarray(images, dtype=float).mean((1, 2, 3))}


def test_the_base_model_of_the_guidance_benchmark_is_that_of_the_run(guidance, tiny_pipeline, tmp_path):
    """With the adapter that the run started from: the images are those of the model with the adapter merged in."""
    adapter, run = tmp_path / "run" / "start", tmp_path / "run"
    model = attach_adapter(
        load_denoiser(str(tiny_pipeline), device="cpu").network, rank=4, alpha=8, target_modules=("to_q", "to_v")
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, adapter, "some/model")
    export(tiny_pipeline, adapter, tmp_path / "merged", {})

    sections = {"model": {"path": str(tiny_pipeline)}, "prompts": {"file": "unused"}}
    sections["evaluation"] = {"sampler": {"solver": "ddim", "num_inference_steps": 4}}
    config = RunConfig.model_validate(
        {"run_dir": str(run), "finetune": {"start_from": "gone.safetensors"}, "select": {"by": "mitune"}} | sections
    )
    storage.write_json(str(run / "run.json"), {"config": config.model_dump(mode="json")})
    storage.write_json(f"{final_adapter(config, 'tuned')}/summary.json", {})
    found, adapters = guidance.finished_run(str(run))
    assert adapters["base"] == str(adapter)

    benchmark, table = guidance.GuidanceBenchmark(run_dir=str(run), batch_size=4), pa.table(PROMPTS_READ)
    merged = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "merged")})})
    base, plain, expected = (
        benchmark._draw(of, Brightness(), table, 2, 3.0, place)["brightness"].to_numpy()
        for of, place in ((found, adapters["base"]), (found, None), (merged, None))
    )
    assert base == pytest.approx(expected, abs=0.005)
    assert np.abs(base - plain).max() > 0.05


@pytest.fixture
def selection(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import selection

    return selection


def test_selection_benchmark_ranks_any_selector_by_a_graded_metric(selection):
    """Two prompts with four candidates; the selector puts the second best first in `a` and is missing once in `b`."""
    nan = float("nan")
    candidates = pd.DataFrame(
        {
            "prompt_id": ["a"] * 4 + ["b"] * 4,
            "category": ["color"] * 4 + ["shape"] * 4,
            "right": [0.1, 0.4, 0.6, 0.9, 0.2, 0.2, 0.5, 0.8],
            "judge": [1.0, 2.0, 4.0, 3.0, 1.0, 1.0, 2.0, nan],
        }
    )
    cost = selection.Cost(total=48, spent=0.4, candidates=8)
    truth = Column("right", "share of what is right", "share", 0, 1)
    row = selection.findings(candidates, "judge", "judge", cost, 0.5, truth, 2)
    assert (row["evaluations"], row["milliseconds"], row["mixed_prompts"]) == (6, 50.0, 2)
    assert row["auc"] == pytest.approx((5 / 6 + 1) / 2)
    assert row["correlation"] == pytest.approx((0.8 + 1) / 2)
    assert row["top1_right"] == pytest.approx((0.6 + 0.5) / 2)
    assert row["top2_right"] == pytest.approx(((0.6 + 0.9) / 2 + (0.5 + 0.2) / 2) / 2)
    assert (row["auc_color"], row["auc_shape"]) == (pytest.approx(5 / 6), 1)
    assert row["candidates"] == 7  # one has no value


@pytest.fixture
def alignment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import alignment

    return alignment


def test_alignment_benchmark_measures_effective_guidance(alignment, tiny_pipeline, monkeypatch):
    """A model whose prediction is u + 1.5 (c - u) has the effective guidance 1.5; so has guidance with a factor 1.5."""
    monkeypatch.setattr(sys, "argv", ["alignment.py"])
    benchmark = alignment.AlignmentBenchmark(steps=4)
    base = load_denoiser(str(tiny_pipeline), device="cpu")
    null = base.encode_prompts([""])
    benchmark.__dict__["base"] = base

    def stronger(x_t, timesteps, conditioning):
        c, u = (base.predict(x_t, timesteps, given) for given in (conditioning, null.expand(len(x_t))))
        return u + 1.5 * (c - u)

    tuned = copy.copy(base)
    tuned.predict = stronger
    monkeypatch.setattr(type(benchmark), "_model", lambda self, arm: tuned if arm.adapter else base)
    latents = list(np.random.default_rng(0).normal(size=(2, 4 * 8 * 8)).astype(np.float32))
    images = pd.DataFrame({"prompt_id": ["a", "b"], "prompt": ["a red circle", "a star"], "latents": latents})
    arm = alignment.Arm("nft", benchmark._sampler(4.0), "adapter", 0)
    assert benchmark._gamma(arm, images) == pytest.approx(1.5, rel=1e-3)
    assert benchmark._gamma(alignment.Arm("base", benchmark._sampler(4.0)), images) == 1
    fixed = {"guidance_method": "semantic", "guidance_settings": {"rate_min": 1.5, "rate_max": 1.5}}
    scaled = SamplerConfig.model_validate(benchmark._sampler(4.0).model_dump() | fixed)
    assert benchmark._gamma(alignment.Arm("semantic", scaled), images) == pytest.approx(1.5, rel=1e-3)


def test_alignment_benchmark_tabulates_gains_over_trainings(alignment, monkeypatch):
    """Two prompts in two splits, two trainings: one gains one image of four, the other two."""
    from alignment_page import category_table, main_table
    from alignment_rows import table_rows

    monkeypatch.setattr(sys, "argv", ["alignment.py"])
    benchmark = alignment.AlignmentBenchmark()
    features = np.random.default_rng(0).normal(size=(4, 8))
    images = pd.DataFrame(
        {"prompt_id": ["a", "a", "b", "b"], "split": ["test", "test", "ood", "ood"], "category": "color"}
        | {"seed": [1, 2, 3, 4], "pmi": 1.0, "evaluations": 24.0, "seconds": 0.5, "features": list(features)}
    )
    name = benchmark.column.name
    base = alignment.Arm("base", benchmark._sampler(4.0))
    one, two = (alignment.Arm("nft", base.settings, f"adapter-{seed}", seed) for seed in (0, 1))
    frames = {
        base: images.assign(**{name: [1.0, 0.0, 0.0, 0.0]}),
        one: images.assign(**{name: [1.0, 1.0, 0.0, 0.0]}),
        two: images.assign(**{name: [1.0, 1.0, 1.0, 0.0]}),
    }
    gammas = {base: 1.0, one: 1.1, two: 1.3}
    own, row = table_rows(frames, base, gammas, benchmark.column, features, named_encoder=False)
    assert (row["training_seeds"], row["evaluations"], row["seconds"]) == (2, 24, 0.5)
    assert (row[name], row["gain"]) == (62.5, 37.5)
    assert (row["gain_test"], row["gain_ood"], row["gain_color"]) == (50, 25, 37.5)
    assert (row["lowest_gain_of_a_seed"], row["highest_gain_of_a_seed"]) == (25, 50)
    assert (row["gamma"], row["diversity"]) == (pytest.approx(1.2), pytest.approx(100))
    assert "gain" not in own
    lines = main_table([own, row], benchmark.column)
    assert len({len(line) for line in lines}) == 1
    assert "+25.0 to +50.0" in lines[2]

    judged = Column("blip_vqa", "the paper's metric", "share")
    renamed = {arm: frame.rename(columns={name: judged.name}) for arm, frame in frames.items()}
    renamed |= {base.at(2.0): renamed[base]}
    rows = table_rows(renamed, base, gammas, judged, features, named_encoder=False)
    assert [line[-1] for line in main_table(rows, judged)] == ["paper, %", "45.81", "–", "–"]  # nft is not in the paper
    assert category_table(rows, judged)[-1] == ["mi-tune in the paper", "", "", "+15.4"]


def test_alignment_benchmark_chooses_settings_on_prompts_that_are_not_compared(alignment, monkeypatch, tmp_path):
    """Twelve prompts, four of them for validation. The second setting is best there; of equal ones the first counts."""
    monkeypatch.setattr(sys, "argv", ["alignment.py"])
    prompts = tmp_path / "prompts.jsonl"
    colors, shapes = ("red", "blue", "green", "purple"), ("circle", "star", "square")
    prompts.write_text("".join(json.dumps({"prompt": f"a {c} {s}"}) + "\n" for c in colors for s in shapes))
    benchmark = alignment.AlignmentBenchmark(flags=f"--evaluation.file {prompts}", validation_prompts=4)
    validation, compared = benchmark.validation_table["prompt"].to_pylist(), benchmark.table["prompt"].to_pylist()
    assert (len(validation), len(compared), set(validation) & set(compared)) == (4, 8, set())
    values = {"": 0.5, "contrastive_scale 0.5": 0.75, "contrastive_scale 2": 0.75}
    asked = []

    def drawn(self, arm, folder, table):
        asked.append((folder, len(table)))
        return pd.DataFrame({"prompt_id": ["a"], benchmark.column.name: [values[arm.variant]]})

    monkeypatch.setattr(type(benchmark), "_drawn", drawn)
    arms = alignment.guidance_arms("contrastive", benchmark._sampler(4.0), tried=True)
    chosen = benchmark._chosen(arms)
    assert (chosen.variant, chosen.settings.guidance_settings.contrastive_scale) == ("contrastive_scale 0.5", 0.5)
    assert asked == [("validation", 4)] * 3
    assert [(row["settings"], row["chosen"]) for row in benchmark.tried] == [
        ("", False), ("contrastive_scale 0.5", True), ("contrastive_scale 2", False)
    ]  # fmt: skip
    assert len({arm.key for arm in arms}) == 3


def test_alignment_benchmark_trains_the_other_seeds_with_the_best_learning_rate(alignment, monkeypatch):
    """Three learning rates with the first seed, the best one with the other seed; all trainings are equally long."""
    monkeypatch.setattr(sys, "argv", ["alignment.py"])
    benchmark = alignment.AlignmentBenchmark(training=("nft", "dgpo"), training_seeds=(4, 5), updates=7)
    runs = []

    def run(training):
        runs.append((Path(training.run_dir).name, training.flags))
        return training.run_dir

    monkeypatch.setattr(alignment.Training, "run", run)
    best = {"nft": "learning rate 0.003", "dgpo": ""}

    def drawn(self, arm, folder, table):
        return pd.DataFrame({"prompt_id": ["a"], benchmark.column.name: [float(arm.variant == best[arm.name])]})

    monkeypatch.setattr(type(benchmark), "_drawn", drawn)
    arms = benchmark._trained(4.0, smoke=False)
    assert [(arm.name, arm.seed, arm.variant) for arm in arms] == [
        ("nft", 4, best["nft"]), ("dgpo", 4, ""), ("nft", 5, best["nft"]), ("dgpo", 5, "")
    ]  # fmt: skip
    assert [name for name, _ in runs] == [
        *("nft-4", "nft-4-learning-rate-0.0003", "nft-4-learning-rate-0.003"),
        *("dgpo-4", "dgpo-4-learning-rate-0.0003", "dgpo-4-learning-rate-0.003"),
        *("nft-5-learning-rate-0.003", "dgpo-5"),
    ]
    for name, flags in runs:
        assert flags[flags.index("--online.updates") + 1] == "7"
        assert flags[flags.index("--seed") + 1] == name.split("-")[1]
        assert ("--finetune.learning-rate" in flags) == ("learning-rate" in name)


def test_alignment_benchmark_counts_the_cost_of_a_training(alignment, tmp_path, monkeypatch):
    """Candidates and scores as counted by the shards, without the evaluation's; training passes by the config."""
    import alignment_methods

    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "prompts": {"file": "prompts.txt"},
            "evaluation": {"controls": []},
            "finetune": {"steps": 10, "batch_size": 4},
        }
    )
    monkeypatch.setattr(alignment_methods, "finished_run", lambda run_dir: (config, {}))
    shard = {"event": "shard_written", "denoiser_evaluations": 100, "score_evaluations": 20}
    events = [
        {"event": "run_started"},
        shard | {"stage": "generate"},
        {"event": "stage_finished", "stage": "generate", "seconds": 60},
        {"event": "stage_finished", "stage": "finetune", "seconds": 30},
        shard | {"stage": "evaluate"},
        {"event": "stage_finished", "stage": "evaluate_tuned", "seconds": 500},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    passes = 10 * 4 * config.finetune.gradient_accumulation * 3
    cost = alignment_methods.training_cost(str(tmp_path))
    assert cost == {"training_evaluations": 120 + passes, "training_minutes": 1.5}

    # An online training that has stopped itself after a quarter of its steps.
    online = config.model_copy(update={"online": config.online.model_copy(update={"updates": 8})})
    monkeypatch.setattr(alignment_methods, "finished_run", lambda run_dir: (online, {"tuned": str(tmp_path)}))
    monkeypatch.setattr(alignment_methods, "evaluations", lambda *arguments: {"finetune": 4000})
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 2 * online.online.inner_steps}))
    assert alignment_methods.training_cost(str(tmp_path))["training_evaluations"] == 120 + 1000


def test_alignment_benchmark_refuses_trainings_of_another_model_or_with_faults(alignment, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["alignment.py"])
    other = tmp_path / "other.yaml"
    other.write_text((ROOT / "jobs/configs/shapes-paper.yaml").read_text().replace("path: shapes", "path: mine"))
    benchmark = alignment.AlignmentBenchmark(rounds_config=other, training=("mi-tune",))
    with pytest.raises(ValueError, match=r"--rounds-config: .*other.yaml trains 'mine', but --config has 'shapes'"):
        benchmark._check_trainings(smoke=False)
    wrong = alignment.AlignmentBenchmark(flags="--finetune.ema-decay 2", training=("nft",))
    with pytest.raises(ValueError, match=r"nft-0: finetune\.ema_decay"):
        wrong._check_trainings(smoke=False)


def test_alignment_benchmark_refuses_a_finished_training_with_other_settings(alignment, monkeypatch, tmp_path):
    import alignment_methods

    flags = ("--seed", "1")
    found = alignment.Training(str(tmp_path), ROOT / "jobs/configs/shapes-paper.yaml", flags)
    monkeypatch.setattr(alignment_methods, "finished_run", lambda run_dir: (found.settings(), {"tuned": "adapter"}))
    assert found.run() == "adapter"
    with pytest.raises(ValueError, match="has a training with other settings"):
        alignment.Training(str(tmp_path), found.config, (*flags, *shlex.split(alignment.MI_TUNE))).run()


@pytest.fixture
def simulated_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import simulated_run

    return simulated_run


def online_plan(folder: Path, parts: int, updates: int, lag: int) -> OnlinePlan:
    """A plan with this number of parts in each update, without validations."""
    prompts = [f"prompt {number}" for number in range(2 * parts)]
    rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt} for prompt in prompts]
    source = str(folder / "prompts.parquet")
    write_prompts(source, [pa.RecordBatch.from_pylist(rows, PROMPTS)])
    config = OnlineConfig(updates=updates, lag=lag, prompts_per_update=2 * parts, validation_prompts=0)
    return OnlinePlan(ShardPlan(source, 2, "key"), config, 0)


@pytest.mark.parametrize(("lag", "cycle"), [(1, 12.0), (0, 12.0 + 6.0)])
def test_simulated_online_run_has_the_time_of_the_longer_part_or_of_both(simulated_run, tmp_path, lag, cycle):
    """Six actors with one part each, of 2 prompts times 6 s; two training GPUs with 12 prompts times 1 s. With lag 1
    they work at the same time, with lag 0 one after the other."""
    times, plan = simulated_run.Times(prompt=6.0, training=1.0), online_plan(tmp_path, 6, 8, lag)
    found = simulated_run.simulate(plan, times, 6, 2, 4)
    assert found["seconds_per_update"] == pytest.approx(cycle, rel=0.01)
    assert found["busy_share"] == pytest.approx((6 * 12 + 2 * 6) / (8 * cycle), rel=0.01)


def test_simulated_online_run_pays_for_the_overheads(simulated_run, tmp_path):
    """The training is longer than the generation: its overheads are in every update, those of the actors in none."""
    times = simulated_run.Times(prompt=1.0, training=1.0, part=0.5, update=1.0)
    found = simulated_run.simulate(online_plan(tmp_path, 6, 8, 1), times, 6, 2, 4)
    assert found["seconds_per_update"] == pytest.approx(6.0 + 1.0, rel=0.01)


def test_online_scaling_benchmark_holds_its_gate(simulated_run, monkeypatch):
    pytest.importorskip("ray")
    import scaling

    findings = scaling.ScalingBenchmark(online=True, smoke=True, _cli_parse_args=[]).answer()
    assert findings.gates["busy_share"].holds
    with_lag, without = findings.rows
    assert (with_lag["lag"], without["lag"]) == (1, 0)
    assert without["busy_share"] < with_lag["busy_share"] - 0.2


@pytest.fixture
def wrong_captions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import wrong_captions

    return wrong_captions


def test_precision_and_recall_are_those_of_a_pool_with_that_prevalence(wrong_captions):
    """Compared with a pool in which every pair is repeated as often as its weight says, one threshold after another."""
    wrong, right = np.array([0.1, 0.3, 0.3, 0.8]), np.array([0.2, 0.3, 0.9, 0.9, 1.0, -np.inf])
    prevalence = 0.25
    pool = [(value, 1) for value in wrong for _ in range(3)] + [(value, 0) for value in right for _ in range(6)]
    assert sum(label for _, label in pool) / len(pool) == prevalence
    area = last = 0.0
    for threshold in sorted({value for value, _ in pool}):
        reported = [label for value, label in pool if value <= threshold]
        recall = sum(reported) / 12
        area, last = area + (recall - last) * sum(reported) / len(reported), recall
    found, _ = wrong_captions.precision_recall(wrong, right, prevalence)
    assert found == pytest.approx(area)
    # The lowest of 48: 6 are -inf (right), 3 are 0.1 (wrong), 6 are 0.2 (right), then 6 wrong and 6 right at 0.3.
    for share, expected in ((6 / 48, 0), (9 / 48, 3 / 9), (15 / 48, 3 / 15), (19 / 48, (3 + 2) / 19)):
        assert wrong_captions.precision_recall(wrong, right, prevalence, share)[1] == pytest.approx(expected)
    assert wrong_captions.precision_recall(wrong, wrong + 1, 0.1) == pytest.approx((1, 1))
    assert wrong_captions.precision_recall(np.zeros(3), np.zeros(5), 0.1) == pytest.approx((0.1, 0.1))  # no information


def test_images_of_the_model_get_captions_with_one_known_error(wrong_captions, monkeypatch, tmp_path):
    """Every second image follows its prompt; only such images are used, and the wrong captions are hard negatives."""
    prompts = ["a red circle", "a blue square left of a green star", "two pink hearts", "a striped cross and a star"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    calls = []

    def generated(denoiser, sampler, texts, seed):
        calls.append(seed)
        return np.stack([np.full((2, 2, 3), (prompts.index(text) + seed) % 2) for text in texts])

    monkeypatch.setattr(wrong_captions, "generated", generated)
    monkeypatch.setattr(wrong_captions, "follows", lambda truth, images, texts: (images[:, 0, 0, 0] == 1).tolist())
    monkeypatch.setattr(wrong_captions, "Sampler", lambda *_: None)
    benchmark = wrong_captions.WrongCaptionsBenchmark(
        _cli_parse_args=False, own=True, file=str(tmp_path / "p.txt"), wrong_share=0.5, seed=4
    )
    pairs = benchmark._own_pairs(None, 6, {})
    assert calls == [4, 5, 6]  # two images of each turn are used
    wrong = [pair for pair in pairs if pair.kind]
    assert len(wrong) == 3
    assert all(pair.caption not in prompts for pair in wrong)
    assert {pair.kind for pair in wrong} <= {"color", "shape", "texture", "count", "relation", "object"}
    assert all(pair.caption in prompts for pair in pairs if pair.kind is None)
    with pytest.raises(ValueError, match="after 20 images of each prompt, only 40 of 41 follow their prompts"):
        benchmark._own_pairs(None, 41, {})
    graded = {"own": True, "alignment": "clip-score@shapes"}
    with pytest.raises(ValueError, match="'clip-score@shapes' does not answer with yes or no"):
        wrong_captions.WrongCaptionsBenchmark(_cli_parse_args=False, **graded)._truth()


@pytest.fixture
def sequential(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sequential

    return sequential


def test_sequential_benchmark_replays_stored_errors(sequential):
    """Two clear winners of four: both choices find them, the one in rounds with fewer evaluations."""
    from mi_ray.information.probes import Design, draw_probes
    from mi_ray.information.sequential import choose

    probes = [draw_probes([n], 8, -4.0, 4.0, (2,), Design(levels="jittered")) for n in range(3)]
    noise = torch.Generator().manual_seed(0)
    errors = [torch.rand(4, 2, 8, generator=noise) for _ in probes]
    for of_round in errors:
        of_round[[1, 3], 0] -= 20.0  # the prompt explains candidates 1 and 3
    assert set(sequential.fixed(errors, probes, 2)) == {1, 3}
    found = choose(lambda number, rows: sequential.stored(errors, probes, number, rows), 4, 2, 0.9, 3)
    assert set(found.chosen.tolist()) == {1, 3}
    assert found.evaluations < 3 * 4 * 2 * 8
    worth = np.array([[0.0, 1.0, 0.5, 1.0]])
    row = sequential.row_of(np.repeat(worth, 2, 0), [[1, 3], [1, 3]], "some", [[1, 3], [1, 2]], 24.0, 1.0)
    assert (row["percent"], row["points_lost"], row["same_choice"]) == (87.5, 12.5, 0.75)
