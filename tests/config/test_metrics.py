"""Names of metrics: lists, and local models after @."""

import pytest
from pydantic import TypeAdapter

from mi_ray.config.metrics import MetricNames, metric_place, reward_place

NAMES = TypeAdapter(MetricNames)


def test_a_local_model_becomes_absolute_and_a_hub_model_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges").mkdir()
    assert metric_place("clip-score@judges") == f"clip-score@{tmp_path}/judges"
    assert metric_place("clip-score@./new") == f"clip-score@{tmp_path}/new"
    (tmp_path / "questions.jsonl").touch()
    assert metric_place("soft-tifa@questions.jsonl@judges") == f"soft-tifa@{tmp_path}/questions.jsonl@{tmp_path}/judges"
    assert metric_place("soft-tifa@questions.jsonl@a/b@v1") == f"soft-tifa@{tmp_path}/questions.jsonl@a/b@v1"
    assert metric_place("geneval-port@judges+a/b@v1") == f"geneval-port@{tmp_path}/judges+a/b@v1"
    for name in (
        "clip-score",
        "3-in-1-proxy@a/b+c/d@v1+e/f",
        "clip-score@owner/name",
        "clip-score@owner/name@v1",
        "mine:Metric",
        "random",
    ):
        assert metric_place(name) == name


def test_one_name_is_a_list_and_no_metric_is_listed_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert NAMES.validate_python("oracle") == ("oracle",)
    with pytest.raises(ValueError, match="listed more than once; list each metric once"):
        NAMES.validate_python(["clip-score@./a", f"clip-score@{tmp_path}/a"])


def test_a_reward_names_the_metric_as_the_run_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges").mkdir()
    (tmp_path / "questions.jsonl").touch()
    for name in ("clip-score@judges", "soft-tifa@questions.jsonl@judges", "mine:Metric@judges", "vqa-score@a/b@v1"):
        assert reward_place(name) == metric_place(name)
        assert reward_place(f"{name}:-0.5") == f"{metric_place(name)}:-0.5"
    for text in ("pmi", "pmi:2", "mine:Metric", "mine:Metric:0.1", "pmi:much"):
        assert reward_place(text) == text
