"""The report on an online run's training: values per update, validations, and how the training ended."""

import pandas as pd

from mi_ray.config import folder_name
from mi_ray.report.pools import VALIDATION, declared_in, numeric, present
from mi_ray.report.statistics import prompt_mean
from mi_ray.storage import ParquetRows, exists, join, list_tables, read_json, read_lines, read_table

GUARDS = ("latent_std", "diversity", "distance_to_base", "effective_guidance")  # values of an update that are watched


def arm_folders(run_dir: str, models: list[str]) -> dict[str, str]:
    """The folder of each arm."""
    controls = [model for model in models if model not in ("base", "tuned")]
    return {"tuned": run_dir} | {arm: join(run_dir, "controls", folder_name(arm)) for arm in controls}


def online_folders(run_dir: str, models: list[str]) -> dict[str, str]:
    """The folder of each arm of an online run."""
    return {model: join(home, "online") for model, home in arm_folders(run_dir, models).items()}


def read_updates(folder: str) -> list[dict]:
    """The values of each update from training.jsonl: for each value, the last number in the update's steps."""
    # If a step was repeated, the later line counts.
    lines = {line["step"]: line for line in read_lines(join(folder, "training.jsonl"))}
    updates: dict[int, dict] = {}
    for _, line in sorted(lines.items()):
        if line.get("update") is not None:
            updates.setdefault(line["update"], {}).update(present(line))
    return [{key: line[key] for key in ("update", "reward", *GUARDS) if key in line} for line in updates.values()]


def read_validations(folder: str) -> list[dict]:
    """The validations in order of the policy's version: {version, columns: {name of a score or metric column: mean
    over the held-out prompts, as `statistics.prompt_mean`}}."""
    candidates = join(folder, "candidates")
    parts = [name for name in list_tables(candidates) if name.startswith(VALIDATION)]
    frames: dict[int, list[pd.DataFrame]] = {}
    for name in parts:
        uri = join(candidates, name)
        scores = [n for n in ParquetRows(uri).schema.names if n.startswith("score_") and not n.endswith("_se")]
        columns = [*scores, *(c.name for declared in declared_in(candidates).values() for c in declared)]
        frame = read_table(uri, ["prompt_id", *columns, "error"]).to_pandas()
        sound = numeric(frame[frame["error"].isna()].drop(columns="error"), columns)
        frames.setdefault(int(name.removeprefix(VALIDATION).split("-")[0]), []).append(sound)
    found = []
    for version, some in sorted(frames.items()):
        rows = pd.concat(some, ignore_index=True)
        means = present({name: prompt_mean(rows, name) for name in rows.columns if name != "prompt_id"})
        found.append({"version": version, "columns": means})
    return found


def read_online(run_dir: str, models: list[str]) -> dict[str, dict]:
    """The section `online` of report.json. Empty if the run has rounds instead.

    Returns:
        For each arm: updates (see `read_updates`), validations (see `read_validations`), self_score (mean reward of
        the held-out prompts, for each validated version), effective_guidance (last measured value, or null), finished
        (whether the training has ended), kept (version that is evaluated), stopped (reason for a stop before the last
        update, or null).
    """
    arms = {}
    for model, folder in online_folders(run_dir, models).items():
        updates, uri = read_updates(folder), join(folder, "adapter", "summary.json")
        summary = read_json(uri) if exists(uri) else {}
        if not updates and not summary:
            continue
        scores = sorted((int(version), value) for version, value in summary.get("validation", {}).items())
        gammas = [line["effective_guidance"] for line in updates if "effective_guidance" in line]
        arms[model] = {
            "updates": updates,
            "validations": read_validations(folder),
            "self_score": [{"version": version, "value": value} for version, value in scores],
            "effective_guidance": gammas[-1] if gammas else None,
            "finished": bool(summary),
            "kept": summary.get("version"),
            "stopped": summary.get("stopped"),
        }
    return arms
