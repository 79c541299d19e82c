"""Advantages: centred within a prompt, zero or NaN if the score has no signal."""

import math

import numpy as np
import pytest

from mi_ray.alignment.metric import Column
from mi_ray.config import OnlineConfig, RunConfig
from mi_ray.config.section import ConfigError
from mi_ray.scoring.rewards import Reward, advantages, candidate_advantages, raw_rewards, reward_faults, rewards_of

SEEDS = [1, 2, 3, 4]


def of(columns: dict, *rewards: str, **settings) -> np.ndarray:
    online = OnlineConfig(updates=1, rewards=rewards, **settings)
    return advantages(rewards_of(online, "pmi"), columns, SEEDS, online)


def test_advantages_are_centred_scaled_and_clipped():
    values = np.array([0.0, 1.0, 2.0, 5.0])
    found = of({"score_pmi": values, "score_pmi_se": [0.1] * 4}, reward_floor=0.5, reward_clip=1.0)
    expected = np.clip((values - 2) / (values.std(ddof=1) + 0.5), -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_prompt_with_a_spread_below_the_error_is_dropped():
    columns = {"score_pmi": [0.0, 0.1, 0.2, 0.1], "score_pmi_se": [0.5] * 4}
    assert np.isnan(of(columns)).all()
    assert np.isnan(of({"exact": [1.0] * 4}, "exact")).all()
    assert np.isfinite(of({"exact": [1.0, 0.0, 1.0, 1.0]}, "exact")).all()


def test_reward_without_signal_counts_as_zero():
    loud, silent = [0.0, 1.0, 2.0, 5.0], [1.0] * 4
    one = of({"score_pmi": loud, "score_pmi_se": [0.1] * 4}, "pmi")
    both = of({"score_pmi": loud, "score_pmi_se": [0.1] * 4, "exact": silent}, "pmi", "exact:3")
    np.testing.assert_allclose(one, both)


def test_failed_candidate_is_left_out():
    columns = {"exact": [1.0, 0.0, math.nan, 0.0], "error": [None] * 4}
    found = of(columns, "exact", reward_clip=10.0)
    assert np.isnan(found[2])
    assert np.nansum(found) == pytest.approx(0)
    columns = {"exact": [1.0, 0.0, 1.0, 0.0], "error": [None, None, "broken", None]}
    assert np.isnan(of(columns, "exact")[2])


def test_random_rewards_depend_only_on_the_seeds():
    online = OnlineConfig(updates=1, rewards=("random",))
    first, again = (advantages(rewards_of(online, "pmi"), {}, SEEDS, online) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, advantages(rewards_of(online, "pmi"), {}, [5, 6, 7, 8], online))
    assert first.sum() == pytest.approx(0, abs=1)


def test_candidate_advantages_are_none_if_not_trained():
    config = RunConfig.model_validate(
        {
            "run_dir": "x",
            "prompts": {"file": "x"},
            "finetune": {"method": "nft"},
            "online": {"updates": 1, "rewards": ["exact"]},
        }
    )
    columns = {"prompt_id": ["a", "a", "b", "b"], "seed": SEEDS, "exact": [1.0, 0.0, 1.0, 1.0], "error": [None] * 4}
    found = candidate_advantages(rewards_of(config.online, "pmi"), columns, config)
    assert found[2:] == [None, None]
    assert found[0] == -found[1] > 0


def test_weight_that_is_not_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"online.rewards: 'pmi:much' has a weight that is not a number"):
        rewards_of(OnlineConfig(updates=1, rewards=("pmi:much",)), "pmi")


def test_reward_of_a_metric_is_its_first_column_with_sign():
    metrics = {
        "oracle": (Column("exact", "1 or 0"), Column("objects", "share")),
        "dark:Pixels": (Column("dark", "number", higher_is_better=False),),
    }
    online = OnlineConfig(updates=1, rewards=("oracle:0.5", "objects", "dark:Pixels", "dark:Pixels:0.1", "pmi:2"))
    assert rewards_of(online, "pmi", metrics) == (
        Reward("exact", 0.5),
        Reward("objects", 1.0),
        Reward("dark", -1.0),
        Reward("dark", -0.1),
        Reward("pmi", 2.0),
    )
    assert rewards_of(OnlineConfig(updates=1), "dark:Pixels", metrics) == (Reward("dark", -1.0),)


