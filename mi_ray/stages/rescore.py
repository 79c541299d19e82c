"""Compute other on-trajectory scores of a run's candidates from its stored curves. Nothing is generated again."""

from itertools import groupby

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from tqdm import tqdm

from mi_ray import storage
from mi_ray.config.rescore import RescoreConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.folders import load_schedule
from mi_ray.diffusion.sampling import solver_plan
from mi_ray.report.pools import declared_in, round_numbers
from mi_ray.report.rescored import Comparison
from mi_ray.runs.layout import read_run
from mi_ray.scoring.scorer import trajectory_scores
from mi_ray.storage import tables

FOLDER = "rescored"


def rescore(config: RescoreConfig, dry_run: bool = False) -> pd.DataFrame:
    """Write the scores of the candidates of every round, part by part; print and return a table that compares them.

    Raises:
        ConfigError: the folder holds no run, or an online run, or the run has no candidates yet.
    """
    run, _ = read_run(config.run_dir)
    if run.online.updates:
        message = f"run_dir: {config.run_dir!r} is an online run, which stores no curves; use a run in rounds"
        raise ConfigError([message])
    schedule, sampler = load_schedule(run.model.path, run.model.size), run.sampler
    plan = solver_plan(schedule, sampler.solver, sampler.num_inference_steps, sampler.timestep_spacing)
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
    columns = ["prompt_id", "candidate_index", "delta_sq", "cross", *(t.name for t in truths), "rank", "error"]
    schema = pa.schema(
        [
            *(tables.candidates_schema(()).field(name) for name in columns[:2]),
            *tables.score_columns(config.score.names),
        ]
    )
    comparison = Comparison(config.score.names, truths)
    with tqdm(total=len(parts), unit="table") as progress:
        for name, rounds in groupby(parts, lambda part: part[0]):
            seen = []
            for _, number in rounds:
                rows = storage.read_table(storage.join(folders[number], name), columns).to_pandas()
                rows = rows[rows["error"].isna()]
                curves = np.full((2, len(rows), len(plan.timesteps)), np.nan, np.float32)
                for name_of, of_rows in zip(("delta_sq", "cross"), curves, strict=True):
                    for curve, stored in zip(of_rows, rows.pop(name_of), strict=True):
                        curve[: len(stored)] = stored  # the curve of a pruned candidate ends early; it gets no score
                delta_sq, cross = torch.from_numpy(curves)
                known = delta_sq, plan.timesteps, schedule, cross, sampler.guidance_scale
                scores = trajectory_scores(config.score, *known)
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
