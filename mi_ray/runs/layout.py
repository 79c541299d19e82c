"""Where a run's stages leave what, from its config alone. Quick to import, so that the status waits for no model."""

from pydantic import ValidationError

from mi_ray import storage
from mi_ray.config import RunConfig, pinned, without_revision
from mi_ray.config.section import ConfigError

REFERENCE = "reference"  # real renders, evaluated like a model
SUMMARY = "summary.json"  # of an adapter's folder, written last: it marks the adapter complete
LESS_BASELINE = "adapter-less-baseline"
ONLINE = "online"  # of an arm: what an online run leaves in the place of rounds
CANDIDATES = "candidates"
POLICIES = "policies"  # of an online arm: the versions that were validated
SCORES = "scores"  # of a run of jobs/score.py


def read_run(run_dir: str) -> tuple[RunConfig, dict]:
    """The config of the run in a folder, and all that its run.json says.

    Raises:
        ConfigError: there is no run in the folder, or one of another job.
    """
    content = read_content(run_dir)
    try:
        config = RunConfig.model_validate(content["config"] | {"run_dir": run_dir})
    except ValidationError as error:
        message = f"run_dir: {run_dir!r} holds no run of jobs/pipeline.py"
        raise ConfigError([message]) from error
    model = config.model.model_copy(update={"path": pinned(config.model.path, content.get("model_commit"))})
    return config.model_copy(update={"model": model}), content


def read_content(run_dir: str) -> dict:
    """What run.json says, of whatever job: config, config_hash, versions.

    Raises:
        ConfigError: there is none in the folder.
    """
    try:
        return storage.read_json(storage.join(run_dir, "run.json"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"run_dir: {run_dir!r} holds no run ({error}); give the --run-dir of one"]) from error


def began_hash(run_dir: str, new: str) -> str:
    """The hash that names a run's parts: the one that the folder began with, or a new run's.

    The two may differ though the same counts: an earlier version hashed the paths of files too.
    """
    try:
        return read_content(run_dir).get("config_hash", new)
    except ConfigError:
        return new


def as_it_began(run_dir: str, model: str) -> str:
    """A model from the hub, pinned to the commit that the run in the folder began with, unless the user pins it."""
    try:
        commit = read_content(run_dir).get("model_commit")
    except ConfigError:  # it has not begun, or check_run_dir tells what is wrong
        commit = None
    return pinned(model, commit) if model == without_revision(model) else model


def home_of(run_dir: str, arm: str) -> str:
    """The folder of an arm's rounds."""
    return run_dir if arm == "tuned" else storage.join(run_dir, "controls", arm)


def selects_by(config: RunConfig, arm: str) -> str:
    return config.select.by if arm == "tuned" else arm


def takes_baseline(config: RunConfig, r: int, by: str) -> bool:
    """The last round's adapter alone: an earlier one is the start of the next and keeps its rank."""
    return bool(config.finetune.baseline) and r == config.rounds - 1 and by != "random"


def baselines(config: RunConfig) -> list[tuple[str, str]]:
    """Of the baselines that are trained beside all arms: what each is called, and its folder."""
    last, arms = config.rounds - 1, ["tuned", *config.evaluation.controls]
    takers = [arm for arm in arms if takes_baseline(config, last, selects_by(config, arm))]
    if last:
        return [(f"baseline of {arm}, round {last}", baseline_folder(config.run_dir, arm, last)) for arm in takers]
    shared = baseline_folder(config.run_dir, "tuned", 0)
    return [("baseline, round 0", shared)] if takers and "random" not in arms else []


def baseline_folder(run_dir: str, arm: str, r: int) -> str:
    """Where an arm's baseline lies. In the first round every arm has the same pool, and what learns there at random is
    the random control itself."""
    return storage.join(home_of(run_dir, arm if r else "random"), f"round-{r}", *(["baseline"] if r else []))


def final_adapter(config: RunConfig, arm: str) -> str:
    """The folder of the adapter with which a finished run evaluates an arm."""
    if config.online.updates:
        return storage.join(online_folder(config.run_dir, arm), "adapter")
    last = config.rounds - 1
    name = LESS_BASELINE if takes_baseline(config, last, selects_by(config, arm)) else "adapter"
    return storage.join(home_of(config.run_dir, arm), f"round-{last}", name)


def online_folder(run_dir: str, arm: str) -> str:
    """Where an arm of an online run lies."""
    return storage.join(home_of(run_dir, arm), ONLINE)


def policy_folder(online: str, version: int) -> str:
    """Where an online arm keeps a version of its policy, as an adapter's folder."""
    return storage.join(online, POLICIES, f"version-{version:05d}")
