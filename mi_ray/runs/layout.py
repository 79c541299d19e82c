"""The paths of a run's outputs, from its config. It imports no model code, so that jobs/status.py starts fast."""

from pydantic import ValidationError

from mi_ray import storage
from mi_ray.config import RunConfig, folder_name, pinned, without_revision
from mi_ray.config.section import ConfigError

REFERENCE = "reference"  # real images, evaluated like a model
SUMMARY = "summary.json"  # in an adapter's folder, written last: the adapter is complete
LESS_BASELINE = "adapter-less-baseline"
ONLINE = "online"  # folder in an arm's folder: the output of an online run, in place of rounds
CANDIDATES = "candidates"
POLICIES = "policies"  # in the folder of an online arm: the versions of the policy that were validated
SCORES = "scores"  # folder of a run of jobs/score.py


def read_run(run_dir: str) -> tuple[RunConfig, dict]:
    """The config of the run in a folder, and the content of its run.json.

    Raises:
        ConfigError: the folder has no run, or a run of another job.
    """
    content = read_content(run_dir)
    try:
        config = RunConfig.model_validate(content["config"] | {"run_dir": run_dir})
    except ValidationError as error:
        message = f"run_dir: {run_dir!r} holds no run of jobs/pipeline.py; use the --run-dir of one"
        raise ConfigError([message]) from error
    model = config.model.model_copy(update={"path": pinned(config.model.path, content.get("model_commit"))})
    return config.model_copy(update={"model": model}), content


def read_content(run_dir: str) -> dict:
    """The content of run.json of any job: config, config_hash, versions.

    Raises:
        ConfigError: the folder has no run.json.
    """
    try:
        storage.check_reachable(run_dir)  # the first request of every job is here
        return storage.read_json(storage.join(run_dir, "run.json"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"run_dir: {run_dir!r} holds no run ({error}); use the --run-dir of a run"]) from error


def began_hash(run_dir: str, new: str) -> str:
    """The hash in the names of a run's parts: the one in run.json, or `new` if the run has not started.

    The stored hash may differ for the same results: an earlier version also hashed the paths of files.
    """
    try:
        return read_content(run_dir).get("config_hash", new)
    except ConfigError:
        return new


def pinned_at_start(run_dir: str, model: str) -> str:
    """A hub id, pinned to the commit with which the run in the folder started, unless the user pins it."""
    try:
        commit = read_content(run_dir).get("model_commit")
    except ConfigError:  # the run has not started, or check_run_dir reports the fault
        commit = None
    return pinned(model, commit) if model == without_revision(model) else model


def home_of(run_dir: str, arm: str) -> str:
    """The folder of an arm, with its rounds."""
    return run_dir if arm == "tuned" else storage.join(run_dir, "controls", folder_name(arm))


def selects_by(config: RunConfig, arm: str) -> str:
    return config.select.by if arm == "tuned" else arm


def takes_baseline(config: RunConfig, r: int, by: str) -> bool:
    """Whether the baseline is subtracted: only in the last round, because earlier adapters must keep their rank."""
    return bool(config.finetune.baseline) and r == config.rounds - 1 and by != "random"


def baselines(config: RunConfig) -> list[tuple[str, str]]:
    """(name, folder) of each baseline that is trained besides the arms."""
    last, arms = config.rounds - 1, ["tuned", *config.evaluation.controls]
    takers = [arm for arm in arms if takes_baseline(config, last, selects_by(config, arm))]
    if last:
        return [(f"baseline of {arm}, round {last}", baseline_folder(config.run_dir, arm, last)) for arm in takers]
    shared = baseline_folder(config.run_dir, "tuned", 0)
    return [("baseline, round 0", shared)] if takers and "random" not in arms else []


def baseline_folder(run_dir: str, arm: str, r: int) -> str:
    """The folder of an arm's baseline. In the first round all arms share one pool, so the baseline of each is the
    random control."""
    return storage.join(home_of(run_dir, arm if r else "random"), f"round-{r}", *(["baseline"] if r else []))


def final_adapter(config: RunConfig, arm: str) -> str:
    """The folder of the adapter that a finished run evaluates for an arm."""
    if config.online.updates:
        return storage.join(online_folder(config.run_dir, arm), "adapter")
    last = config.rounds - 1
    name = LESS_BASELINE if takes_baseline(config, last, selects_by(config, arm)) else "adapter"
    return storage.join(home_of(config.run_dir, arm), f"round-{last}", name)


def online_folder(run_dir: str, arm: str) -> str:
    """The folder of an arm of an online run."""
    return storage.join(home_of(run_dir, arm), ONLINE)


def policy_folder(online: str, version: int) -> str:
    """The adapter folder of a version of an online arm's policy."""
    return storage.join(online, POLICIES, f"version-{version:05d}")
