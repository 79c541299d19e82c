import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mi_ray.alignment.metric import Column
from mi_ray.report.statistics import (
    PromptAverage,
    auc,
    diversity,
    is_collapsed,
    kernel_distance,
    paired_difference,
    prompt_aucs,
    prompt_correlations,
    prompt_mean,
)

EXACT = Column("exact", "1 or 0", "yes/no", 0, 1)


def brute_force_auc(scores, positive):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    return sum(pairs) / len(pairs)


def evaluation(rng, share, prompts=40, seeds=4):
    ids = np.repeat([f"p{i}" for i in range(prompts)], seeds)
    exact = (rng.random(prompts * seeds) < share).astype(float)
    return pd.DataFrame({"prompt_id": ids, "seed": np.tile(np.arange(seeds), prompts), "exact": exact})


def test_prompt_mean_equals_the_interval_of_scipy():
    rows = evaluation(np.random.default_rng(0), 0.4)
    means = rows["exact"].to_numpy().reshape(40, 4).mean(1)
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    result = prompt_mean(rows, "exact")
    assert [result[k] for k in ("value", "low", "high")] == pytest.approx([means.mean(), low, high])
    assert (result["n_prompts"], result["n_images"]) == (40, 160)


def test_prompt_mean_interval_has_95_percent_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        rates = rng.beta(1, 1, 60)  # prompts differ in difficulty; their mean is 0.5
        rows = pd.DataFrame({"prompt_id": np.repeat(np.arange(60), 4)})
        rows["exact"] = (rng.random(240) < np.repeat(rates, 4)).astype(float)
        result = prompt_mean(rows, "exact")
        covered += result["low"] <= 0.5 <= result["high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_missing_values_and_single_prompts():
    rows = pd.DataFrame({"prompt_id": ["a", "a", "b"], "exact": [1.0, 0.0, np.nan]})
    result = prompt_mean(rows, "exact")
    assert result == {"value": 0.5, "low": None, "high": None, "n_prompts": 1, "n_images": 2}
    assert prompt_mean(rows.assign(exact=np.nan), "exact") is None
    same = prompt_mean(pd.DataFrame({"prompt_id": ["a", "b"], "exact": [1.0, 1.0]}), "exact")
    assert (same["low"], same["high"]) == (1, 1)


def test_paired_difference_equals_the_paired_interval_of_scipy():
    rng = np.random.default_rng(2)
    base, tuned = evaluation(rng, 0.4), evaluation(rng, 0.55)
    means = [frame["exact"].to_numpy().reshape(40, 4).mean(1) for frame in (tuned, base)]
    low, high = stats.ttest_rel(*means).confidence_interval(0.95)
    shuffled = tuned.sample(frac=1, random_state=0)  # pairs are found by prompt and seed, not by position
    result = paired_difference(shuffled, base, "exact")
    expected = [means[0].mean() - means[1].mean(), low, high]
    assert [result[k] for k in ("difference", "low", "high")] == pytest.approx(expected)


def test_prompt_average_does_not_depend_on_the_parts():
    rng = np.random.default_rng(6)
    rows = pd.DataFrame({"prompt_id": np.repeat(np.arange(200), 3), "exact": rng.normal(1e4, 1, 600)})
    average = PromptAverage()
    assert average.result() is None
    for part in np.split(np.arange(200), [1, 2, 50, 50, 199]):
        average.add(rows[rows.prompt_id.isin(part)], "exact")
    assert average.result() == pytest.approx(prompt_mean(rows, "exact"), rel=1e-12)
    low, high = stats.ttest_1samp(rows.groupby("prompt_id")["exact"].mean(), 0).confidence_interval(0.95)
    assert (average.result()["low"], average.result()["high"]) == pytest.approx((low, high), rel=1e-12)


def test_paired_difference_leaves_out_images_without_a_partner():
    base = pd.DataFrame({"prompt_id": ["a", "a", "b"], "seed": [0, 1, 0], "exact": [0.0, 1.0, 0.0]})
    tuned = pd.DataFrame({"prompt_id": ["a", "a", "c"], "seed": [0, 1, 0], "exact": [1.0, np.nan, 1.0]})
    result = paired_difference(tuned, base, "exact")
    assert (result["difference"], result["n_prompts"], result["n_images"]) == (1, 1, 1)
    assert paired_difference(tuned[tuned.prompt_id == "c"], base, "exact") is None


def test_auc_counts_pairs_and_ties_half():
    rng = np.random.default_rng(3)
    scores, positive = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.3
    assert auc(scores, positive) == pytest.approx(brute_force_auc(scores, positive))
    assert auc(np.ones(4), np.array([True, False, False, True])) == 0.5


def test_within_prompt_auc_ignores_differences_between_prompts():
    rng = np.random.default_rng(4)
    pool = pd.DataFrame({"round": 0, "prompt_id": np.repeat(np.arange(50), 20)})
    rates = np.repeat(rng.uniform(0.2, 0.8, 50), 20)
    pool["exact"] = (rng.random(1000) < rates).astype(float)
    pool["level"] = rates + 1e-3 * rng.normal(size=1000)  # separates easy from hard prompts only
    pool["truth"] = pool["exact"] - 100 * pool["prompt_id"]
    result = prompt_mean(prompt_aucs(pool, "level", EXACT), "auc")
    assert result["low"] < 0.5 < result["high"]
    assert prompt_mean(prompt_aucs(pool, "truth", EXACT), "auc")["value"] == 1
    assert auc(pool["level"].to_numpy(), pool["exact"].to_numpy() == 1) > 0.6  # pooled: misleading


def test_within_prompt_auc_needs_different_values():
    pool = pd.DataFrame({"round": 0, "prompt_id": [0, 0, 1, 1], "exact": [1.0, 1.0, 1.0, 0.0], "s": [1.0, 2, 3, 4]})
    assert prompt_aucs(pool, "s", EXACT).to_dict("records") == [{"prompt_id": 1, "auc": 0}]
    assert prompt_aucs(pool[pool.prompt_id == 0], "s", EXACT).empty
    assert prompt_aucs(pool[:0], "s", EXACT).empty


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_within_prompt_auc_counts_pairs_with_different_values(higher_is_better):
    rng = np.random.default_rng(9)
    sizes = rng.integers(1, 9, 30)  # pools of different size, with missing values on both sides
    pool = pd.DataFrame({"round": rng.integers(0, 2, sizes.sum()), "prompt_id": np.repeat(np.arange(30), sizes)})
    pool["s"] = rng.integers(0, 4, len(pool)).astype(float)
    pool["likes"] = rng.integers(0, 3, len(pool)).astype(float)
    pool.loc[rng.random(len(pool)) < 0.1, "s"] = np.nan
    pool.loc[rng.random(len(pool)) < 0.1, "likes"] = np.nan
    expected = []
    for (_, prompt), rows in pool.dropna().groupby(["round", "prompt_id"]):
        values = rows[["s", "likes"]].to_numpy() * [1, 1 if higher_is_better else -1]
        wins = [(a[0] > b[0]) + 0.5 * (a[0] == b[0]) for a in values for b in values if a[1] > b[1]]
        if wins:
            expected.append({"prompt_id": prompt, "auc": np.mean(wins)})
    found = prompt_aucs(pool, "s", Column("likes", "", higher_is_better=higher_is_better))
    pd.testing.assert_frame_equal(found, pd.DataFrame(expected))


def unbiased_mmd(x, y):
    """Binkowski et al. (2018), eq. 4, written out."""
    d, m = x.shape[1], len(x)
    k = lambda a, b: (a @ b / d + 1) ** 3  # noqa: E731
    within = sum(k(a[i], a[j]) for a in (x, y) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_kernel_distance_is_the_unbiased_estimator():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(30, 6)) + 0.5, rng.normal(size=(30, 6))
    standard = [np.clip((z - y.mean(0)) / y.std(0), -3, 3) for z in (x, y)]
    assert kernel_distance(x, y) == pytest.approx(unbiased_mmd(*standard))


def test_kernel_distance_is_not_dominated_by_a_feature_that_is_constant_in_the_reference():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, 200, 16))
    x[:, 0], y[:, 0] = rng.random(200) < 0.02, 0
    y[0, 0] = 0.01
    assert abs(kernel_distance(x, y)) < 0.05


