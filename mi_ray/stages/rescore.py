"""Other on-trajectory scores of a run's candidates, from the curves that it stored: nothing is generated again."""

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from tqdm import tqdm

from mi_ray import schemas, storage
from mi_ray.config import TRAJECTORY_SCORES, ScoreConfig, ScoreName
from mi_ray.diffusion.denoisers import load_schedule
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.report.statistics import within_prompt_auc
from mi_ray.report.summary import round_numbers
from mi_ray.section import ConfigError, Section
from mi_ray.stages.candidates import trajectory_scores
from mi_ray.stages.pipeline import read_run

FOLDER = "rescored"


class TrajectoryScoreConfig(ScoreConfig):
    """The scores to compute."""

    names: tuple[ScoreName, ...] = Field(TRAJECTORY_SCORES, description="on-trajectory scores, columns score_<name>")

    @field_validator("names")
    @classmethod
    def _on_trajectory(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if others := [name for name in names if name not in TRAJECTORY_SCORES]:
            raise ValueError(
                f"{', '.join(others)} cannot be had from stored curves: give some of {', '.join(TRAJECTORY_SCORES)}"
            )
        return names


class RescoreConfig(Section):
    """Score a run's stored candidates anew, by on-trajectory scores, and compare them with what the run selected by."""

    run_dir: str = Field(min_length=1, description="folder of a run, local or remote; the tables go to its rescored/")
    score: TrajectoryScoreConfig = TrajectoryScoreConfig()


def rescore(config: RescoreConfig, dry_run: bool = False) -> pd.DataFrame:
    """Write the scores of every round's candidates, part by part, and print how they do; returns that as a table.

    Raises:
        ConfigError: there is no run in the folder, or it has no candidates yet.
    """
    run, _ = read_run(config.run_dir)
    schedule, sampler = load_schedule(run.model.path), run.sampler
    spacing = sampler.timestep_spacing
    plan = solver_plan(schedule, sampler.solver, sampler.num_inference_steps, timestep_spacing=spacing)
    parts = [
        (number, name)
        for number in round_numbers(config.run_dir)
        for name in storage.list_names(storage.join(config.run_dir, f"round-{number}", "candidates"))
        if name.endswith(".parquet")
    ]
    if not parts:
        raise ConfigError([f"run_dir: {config.run_dir!r} holds no candidates yet"])
    print(f"{len(parts)} tables of candidates, {', '.join(config.score.names)}")
    columns = ["prompt_id", "candidate_index", "delta_sq", "exact", "rank", "error"]
    schema = pa.schema(
        [
            *(schemas.candidates_schema(()).field(name) for name in columns[:2]),
            *schemas.score_columns(config.score.names),
        ]
    )
    seen = []
    for number, name in () if dry_run else tqdm(parts, unit="table"):
        table = storage.read_table(storage.join(config.run_dir, f"round-{number}", "candidates", name), columns)
        rows = table.to_pandas()
        rows = rows[rows["error"].isna()]
        curves = np.full((len(rows), len(plan.timesteps)), np.nan, np.float32)
        for curve, stored in zip(curves, rows.pop("delta_sq"), strict=True):
            curve[: len(stored)] = stored  # a pruned candidate's ends early, and has no score
        scores = trajectory_scores(config.score, torch.from_numpy(curves), plan.timesteps, schedule)
        rows = rows.assign(**{f"score_{score}": values.numpy() for score, values in scores.items()})
        destination = storage.join(config.run_dir, FOLDER, f"round-{number}", name)
        storage.write_table(destination, pa.Table.from_pandas(rows[schema.names], schema, preserve_index=False))
        seen.append(rows.drop(columns="error").assign(round=number))
    if not seen:
        return pd.DataFrame()
    shown = _compared(pd.concat(seen, ignore_index=True), config.score.names)
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="-"))
    print(f"tables: {storage.join(config.run_dir, FOLDER)}")
    return shown


def _compared(candidates: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Of every score: how often its first choice is the run's, and the AUC within prompts where candidates are
    measured."""
    pools = candidates.groupby(["round", "prompt_id"])
    chosen = candidates.loc[pools["rank"].idxmin(), "candidate_index"].to_numpy()
    rows = []
    for name in names:
        values = candidates[f"score_{name}"].replace([np.inf, -np.inf], np.nan).fillna(-np.inf)
        first = candidates.assign(value=values).loc[lambda c: c.groupby(["round", "prompt_id"])["value"].idxmax()]
        row = {"score": name, "prompts": len(pools), "same first choice": (first["candidate_index"] == chosen).mean()}
        found = within_prompt_auc(candidates, f"score_{name}")
        rows.append(row | {"AUC within prompts": found["value"] if found else None})
    return pd.DataFrame(rows)
