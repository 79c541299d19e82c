"""Paths in the configs of all jobs: they become absolute, and a run continues after its inputs moved."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel

from mi_ray.config import RunConfig, folder_name, pinned, without_revision
from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.paths import SHIPPED
from mi_ray.config.rescore import RescoreConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion import folders
from mi_ray.inputs.more_prompts_config import MorePromptsConfig
from mi_ray.inputs.pair_config import ScorePairsConfig
from mi_ray.runs.folder import check_run_dir
from mi_ray.stages.pipeline import Plan, open_run
from mi_ray.training.pretrain_denoiser import PretrainConfig

LEAST = ["--run-dir", "runs/test", "--prompts.file", "prompts.txt"]
MODELS = [RunConfig, ScorePairsConfig, CalibrationConfig, RescoreConfig, PretrainConfig, MorePromptsConfig]
NO_PATHS = {
    "column",
    "prompt",
    "image_column",
    "caption_column",
    "negatives",
    "target_modules",
    "perturbed_layers",
    "phrases",
    "focus_metric",
    "rewards",
    "alignment",
    "by",
    "controls",
}


def load(*arguments: str, model: type[BaseModel] = RunConfig):
    return load_config(list(arguments), model=model)[0]


def faults(*arguments: str, model: type[BaseModel] = RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, model=model)
    return caught.value.faults


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory; its parent is the user's home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def texts(model: type[BaseModel]) -> dict[str, object]:
    """All text fields of a config and its sections, with their declarations."""
    found = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= texts(kind)
        elif kind is str or re.search(r"\bstr\b", str(kind)):
            found[name] = field
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_text_field_is_a_path_or_listed_as_no_path(model):
    plain = {name for name, field in texts(model).items() if "AfterValidator" not in repr(field)}
    assert plain <= NO_PATHS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/b", "{home}/work/a/b"),
        ("./a", "{home}/work/a"),
        ("/a", "/a"),
        ("~/a", "{home}/a"),
        ("~", "{home}"),
        ("s3://b/~/a?endpoint_override=x", "s3://b/~/a?endpoint_override=x"),
        ("gs://b/a", "gs://b/a"),
        ("file:///a", "file:///a"),
    ],
)
def test_paths_become_absolute_and_uris_stay(home, given, expected):
    expected = expected.format(home=home)
    assert load("--run-dir", given, "--prompts.file=" + given).run_dir == expected
    assert load(*LEAST, "--prompts.file=" + given, "--evaluation.file", given).prompts.file == expected
    (home / "c.yaml").write_text(json.dumps({"run_dir": given, "prompts": {"file": given}}))
    config = load("--config=~/c.yaml")
    assert (config.run_dir, config.prompts.file) == (expected, expected)
    pairs = load("--input", given, f"--run-dir={given}", model=ScorePairsConfig)
    assert (pairs.input, pairs.run_dir) == (expected, expected)
    found = load("--prompts.file=p", f"--out={given}", "--pool", given, model=CalibrationConfig)
    assert (found.out, found.pool) == (expected, expected)
    assert load("--run-dir", given, model=RescoreConfig).run_dir == expected


def test_default_paths_become_absolute(home):
    assert load("--prompts.file", "p", model=CalibrationConfig).out == str(home / "work" / "calibration.yaml")
    assert load("--image", "x.v.png", "--prompt", "a", model=ScorePairsConfig).map_file == str(
        home / "work/x.v-map.png"
    )
    remote = load("--image", "s3://b/x.png?region=a", "--prompt", "a", model=ScorePairsConfig)
    assert remote.map_file == str(home / "work" / "x-map.png")


@pytest.mark.parametrize(
    ("given", "reason"), [("", "is empty"), ("~nobody-at-all/x", "the user after ~ does not exist")]
)
def test_invalid_paths_are_refused(home, given, reason):
    (fault,) = faults(*LEAST[2:], "--run-dir", given)
    assert fault.startswith("run_dir: ")
    assert reason in fault


def test_model_names_stay_and_model_folders_become_absolute(home):
    assert {*SHIPPED} == {*folders.SHIPPED}
    for folder in ("shapes", "me/tiny"):
        assert load(*LEAST, "--model.path", folder).model.path == folder
        Path(folder).mkdir(parents=True)
    assert load(*LEAST, "--model.path", "shapes").model.path == "shapes"
    assert load(*LEAST, "--model.path", "me/tiny").model.path == str(home / "work" / "me" / "tiny")
    assert load(*LEAST, "--model.path", "me/other@main").model.path == "me/other@main"
    assert load(*LEAST, "--model.path=~/absent").model.path == str(home / "absent")
    assert load("--input", "a", "--run-dir", "b", "--model", "me/tiny", model=ScorePairsConfig).model[0] == "/"
    assert PretrainConfig(start_from="me/tiny").start_from == str(home / "work" / "me" / "tiny")
    assert PretrainConfig().start_from == ""
    assert without_revision(pinned("me/tiny", "c0ffee")) == "me/tiny"
    assert pinned("/me@x", "c0ffee") == without_revision("/me@x") == "/me@x"


def test_outputs_in_rays_working_directory_copy_are_refused(tmp_path, monkeypatch):
    """The working directory of the driver of `ray job submit --working-dir .`."""
    package = tmp_path / "ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    (package / "model").mkdir(parents=True)
    monkeypatch.chdir(package)
    assert load("--run-dir", "/shared/run", "--prompts.file", "prompts.txt").prompts.file == f"{package}/prompts.txt"
    (fault,) = faults(*LEAST)
    assert fault.startswith(f"run_dir: '{package}/runs/test' lies in Ray's copy of the working directory")
    assert "give an absolute path that all nodes share" in fault
    both = faults(*LEAST, "--model.path", "model")
    assert [fault.partition(":")[0] for fault in both] == ["run_dir", "model.path"]
    assert faults("--input", "a", "--run-dir", "s3://b/r", model=ScorePairsConfig)[0].startswith("input: ")
    (fault,) = faults("--image", "a.png", "--prompt", "a", model=ScorePairsConfig)
    assert "a-map.png' lies in" in fault
    assert load("--image", "a.png", "--prompt", "a", "--map", "/m.png", model=ScorePairsConfig).map_file == "/m.png"
    assert faults("--prompts.file", "p", model=CalibrationConfig)[0].startswith("out: ")


# ------------------------------------------------------------------------------------------ the same command again
SMOKE = [str(Path(__file__).parents[2] / "jobs/configs/shapes-smoke.yaml")]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_pipeline):
    """Make a folder with prompts and a model, and change to it."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_pipeline, folder / "models" / "tiny")
        prompts = [f"{count} {things}" for count in ("two", "three") for things in ("stars", "hearts", "circles")]
        (folder / "p.txt").write_text("\n".join(prompts) + "\n")
        monkeypatch.chdir(folder)
        return folder

    return make