def test_kernel_distance_is_near_zero_for_one_distribution_and_large_for_two():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(400, 16)) * 1000  # the features' unit does not matter
    same, shifted = rng.normal(size=(300, 16)) * 1000, rng.normal(size=(300, 16)) * 1000 + 700
    assert abs(kernel_distance(same, reference)) < 0.05
    assert kernel_distance(shifted, reference) > 1
    assert kernel_distance(same[:1], reference) is None


def test_diversity_and_collapse():
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(50), 6)
    base = rng.normal(size=(300, 16))
    narrow = np.repeat(base[::6], 6, 0) + 0.1 * rng.normal(size=(300, 16))

    def quality(features):
        return {
            "kernel_distance": kernel_distance(features, base),
            "diversity": diversity(features, prompts, base),
        }

    good = quality(rng.normal(size=(300, 16)))
    assert good["diversity"] == pytest.approx(np.sqrt(2), rel=0.05)  # of independent unit Gaussians
    assert not is_collapsed(good, good)
    assert is_collapsed(quality(narrow), good)
    assert is_collapsed(quality(base + 1), good)
    assert diversity(base[:2], np.array(["a", "b"]), base) is None


def test_rank_correlation_within_prompts_equals_scipy_s():
    rng = np.random.default_rng(3)
    rows = pd.DataFrame({"prompt_id": np.repeat(["a", "b", "c", "d"], 8), "round": 0})
    rows["error"] = rng.integers(0, 5, 32).astype(float)  # with ties; lower is better
    rows["score"] = rng.integers(0, 6, 32) - 0.5 * rows["error"]
    rows.loc[3, "score"] = np.nan
    rows.loc[8:15, "error"] = 2.0  # no better candidate of prompt b
    rows.loc[16:23, "score"] = 1.0  # the score says nothing of prompt c
    found = prompt_correlations(rows, "score", Column("error", "number of errors", higher_is_better=False))
    found = found.set_index("prompt_id")["correlation"]
    assert list(found.index) == ["a", "c", "d"]
    assert found["c"] == 0
    for name in ("a", "d"):
        pool = rows[(rows["prompt_id"] == name) & rows["score"].notna()]
        assert found[name] == pytest.approx(-stats.spearmanr(pool["score"], pool["error"]).statistic)
