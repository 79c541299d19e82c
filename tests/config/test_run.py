import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from mi_ray.config import RunConfig
from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError, flatten
from mi_ray.inputs.pair_config import ScorePairsConfig

ROOT = Path(__file__).parents[2]
LEAST = ("--run-dir", "runs/test", "--prompts.file", "prompts.txt")


def load(*arguments: str) -> RunConfig:
    return load_config(list(arguments))[0]


def faults(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return caught.value.faults


@pytest.fixture
def config_file(tmp_path):
    def write(content: str) -> str:
        (tmp_path / "config.yaml").write_text(content)
        return str(tmp_path / "config.yaml")

    return write


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """The dotted names of all fields with a value."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += fields(kind, f"{prefix}{name}.") if nested else [prefix + name]
    return names


# ------------------------------------------------------------------------------------------ flags and files
@pytest.mark.parametrize(
    "flag",
    [
        ("--resources.batch_size", "4"),
        ("--resources.batch-size", "4"),
        ("--resources.batch_size=4",),
        ("--resources.batch-size=4",),
    ],
)
def test_flags_with_hyphens_and_underscores(flag):
    assert load(*LEAST, *flag).resources.batch_size == 4


@pytest.mark.parametrize("value", ["pmi,mitune", '["pmi", "mitune"]'])
def test_lists(value):
    assert load(*LEAST, "--score.names", value).score.names == ("pmi", "mitune")


@pytest.mark.parametrize("field", ["train_workers", "num_actors"])
@pytest.mark.parametrize(("value", "workers"), [("3", (3, 3)), ("1,3", (1, 3))])
def test_number_of_workers_is_a_number_or_a_range(field, value, workers, config_file):
    assert getattr(load(*LEAST, f"--resources.{field}", value).resources, field) == workers
    file = config_file(f"resources: {{{field}: {value if value.isdecimal() else f'[{value}]'}}}")
    assert getattr(load(*LEAST, "--config", file).resources, field) == workers


def test_flags_override_the_file_field_by_field(config_file):
    file = config_file("run_dir: a\nprompts: {file: p.txt, limit: 8}\nsampler: {solver: ddim, guidance_scale: 3}\n")
    config = load(
        "--config", file, "--sampler.guidance-scale", "5", "--prompts.limit", "none", "--evaluation.pmi", "false"
    )
    assert (Path(config.run_dir).name, Path(config.prompts.file).name, config.prompts.limit) == ("a", "p.txt", None)
    assert (config.sampler.solver, config.sampler.guidance_scale) == ("ddim", 5)
    assert config.sampler.num_inference_steps == RunConfig.model_fields["sampler"].default.num_inference_steps
    assert config.evaluation.pmi is False


def test_partly_set_section_keeps_its_other_defaults():
    sampler = load(*LEAST, "--evaluation.sampler.guidance-scale", "3").evaluation.sampler
    assert (sampler.solver, sampler.num_inference_steps, sampler.guidance_scale) == ("ddim", 50, 3)


def test_none_in_a_file_is_no_value(config_file):
    assert load("--config", config_file("run_dir: a\nprompts: {file: p.txt, limit: none}")).prompts.limit is None


def test_none_empties_a_list(config_file):
    file = config_file("run_dir: a\nprompts: {file: p}\nevaluation: {controls: none}\nfinetune: {log_to: [wandb]}\n")
    config = load("--config", file, "--finetune.log-to", "none")
    assert (config.evaluation.controls, config.finetune.log_to) == ((), ())


def test_none_replaces_a_pair_of_a_file(config_file):
    file = config_file(
        "run_dir: a\nprompts: {file: p}\nsampler: {guidance_interval: [-20, -1]}\n"
        "score: {names: [pmi]}\nselect: {by: pmi}\n"
    )
    assert load("--config", file).sampler.guidance_interval == (-20, -1)
    assert load("--config", file, "--sampler.guidance-interval", "none").sampler.guidance_interval is None


def test_the_student_is_the_demo_without_guidance():
    files = [str(Path(__file__).parents[2] / "jobs" / "configs" / f"shapes{name}.yaml") for name in ("", "-student")]
    demo = load("--config", files[0])
    config = load("--config", files[0], "--config", files[1])
    assert (config.sampler.branches, config.finetune.anchor_guidance) == (1, demo.evaluation.sampler.guidance_scale)
    assert config.evaluation.samplers.keys() == {1.0, 1.5, 4.0}
    assert config.finetune.target_modules == demo.finetune.target_modules


def test_later_config_file_overrides_earlier_ones(config_file, tmp_path):
    first = config_file("run_dir: a\nprompts: {file: p.txt, limit: 8}\nscore: {log_snr_min: -4, num_samples: 3}\n")
    second = tmp_path / "calibration.yaml"
    second.write_text("score: {log_snr_min: -3, log_snr_max: -1}\n")
    config = load("--config", first, "--config", str(second))
    assert (config.score.log_snr_min, config.score.log_snr_max, config.score.num_samples) == (-3, -1, 3)
    assert config.prompts.limit == 8


def test_dry_run_and_the_smoke_file(config_file):
    file = config_file("run_dir: a\nprompts: {file: smoke.txt}")
    config, dry_run = load_config(["--smoke", "--dry-run"], smoke_file=file)
    assert (Path(config.prompts.file).name, dry_run) == ("smoke.txt", True)
    assert load_config([*LEAST], smoke_file=file)[1] is False


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "configs").glob("shapes*.yaml")), ids=lambda path: path.name)
def test_configs_of_the_repository_are_valid(path):
    first = ("--config", str(path.with_name("shapes.yaml"))) if path.stem == "shapes-student" else ()
    config = load(*first, "--config", str(path))
    assert (ROOT / config.prompts.file).is_file()
    assert config.evaluation.file is None or (ROOT / config.evaluation.file).is_file()


def test_calibration_config_is_valid():
    config, _ = load_config(["--config", str(ROOT / "jobs/configs/calibrate-smoke.yaml")], model=CalibrationConfig)
    assert (ROOT / config.prompts.file).is_file()


# ------------------------------------------------------------------------------------------ faults
def test_all_faults_are_reported_together(config_file):
    file = config_file("run_dir: a\nprompt: {file: p.txt}\nsampler: {solver: euler, guidence_scale: 3}\nseed: many\n")
    text = faults("--config", file, "--select.top-k", "0", "--rounds.count", "3", "extra")
    assert sorted(fault.partition(":")[0] for fault in text) == [
        *("--rounds.count", "extra", "prompt", "prompts.file"),
        *("sampler.guidence_scale", "sampler.solver", "seed", "select.top_k"),
    ]
    text = "\n".join(text)
    assert "sampler.solver: 'euler' is not valid; input should be 'ddpm', 'ddim', 'dpm++2m' or 'dpm++2m-sde'" in text
    assert "prompts.file: missing; set it in the config file or with --prompts.file" in text


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("--resources.batchsize=4", "did you mean 'resources.batch_size'?"),
        ("--batch-size=4", "did you mean 'finetune.batch_size' or 'resources.batch_size'?"),
        ("--genrate.candidates-per-prompt=4", "did you mean 'generate.candidates_per_prompt'?"),
        ("--evaluation.sampler.guidance=4", "did you mean 'evaluation.sampler.guidance_scale'?"),
        ("--learning-rate=1", "did you mean 'finetune.learning_rate'?"),
        ("--zebra=4", "remove it (--help lists every field)"),
    ],
)
def test_unknown_flags_are_refused_with_a_suggestion(argument, suggestion):
    (fault,) = faults(*LEAST, argument)
    assert fault.startswith(argument)
    assert fault.endswith(suggestion)


@pytest.mark.parametrize(
    "given",
    [("clip-score", "pick-score"), ("clip-score,pick-score",), ('["clip-score", "pick-score"]',)],
)
def test_a_list_has_one_or_several_values(given):
    required = ("--run-dir", "a", "--prompts.file", "p.txt")
    config, _ = load_config([*required, "--evaluation.alignment", *given, "--evaluation.guidance_scales", "2", "4"])
    assert config.evaluation.alignment == ("clip-score", "pick-score")
    assert config.evaluation.guidance_scales == (2, 4)
    with pytest.raises(ConfigError, match="3: is not the value of any flag"):
        load_config([*required, "--seed", "2", "3"])


def test_unknown_keys_are_refused_with_a_suggestion(config_file):
    file = config_file("run_dir: a\nprompts: {file: p.txt, limits: 3}\nfinetunes: {rank: 4}\n")
    assert faults("--config", file) == [
        "prompts.limits: unknown key; did you mean 'prompts.limit'?",
        "finetunes: unknown key; did you mean 'finetune'?",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("stray",), "stray: is not the value of any flag"),
        (("--seed",), "--seed: expected one argument"),
        (("--seed", "-1"), "seed: '-1' is not valid"),
        (("--run-dir", ""), "run_dir: the path is empty"),
        (("--sampler.guidance_scale", "nan"), "sampler.guidance_scale: 'nan' is not valid"),
        (("--score.log-snr-min", "-1"), "score: log_snr_min is -1.0, but it must be below log_snr_max, -1.7"),
        (("--score.antithetic", "true", "--score.num-samples", "5"), "score: num_samples is 5, but antithetic"),
        (
            ("--score.sampling", "logistic", "--score.logistic-loc", "9"),
            "logistic_loc is 9.0, and no log SNR within its clip lies in",
        ),
        (("--resources.num_actors", "3,2"), "resources: num_actors is (3, 2), but it must be (minimum, maximum)"),
        (("--resources.train_workers", "3,2"), "resources: train_workers is (3, 2), but it must be (minimum, maximum)"),
        (("--resources.train_workers", "2,64"), "gradient_accumulation is 50, so some of the 64 workers"),
        (("--select.by", "pmi"), "select.by is 'pmi', but this score is not computed"),
        (("--select.by", "oracle"), "select.by is 'oracle', but this is not random, not a score and not a measured"),
        (("--select.by", "pmmi"), "take one of mitune, "),
        (
            ("--evaluation.controls", "oracle"),
            "evaluation.controls has 'oracle', but this is not random and not a measured metric",
        ),
        (("--evaluation.controls", "mitune"), "evaluation.controls has 'mitune'"),
        (("--generate.alignment", "a:B,oracle,a:B"), "'a:B' is listed more than once; list each metric once"),
        (("--select.top-k", "50"), "there are only 50 candidates per prompt"),
    ],
)
def test_invalid_values_are_refused(arguments, expected):
    (fault,) = faults(*LEAST, *arguments)
    assert expected in fault


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run_dir: [", "is not YAML"),
        ("- a\n- b", "is not a mapping"),
        ("run_dir: a\nprompts: p.txt", "prompts: 'p.txt' is not valid, because this is a section"),
        (None, "cannot be read"),
    ],
)
def test_invalid_config_files_are_refused(config_file, tmp_path, content, expected):
    file = str(tmp_path / "none.yaml") if content is None else config_file(content)
    (fault,) = faults("--config", file)
    assert expected in fault


# ------------------------------------------------------------------------------------------ the command
def pipeline(*arguments: str) -> subprocess.CompletedProcess:
    code = (
        "from mi_ray.config.command_line import run_command; run_command(lambda config, dry_run: print(config.run_dir))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_lists_every_field():
    done = pipeline("--help")
    assert done.returncode == 0
    for name in fields():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"^  {re.escape(flag)}\s", done.stdout, re.MULTILINE), flag


def test_every_field_is_described():
    def undescribed(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(RunConfig)) == []


def test_exit_codes_and_messages():
    done = pipeline(*LEAST)
    assert (done.returncode, done.stdout) == (0, f"{ROOT}/runs/test\n")
    done = pipeline("--run-dirr", "a", "--seed", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [
        ["error:", "--run-dirr:"], ["error:", "run_dir:"], ["error:", "seed:"], ["error:", "prompts.file:"]
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ the hash
def test_hash_ignores_paths_and_resources():
    base = load(*LEAST).hash()
    assert re.fullmatch("[0-9a-f]{12}", base)
    moved = ("--run-dir", "elsewhere", "--prompts.file", "prompts.txt", "--resources.batch-size", "3")
    assert load(*moved, "--resources.num_actors", "2,4").hash() == base
    assert load(*LEAST, "--seed", "1").hash() != base
    assert load(*LEAST, "--evaluation.sampler.num-inference-steps", "10").hash() != base


def test_hash_includes_the_image_size_only_if_set():
    base, larger = load(*LEAST), load(*LEAST, "--model.height", "128")
    assert larger.hash() != base.hash()
    assert larger.results_config()["model"] == {"path": "shapes", "height": 128, "dtype": "auto"}
    assert base.results_config()["model"] == {"path": "shapes", "dtype": "auto"}
    assert RunConfig.model_validate(larger.model_dump(mode="json")) == larger
    pairs = {"input": "pairs", "run_dir": "audit"}
    alone, wide = (ScorePairsConfig(**pairs, **size) for size in ({}, {"width": 96}))
    assert set(wide.results_config()) - set(alone.results_config()) == {"width"}
    assert wide.hash() != alone.hash()


def test_hash_includes_guidance_methods_only_if_set():
    base, same = load(*LEAST), load(*LEAST, "--sampler.guidance-settings.contrastive-scale", "2")
    assert same.hash() == base.hash()
    assert not {"guidance_method", "guidance_settings", "best_of"} & base.results_config()["sampler"].keys()
    contrastive = load(*LEAST, "--sampler.guidance-method", "contrastive")
    other = load(
        *LEAST, "--sampler.guidance-method", "contrastive", "--sampler.guidance-settings.contrastive-scale", "2"
    )
    best = load(*LEAST, "--evaluation.sampler.best-of.candidates", "4")
    assert len({config.hash() for config in (base, contrastive, other, best)}) == 4
    for config in (contrastive, best):
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sampler.guidance-method", "structured"), "structured, but mitune needs the model's own prediction"),
        (("--sampler.guidance-method", "semantic", "--model.compile", "default"), "reads the attention layers"),
        (
            (
                "--sampler.guidance-method",
                "cfg-zero-star",
                "--score.names",
                "rfmi_guided",
                "--select.by",
                "rfmi_guided",
            ),
            "rfmi_guided assumes classifier-free guidance",
        ),
        (("--evaluation.sampler.guidance-method", "semantic", "--evaluation.guidance-scales", "1"), "remove 1"),
        (("--sampler.guidance-method", "contrastive", "--sampler.guidance-scale", "1"), "but it needs guidance"),
    ],
)
def test_guidance_methods_that_do_not_suit_a_run_are_refused(flags, message):
    assert any(message in fault for fault in faults(*LEAST, *flags))


def test_hash_is_equal_after_a_yaml_round_trip(config_file):
    config = load(*LEAST, "--score.names", "pmi,mitune", "--finetune.learning-rate", "3e-5")
    file = config_file(yaml.safe_dump(config.model_dump(mode="json")))
    assert load("--config", file) == config
    assert load("--config", file).hash() == config.hash()


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load(*LEAST).seed = 3


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


@pytest.mark.parametrize("uri", ["s3://id:word@bucket/x", "s3://id:wo/rd@bucket/x", "s3://bucket/x?session_token=word"])
def test_credentials_are_refused_and_not_repeated(uri):
    with pytest.raises(ConfigError) as reported:
        load_config(["--run-dir", uri, "--prompts.file", "prompts.txt"])
    assert "credentials" in str(reported.value)
    assert "rd@" not in str(reported.value)
    assert "word" not in str(reported.value)


@pytest.mark.parametrize(("value", "scales"), [("4", (3, 4)), ("4,1", (1, 3, 4)), ("none", (3,)), ("3,3", (3,))])
def test_evaluation_samplers_have_all_guidance_scales(value, scales):
    sampler = ("--evaluation.sampler.guidance-scale", "3")
    evaluation = load(*LEAST, *sampler, "--evaluation.guidance_scales", value).evaluation
    assert tuple(evaluation.samplers) == scales
    assert all(sampler.guidance_scale == scale for scale, sampler in evaluation.samplers.items())


def test_scores_with_both_branches_need_guidance():
    with pytest.raises(ConfigError) as error:
        load(*LEAST, "--sampler.guidance-scale", "1")
    assert "sampler.guidance_scale is 1, but mitune needs both branches" in str(error.value)
    least = (*LEAST, "--score.names", "pmi_negatives", "--select.by", "pmi_negatives")
    assert load(*least, "--sampler.guidance-scale", "1").sampler.branches == 1


def test_a_run_without_a_score_is_refused():
    given = faults(*LEAST, "--score.names", "none", "--select.by", "oracle", "--generate.alignment", "oracle")
    assert given == ["score: names is empty, but the report shows a score: give at least one"]


def test_online_run_refuses_scores_that_need_a_list_of_prompts():
    online = ("--online.updates", "1", "--finetune.method", "nft", "--select.by", "pmi", "--score.names")
    assert load(*LEAST, *online, "pmi,pmi_negatives").online.updates == 1
    (fault,) = faults(*LEAST, *online, "pmi,pmi_contrastive")
    assert fault.startswith("score.names has pmi_contrastive, but an online run has no list of prompts to compare with")
