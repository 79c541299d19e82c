"""Ranking and selection, compared with known orders."""

import numpy as np
import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.alignment.oracle import Oracle
from mi_ray.config import RunConfig, SelectConfig
from mi_ray.config.section import ConfigError
from mi_ray.storage import tables
from mi_ray.training.select import keeps, ranks, select

COLUMNS = {
    "prompt_id": ["p"] * 4,
    "candidate_index": [0, 1, 2, 3],
    "score_pmi": [0.5, float("nan"), 2.0, -1.0],
    "exact": [0.0, 1.0, 0.0, 0.0],
    "objects": [0.5, 1.0, 1.0, 0.5],
    "attributes": [0.9, 1.0, 1.0, 0.5],
    "relation": [None, 1.0, 0.0, None],
}


def test_highest_score_ranks_first_and_non_finite_last():
    assert ranks(COLUMNS, "pmi", 0) == [1, 3, 0, 2]


def test_oracle_ranks_exact_images_first():
    columns = COLUMNS | {"count": [1.0, 0.0, 1.0, 1.0]}  # a column of the oracle that is not used for selection
    assert ranks(columns, "oracle", 0, Oracle.columns) == [2, 0, 1, 3]


def test_metric_ranks_by_its_columns_in_order_and_direction():
    declared = (Column("dark", "pixels", higher_is_better=False), Column("sharp", "any", nullable=True))
    columns = COLUMNS | {"dark": [3.0, 1.0, 1.0, 1.0], "sharp": [9.0, None, 0.1, float("nan")]}
    found = ranks(columns, "m:Dark", 0, declared)
    assert found.index(0) == 2  # fewest dark pixels; then the one with a value
    assert found.index(3) == 0


def test_random_ranks_are_uniform_and_repeatable():
    firsts = [ranks({**COLUMNS, "prompt_id": [f"p{i}"] * 4}, "random", 0).index(0) for i in range(400)]
    assert ranks(COLUMNS, "random", 3) == ranks(COLUMNS, "random", 3)
    assert np.bincount(firsts, minlength=4).min() > 70


@pytest.mark.parametrize(
    ("by", "min_score", "kept"),
    [
        ("pmi", None, [0, 2, 3]),
        ("pmi", 0.0, [0, 2]),
        ("pmi", 1.0, [2]),
        ("random", 9.0, None),
        ("oracle", 9.0, [1, 2, 0]),
    ],
)
def test_min_score_applies_to_scores_and_not_to_controls(by, min_score, kept):
    columns = COLUMNS | {"error": [None] * 4}
    found = keeps(
        columns,
        ranks(columns, by, 0, Oracle.columns if by == "oracle" else ()),
        by,
        SelectConfig(by="pmi", top_k=3, min_score=min_score),
    )
    assert found.sum() == (3 if kept is None else len(kept))
    assert kept is None or found.nonzero()[0].tolist() == sorted(kept)


@pytest.mark.parametrize("by", ["pmi", "random"])
def test_select_writes_kept_candidates_without_error_rows(tmp_path, by):
    schema = tables.candidates_schema(("pmi",))
    blank = dict.fromkeys(schema.names)
    rows = [
        blank
        | {
            "prompt_id": f"p{p}",
            "prompt": f"prompt {p}",
            "candidate_index": c,
            "score_pmi": float(c),
            "latents": [p, c],
        }
        | {"latents_shape": [2]}
        for p in range(3)
        for c in range(5)
    ]
    rows.append(blank | {"prompt_id": "bad", "prompt": "bad", "error": "no"})
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist(rows, schema=schema))
    storage.write_table(str(tmp_path / "candidates/part-1.parquet"), pa.Table.from_pylist(rows[-1:], schema=schema))
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "prompts": {"file": "unused"},
            "score": {"names": ["pmi"]},
            "select": {"by": "pmi", "top_k": 2},
        }
    )
    destination = str(tmp_path / "selected.parquet")
    assert select(config, str(tmp_path / "candidates"), destination, by) == {"prompts": 3, "kept": 6}
    kept = storage.read_table(destination).to_pandas()
    assert kept["prompt_id"].value_counts().to_dict() == {"p0": 2, "p1": 2, "p2": 2}
    if by == "pmi":
        assert sorted(kept["candidate_index"]) == [3, 3, 3, 4, 4, 4]


def test_select_reports_if_no_candidate_is_good_enough(tmp_path):
    schema = tables.candidates_schema(("pmi",))
    row = dict.fromkeys(schema.names) | {"prompt_id": "p", "prompt": "a", "candidate_index": 0, "score_pmi": 0.5}
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist([row], schema=schema))
    config = RunConfig.model_validate(
        {
            "run_dir": str(tmp_path),
            "prompts": {"file": "unused"},
            "score": {"names": ["pmi"]},
            "select": {"by": "pmi", "min_score": 1},
        }
    )
    with pytest.raises(ConfigError, match=r"select\.min_score: no candidate has a score .* of 1\.0 or more"):
        select(config, str(tmp_path / "candidates"), str(tmp_path / "selected.parquet"), "pmi")


def test_prompts_with_few_and_many_kept_have_equal_weight(tmp_path):
    schema = tables.candidates_schema(("pmi",))
    blank = dict.fromkeys(schema.names) | {"prompt": "a", "latents": [0.0], "latents_shape": [1]}
    rows = [
        blank | {"prompt_id": prompt, "candidate_index": i, "score_pmi": score}
        for prompt, scores in (("p", (3.0, 2.0, 1.0)), ("q", (1.0, -1.0, -2.0)))
        for i, score in enumerate(scores)
    ]
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist(rows, schema=schema))
    chosen = {"by": "pmi", "top_k": 2, "min_score": 0, "balance": True}
    given = {"run_dir": str(tmp_path), "prompts": {"file": "unused"}, "score": {"names": ["pmi"]}, "select": chosen}
    destination = str(tmp_path / "selected.parquet")
    select(RunConfig.model_validate(given), str(tmp_path / "candidates"), destination, "pmi")
    table = storage.read_table(destination).to_pandas()
    assert table.groupby("prompt_id")["weight"].sum().to_dict() == pytest.approx({"p": 1.5, "q": 1.5})
    assert table["weight"].mean() == pytest.approx(1)
