"""Compute other on-trajectory scores of a run's candidates from its stored curves. Nothing is generated again."""

from itertools import groupby

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from tqdm import tqdm

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config import TRAJECTORY_SCORES, ScoreConfig, ScoreName
from mi_ray.config.paths import SharedPath
from mi_ray.config.section import ConfigError, Section
from mi_ray.diffusion.folders import load_schedule
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.report.pools import declared_in, round_numbers
from mi_ray.report.statistics import PromptAverage, prompt_aucs
from mi_ray.runs.layout import read_run
from mi_ray.scoring.scorer import trajectory_scores
from mi_ray.storage import tables

FOLDER = "rescored"


class TrajectoryScoreConfig(ScoreConfig):
    """The scores to compute."""

    names: tuple[ScoreName, ...] = Field(TRAJECTORY_SCORES, description="on-trajectory scores, columns score_<name>")

    @field_validator("names")
    @classmethod
    def _on_trajectory(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if others := [name for name in names if name not in TRAJECTORY_SCORES]:
            raise ValueError(
                f"{', '.join(others)} cannot be computed from stored curves; use one or more of"
                f" {', '.join(TRAJECTORY_SCORES)}"
            )
        return names


class RescoreConfig(Section):
    """Compute other on-trajectory scores of a run's stored candidates, and compare them with the run's selection."""

    run_dir: SharedPath = Field(description="folder of a run, local or remote; tables are written to its rescored/")
    score: TrajectoryScoreConfig = TrajectoryScoreConfig()


def rescore(config: RescoreConfig, dry_run: bool = False) -> pd.DataFrame:
    """Write the scores of the candidates of every round, part by part; print and return a table that compares them.

    Raises:
        ConfigError: the folder holds no run, or the run has no candidates yet.
    """
    run, _ = read_run(config.run_dir)
    schedule, sampler = load_schedule(run.model.path), run.sampler
    spacing = sampler.timestep_spacing
    plan = solver_plan(schedule, sampler.solver, sampler.num_inference_steps, timestep_spacing=spacing)
    folders = {
        number: storage.join(config.run_dir, f"round-{number}", "candidates")
        for number in round_numbers(config.run_dir)
    }
    parts = sorted((name, number) for number, folder in folders.items() for name in storage.list_tables(folder))
    if not parts:
        raise ConfigError(
            [f"run_dir: {config.run_dir!r} holds no candidates yet; wait until the run has generated some"]
        )
    print(f"{len(parts)} tables of candidates, {', '.join(config.score.names)}")
    if dry_run:
        return pd.DataFrame()
    truths = [columns[0] for columns in declared_in(folders[parts[0][1]]).values()]
    columns = ["prompt_id", "candidate_index", "delta_sq", *(t.name for t in truths), "rank", "error"]
    schema = pa.schema(
        [
            *(tables.candidates_schema(()).field(name) for name in columns[:2]),
            *tables.score_columns(config.score.names),
        ]
    )
    comparison = _Comparison(config.score.names, truths)
    with tqdm(total=len(parts), unit="table") as progress:
        for name, rounds in groupby(parts, lambda part: part[0]):
            seen = []
            for _, number in rounds:
                rows = storage.read_table(storage.join(folders[number], name), columns).to_pandas()
                rows = rows[rows["error"].isna()]
                curves = np.full((len(rows), len(plan.timesteps)), np.nan, np.float32)
                for curve, stored in zip(curves, rows.pop("delta_sq"), strict=True):
                    curve[: len(stored)] = stored  # the curve of a pruned candidate ends early; it gets no score
                scores = trajectory_scores(config.score, torch.from_numpy(curves), plan.timesteps, schedule)
                rows = rows.assign(**{f"score_{score}": values.numpy() for score, values in scores.items()})
                destination = storage.join(config.run_dir, FOLDER, f"round-{number}", name)
                table = pa.Table.from_pandas(rows[schema.names], schema, preserve_index=False)
                storage.write_table(destination, table)
                seen.append(rows.drop(columns="error").assign(round=number))
                progress.update()
            comparison.add(pd.concat(seen, ignore_index=True))
    shown = comparison.table()
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="-"))
    print(f"tables: {storage.join(config.run_dir, FOLDER)}")
    return shown


class _Comparison:
    """For every score: how often its best candidate is that of the run, and the AUC within prompts for each metric."""

    def __init__(self, names: tuple[str, ...], truths: list[Column]):
        self.pools, self.same, self.truths = 0, dict.fromkeys(names, 0), truths
        self.aucs = {name: [PromptAverage() for _ in truths] for name in names}

    def add(self, candidates: pd.DataFrame):
        """Add the complete pools of new prompts, from all rounds."""
        pools = candidates.groupby(["round", "prompt_id"])
        chosen = candidates.loc[pools["rank"].idxmin(), "candidate_index"].to_numpy()
        self.pools += len(pools)
        for name, aucs in self.aucs.items():
            column = f"score_{name}"
            values = candidates[column].replace([np.inf, -np.inf], np.nan).fillna(-np.inf)
            first = candidates.assign(value=values).loc[lambda c: c.groupby(["round", "prompt_id"])["value"].idxmax()]
            self.same[name] += int((first["candidate_index"] == chosen).sum())
            for truth, average in zip(self.truths, aucs, strict=True):
                average.add(prompt_aucs(candidates, column, truth), "auc")

    def table(self) -> pd.DataFrame:
        rows = []
        for name, aucs in self.aucs.items():
            same = self.same[name] / self.pools if self.pools else None
            row = {"score": name, "prompts": self.pools, "same first choice": same}
            for truth, average in zip(self.truths, aucs, strict=True):
                row[f"AUC within prompts, {truth.name}"] = (average.result() or {"value": None})["value"]
            rows.append(row)
        return pd.DataFrame(rows)
