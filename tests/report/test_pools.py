"""The report on the candidates does not depend on the division into parts."""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from run_folder import METRICS, SCORES

from mi_ray.alignment.metric import Column
from mi_ray.report import pools
from mi_ray.report.pools import Thinned, count_error, distribution, read_pools
from mi_ray.storage import read_tables, write_table
from mi_ray.storage.tables import candidates_schema

EXACT = METRICS["oracle"][0]


@pytest.fixture
def in_parts(run_dir, tmp_path) -> str:
    """The candidates of `run_dir`, in two equal rounds with five prompts per part."""
    table = read_tables(str(run_dir / "round-0" / "candidates"))
    prompts = table["prompt_id"].to_pylist()
    order = list(dict.fromkeys(prompts))
    of_prompt = np.array([order.index(prompt) for prompt in prompts])
    for number in (0, 1):
        for part in range(-(-len(order) // 5)):
            rows = np.flatnonzero(of_prompt // 5 == part)
            destination = tmp_path / f"round-{number}" / "candidates" / f"part-{part}.parquet"
            write_table(str(destination), table.take(rows))
    return str(tmp_path)


def test_parts_and_rounds_add_up(run_dir, in_parts):
    whole, twice = read_pools(str(run_dir), SCORES), read_pools(in_parts, SCORES)
    assert twice.prompts == whole.prompts == 25
    for name, found in whole.selection["auc"]["exact"].items():
        assert twice.selection["auc"]["exact"][name] == pytest.approx(found)
    for share in ("pool_exact", "kept_exact"):
        expected = whole.selection[share]
        assert twice.selection[share] == pytest.approx(expected | {"n_images": 2 * expected["n_images"]})
        assert twice.selection["by_round"][1][share] == pytest.approx(expected)
    assert twice.errors == Counter({error: 2 * count for error, count in whole.errors.items()})
    for name, found in whole.distributions.items():
        assert sum(found["exact"]) + sum(found["not exact"]) == 24 * 12
        again = twice.distributions[name]
        assert sum(again["exact"]) == 2 * sum(found["exact"])


def test_distribution_of_the_score_minus_its_prompts_mean(run_dir):
    candidates = read_tables(str(run_dir / "round-0" / "candidates")).to_pandas()
    candidates = candidates[candidates["error"].isna()]
    score = candidates["score_mitune"]
    centred = score - score.groupby(candidates["prompt_id"]).transform("mean")
    found = read_pools(str(run_dir), SCORES).distributions["mitune"]
    clipped = centred.clip(found["edges"][0], found["edges"][-1])
    expected, _ = np.histogram(clipped[candidates["exact"] == 1], found["edges"])
    assert found["exact"] == expected.tolist()


def test_no_distribution_of_a_score_without_values():
    assert distribution(pd.DataFrame({"score_a": [np.nan], "good": [1.0]}), "a") is None
    same = distribution(pd.DataFrame({"score_a": [2.0, 2.0], "good": [np.nan, np.nan]}), "a", EXACT)
    assert sum(same["all"]) == 2


def test_distribution_by_a_metric_with_a_unit_splits_at_the_prompts_mean(tmp_path):
    dark = Column("dark", "number of dark pixels", "pixels", 0, higher_is_better=False)
    schema = candidates_schema(("mitune",), {"mine": (dark,)})
    rows = [
        {"prompt_id": p, "prompt": p, "score_mitune": score, "dark": value, "kept": score == 3.0}
        for p, values in (("a", (1.0, 5.0, 6.0, None)), ("b", (7.0, 7.0, 7.0, 7.0)))
        for score, value in zip((3.0, 2.0, 1.0, 0.0), values, strict=True)
    ]
    write_table(str(tmp_path / "round-0" / "candidates" / "part-0.parquet"), pa.Table.from_pylist(rows, schema))
    found = read_pools(str(tmp_path), ("mitune",))
    assert found.metrics == {"mine": (dark,)}
    drawn = found.distributions["mitune"]
    assert (sum(drawn["better by dark"]), sum(drawn["worse by dark"])) == (1, 6)  # one has no value
    assert found.selection["auc"]["dark"]["mitune"]["value"] == 1  # only prompt a counts
    assert found.selection["correlation"]["dark"]["mitune"]["value"] == 1
    assert found.selection["pool_dark"]["value"] == pytest.approx((4 + 7) / 2)
    assert found.selection["kept_dark"]["value"] == pytest.approx((1 + 7) / 2)


def test_thinned_rows_are_a_uniform_sample(monkeypatch):
    """All quarters of the rows and both rounds have the same share."""
    monkeypatch.setattr(pools, "SAMPLED", 1000)
    thinned = Thinned()
    for start in range(0, 64_000, 128):
        thinned.add(pd.DataFrame({"number": np.arange(start, start + 128), "round": [0] * 64 + [1] * 64}))
        assert len(thinned.rows) <= 2000
    drawn = len(thinned.rows)
    assert drawn > 900
    counts = np.histogram(thinned.rows["number"], 4, (0, 64_000))[0]
    assert counts / drawn == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / drawn))
    assert thinned.rows["round"].mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(drawn))


def test_further_errors_are_counted_by_stage(monkeypatch):
    monkeypatch.setattr(pools, "MAX_ERRORS", 2)
    errors = Counter()
    for prompt in "abcda":
        count_error(errors, prompt, "generate", "broken")
    assert list(errors.values()) == [2, 1, 2]
    assert errors["", "generate", pools.FURTHER_ERRORS] == 2


def test_another_metric_is_compared_like_a_score(tmp_path):
    """A judge beside the scores on the same candidates; its sign is that of its column."""
    truth = Column("right", "share of what is right", "share", 0, 1)
    judge = Column("faults", "number of faults", higher_is_better=False)
    schema = candidates_schema(("mitune",), {"truth": (truth,), "judge": (judge,)})
    rows = [
        {"prompt_id": "a", "prompt": "a", "score_mitune": score, "right": right, "faults": faults, "kept": False}
        for score, right, faults in ((0.0, 0.2, 5.0), (3.0, 0.5, 3.0), (2.0, 0.9, 1.0))
    ]
    write_table(str(tmp_path / "round-0" / "candidates" / "part-0.parquet"), pa.Table.from_pylist(rows, schema))
    selection = read_pools(str(tmp_path), ("mitune",)).selection
    assert {name: found["value"] for name, found in selection["auc"]["right"].items()} == {
        "mitune": pytest.approx(2 / 3),
        "faults": 1,
    }
    assert selection["correlation"]["right"]["mitune"]["value"] == pytest.approx(0.5)
    assert selection["correlation"]["faults"]["right"]["value"] == 1
