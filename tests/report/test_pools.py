"""What is told of the candidates does not depend on how they are cut into parts."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from run_folder import SCORES

from mi_ray.report import pools
from mi_ray.report.pools import Thinned, count_error, distribution, read_pools
from mi_ray.storage import read_tables, write_table


@pytest.fixture
def in_parts(run_dir, tmp_path) -> str:
    """The candidates of `run_dir`, as two rounds and five prompts a part."""
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
    for name, found in whole.selection["auc"].items():
        assert twice.selection["auc"][name] == pytest.approx(found)
    for share in ("pool_exact", "kept_exact"):
        expected = whole.selection[share]
        assert twice.selection[share] == pytest.approx(expected | {"n_images": 2 * expected["n_images"]})
        assert twice.selection["by_round"][1][share] == pytest.approx(expected)
    assert twice.errors == Counter({error: 2 * count for error, count in whole.errors.items()})
    for name, found in whole.distributions.items():
        assert sum(found["exact"]) + sum(found["not exact"]) == 24 * 12
        again = twice.distributions[name]
        assert sum(again["exact"]) == 2 * sum(found["exact"])


def test_a_distribution_is_of_the_score_above_its_prompts_mean(run_dir):
    candidates = read_tables(str(run_dir / "round-0" / "candidates")).to_pandas()
    candidates = candidates[candidates["error"].isna()]
    score = candidates["score_mitune"]
    centred = score - score.groupby(candidates["prompt_id"]).transform("mean")
    found = read_pools(str(run_dir), SCORES).distributions["mitune"]
    clipped = centred.clip(found["edges"][0], found["edges"][-1])
    expected, _ = np.histogram(clipped[candidates["exact"] == 1], found["edges"])
    assert found["exact"] == expected.tolist()


def test_a_score_that_nobody_has_is_not_drawn():
    assert distribution(pd.DataFrame({"score_a": [np.nan], "exact": [1.0]}), "a") is None
    same = distribution(pd.DataFrame({"score_a": [2.0, 2.0], "exact": [np.nan, np.nan]}), "a")
    assert sum(same["all"]) == 2


def test_few_rows_stand_for_many_evenly(monkeypatch):
    """Of every stretch alike, and of the rounds, which come in turns of 64 rows, too."""
    monkeypatch.setattr(pools, "DRAWN", 1000)
    thinned = Thinned()
    for start in range(0, 64_000, 128):
        thinned.add(pd.DataFrame({"number": np.arange(start, start + 128), "round": [0] * 64 + [1] * 64}))
        assert len(thinned.rows) <= 2000
    drawn = len(thinned.rows)
    assert drawn > 900
    counts = np.histogram(thinned.rows["number"], 4, (0, 64_000))[0]
    assert counts / drawn == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / drawn))
    assert thinned.rows["round"].mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(drawn))


def test_errors_without_end_are_told_by_their_stage(monkeypatch):
    monkeypatch.setattr(pools, "MAX_TOLD", 2)
    errors = Counter()
    for prompt in "abcda":
        count_error(errors, prompt, "generate", "broken")
    assert list(errors.values()) == [2, 1, 2]
    assert errors["", "generate", pools.UNTOLD] == 2
