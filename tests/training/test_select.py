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


def configured(run_dir, **select) -> RunConfig:
    given = {"run_dir": str(run_dir), "prompts": {"file": "unused"}, "score": {"names": ["pmi"]}}
    return RunConfig.model_validate(given | {"select": {"by": "pmi"} | select})


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


def test_select_tells_the_error_if_every_candidate_has_one(tmp_path):
    """Without select.min_score: the message names the error, not a limit that is not set."""
    config, schema = configured(tmp_path, top_k=1), tables.candidates_schema(("pmi",))
    row = dict.fromkeys(schema.names) | {"prompt_id": "p", "prompt": "a", "error": "no memory"}
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist([row], schema=schema))
    with pytest.raises(ConfigError, match=r"^run_dir: every candidate has an error, most often 'no memory'; remove"):
        select(config, str(tmp_path / "candidates"), str(tmp_path / "selected.parquet"), "pmi")


@pytest.mark.parametrize("by", ["pmi", "random"])
def test_a_failed_candidate_leaves_its_place_to_one_that_has_latents(tmp_path, by):
    """Generation stores the latents of the kept candidates. Selection must keep the same ones: it ranks without the
    failed candidates. Here the latents of one candidate are not finite, but its score is."""
    config, schema = configured(tmp_path, top_k=2), tables.candidates_schema(("pmi",))
    blank, rows = dict.fromkeys(schema.names), []
    for p in range(20):
        pool = [
            blank | {"prompt_id": f"p{p}", "prompt": "a", "candidate_index": c, "score_pmi": float(c)} for c in range(4)
        ]
        pool[3]["error"] = "the model's output is not finite"
        columns = {name: [row[name] for row in pool] for name in schema.names}
        for row, kept in zip(pool, keeps(columns, ranks(columns, by, config.seed), by, config.select), strict=True):
            row |= {"latents": [1.0] if kept else None, "latents_shape": [1]}
        assert sum(row["latents"] is not None for row in pool) == 2
        rows += pool
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist(rows, schema=schema))
    destination = str(tmp_path / "selected.parquet")
    assert select(config, str(tmp_path / "candidates"), destination, by) == {"prompts": 20, "kept": 40}
    assert storage.read_table(destination)["latents"].null_count == 0


def test_a_pruned_candidate_is_not_kept_in_place_of_a_failed_one(tmp_path):
    """Of a pruned pool, the random control carries top_k candidates to the end. One of them has failed."""
    config, schema = configured(tmp_path, top_k=1), tables.candidates_schema(("pmi",))
    blank = dict.fromkeys(schema.names) | {"prompt": "a", "latents_shape": [1]}
    rows = [blank | {"prompt_id": p, "candidate_index": c, "pruned_after": 3} for p in ("p", "q") for c in range(3)]
    carried = ranks({name: [row[name] for row in rows[:3]] for name in schema.names}, "random", config.seed).index(0)
    rows[carried] |= {"error": "the model's output is not finite"}
    rows[3] |= {"pruned_after": None, "latents": [1.0]}
    for row in rows[4:]:
        row |= {"error": "no"}
    storage.write_table(str(tmp_path / "candidates/part-0.parquet"), pa.Table.from_pylist(rows, schema=schema))
    destination = str(tmp_path / "selected.parquet")
    assert select(config, str(tmp_path / "candidates"), destination, "random") == {"prompts": 1, "kept": 1}
    assert storage.read_table(destination)["latents"].to_pylist() == [[1.0]]


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