def plan(*arguments: str) -> Plan:
    command = ["--config", *SMOKE, "--run-dir", "run", "--prompts.file", "p.txt", "--evaluation.file", "none"]
    command += ["--model.path", "models/tiny", "--generate.alignment", "none", "--evaluation.alignment", "none"]
    return Plan(load(*command, *arguments))


def test_run_continues_after_its_folder_moved(place, monkeypatch, tmp_path):
    folder = place("a")
    first = plan()
    open_run(first)
    assert plan().hash == first.hash
    names = [first.shards.name(i) for i in range(len(first.shards))]
    shutil.move(folder, tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    again = plan()
    assert again.config.run_dir == str(tmp_path / "b" / "run")
    assert [again.shards.name(i) for i in range(len(again.shards))] == names
    monkeypatch.chdir("/")
    b = str(tmp_path / "b")
    elsewhere = plan("--run-dir", f"{b}/run", "--prompts.file", f"{b}/p.txt", "--model.path", f"{b}/models/tiny")
    assert [elsewhere.shards.name(i) for i in range(len(elsewhere.shards))] == names


def test_changed_prompts_or_weights_are_refused(place):
    folder = place("a")
    begun = plan()
    open_run(begun)
    (folder / "p.txt").write_text("\n".join(f"four {things}" for things in ("stars", "hearts", "circles")))
    with pytest.raises(ConfigError, match=r"prompts\.file: the run folder holds a run with other prompts"):
        plan()
    weights = folder / "models/tiny/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.path: '.*tiny' has other weights than"):
        plan()
    with pytest.raises(ConfigError, match=r"model\.path was .*models/tiny' and is 'shapes'"):
        plan("--model.path", "shapes")


def test_run_of_a_version_with_relative_paths_continues(place):
    folder = place("a")
    first = plan()
    open_run(first)
    file = folder / "run" / "run.json"
    content = json.loads(file.read_text()) | {"config_hash": "0123456789ab", "model_commit": None}
    content["config"]["prompts"]["file"], content["config"]["model"]["path"] = "p.txt", "models/tiny"
    file.write_text(json.dumps(content))
    again = plan()
    assert again.hash == "0123456789ab"
    assert again.shards.name(0) != first.shards.name(0)
    open_run(again)
    assert json.loads(file.read_text())["config_hash"] == "0123456789ab"
    assert plan().hash == "0123456789ab"


def test_folder_of_a_control_has_no_path_in_its_name():
    for name in ("tuned", "random", "oracle", "clip-score", "dark_pixels:DarkPixels"):
        assert folder_name(name) == name
    names = ["blip-vqa@/models/blip", "blip-vqa@/other/blip", "pick-score@owner/name", "soft-tifa@/a b/q.jsonl@/m/x"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == 4
    assert all(re.fullmatch(r"[\w.:-]+", folder) for folder in folders)
    assert folders[0].startswith("blip-vqa-blip-")
    assert folder_name(names[0]) == folders[0]


def test_audit_with_another_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load("--input", "pairs", "--run-dir", "run", model=ScorePairsConfig)
    before = config.results_config() | {"input": "pairs"}  # stored by an earlier version
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": before}))
    check_run_dir(config.run_dir, config.results_config(), None)
    other = load("--input", "others", "--run-dir", "run", model=ScorePairsConfig)
    with pytest.raises(ConfigError, match=r"input was 'pairs' and is '.*others'"):
        check_run_dir(other.run_dir, other.results_config(), None)