def test_reward_of_a_metric_with_a_model_or_a_file(tmp_path, monkeypatch):
    """The name of generate.alignment, also relative to the working directory and with a weight."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    (tmp_path / "questions.jsonl").touch()
    written = {
        "run_dir": "x",
        "prompts": {"file": "x"},
        "generate": {"alignment": ["soft-tifa@questions.jsonl@judge", "clip-score@judge", "geneval-port@judge+a/b@v1"]},
        "finetune": {"method": "nft"},
        "online": {
            "updates": 1,
            "rewards": ["soft-tifa@questions.jsonl@judge", "clip-score@judge:0.5", "geneval-port@judge+a/b@v1:2"],
        },
    }
    config = RunConfig.model_validate(written)
    names = [("soft_tifa_gm", "soft_tifa_am"), ("clip_score",), ("geneval_port",)]
    columns = {
        metric: tuple(Column(name, "a metric") for name in of_metric)
        for metric, of_metric in zip(config.generate.alignment, names, strict=True)
    }
    assert rewards_of(config.online, "pmi", columns) == (
        Reward("soft_tifa_gm", 1.0),
        Reward("clip_score", 0.5),
        Reward("geneval_port", 2.0),
    )


def test_raw_rewards_are_the_weighted_sum():
    online = OnlineConfig(updates=1, rewards=("pmi:0.5", "exact"))
    columns = {"score_pmi": [1.0, 2.0], "exact": [0.0, 1.0]}
    assert raw_rewards(rewards_of(online, "pmi"), columns).tolist() == [0.5, 2.0]
    mixed = OnlineConfig(updates=1, rewards=("pmi:0.5", "random:0.1", "exact"))
    assert raw_rewards(rewards_of(mixed, "pmi"), columns).tolist() == [0.5, 2.0]


def test_reward_that_no_candidate_has_is_refused():
    """A wrong name, a score that is not computed, and a metric that is not measured."""
    given = {
        "run_dir": "x",
        "prompts": {"file": "x"},
        "score": {"names": ["pmi"]},
        "select": {"by": "pmi"},
        "finetune": {"method": "nft"},
        "online": {"updates": 1, "rewards": ["pmi", "pmi_negative", "mitune:0.5", "oracle", "random"]},
    }
    faults = reward_faults(RunConfig.model_validate(given))
    assert [fault.split("'")[1] for fault in faults] == ["pmi_negative", "mitune", "oracle"]
    assert faults[0].startswith("online.rewards has 'pmi_negative', but no candidate has this value: take one of")
    given["generate"] = {"alignment": ["oracle"]}
    given["score"] = {"names": ["pmi", "mitune"]}
    given["online"]["rewards"] = ["pmi", "mitune:0.5", "oracle", "objects:2", "random"]
    assert reward_faults(RunConfig.model_validate(given)) == []
    given["online"]["rewards"] = ["pmi:much"]
    assert reward_faults(RunConfig.model_validate(given | {"online": {}, "finetune": {}})) == []
    assert reward_faults(RunConfig.model_validate(given)) == [
        "online.rewards: 'pmi:much' has a weight that is not a number; write name:number"
    ]


def test_only_the_extremes_are_trained():
    config = RunConfig.model_validate(
        {
            "run_dir": "x",
            "prompts": {"file": "x"},
            "finetune": {"method": "nft"},
            "online": {"updates": 1, "rewards": ["pmi"], "trained_candidates": 3},
            "score": {"names": ["pmi"]},
            "select": {"by": "pmi"},
        }
    )
    values = [0.0, 4.0, 1.0, 2.0, 9.0, 3.0]
    columns = {"prompt_id": ["a"] * 6, "seed": list(range(6)), "score_pmi": values, "score_pmi_se": [0.1] * 6}
    columns |= {"error": [None] * 6}
    rewards = rewards_of(config.online, "pmi")
    found = candidate_advantages(rewards, columns, config)
    whole = advantages(rewards, columns, columns["seed"], config.online)
    assert [value is not None for value in found] == [True, True, False, False, True, False]
    assert [value for value in found if value is not None] == whole[[0, 1, 4]].tolist()
