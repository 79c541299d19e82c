"""Weights of failing prompts, from files of every kind and from the evaluation of a run."""

import json
import math

import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.config.section import ConfigError
from mi_ray.inputs.focus import read_focus
from mi_ray.inputs.labels import read_labels
from mi_ray.storage.tables import evaluation_schema


def lines(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluation(folder, **metrics: list[float | None]) -> str:
    """Two parts of an evaluation, with the prompts a and b in turn."""
    for number in (0, 1):
        table = {name: values[number::2] for name, values in metrics.items()}
        prompts = ["a", "b"] * 4
        table |= {"prompt": prompts[number::2], "category": ["color"] * 4}
        storage.write_table(str(folder / f"part-{number}.parquet"), pa.table(table))
    return str(folder)


def test_evaluation_of_a_run_is_averaged_by_prompt(tmp_path):
    folder = evaluation(tmp_path, exact=[0, 1, 0, 1, 1, 1, 0, 1], relation=[None, 0.0, None, 0, None, 1, None, 1])
    assert read_focus(folder, "exact", 1.0) == {"a": (0.75, "color")}
    assert read_focus(folder, "relation", 0.6) == {"b": (0.5, "color")}
    with pytest.raises(ConfigError, match=r"no prompt with a weight above 0 or an average of exact below 0\.2"):
        read_focus(folder, "exact", 0.2)


def test_weights_of_a_file_are_used(tmp_path):
    rows = [{"prompt": "a", "weight": 2}, {"prompt": "b", "weight": 0}, {"prompt": "c", "weight": 0.5, "category": "x"}]
    assert read_focus(lines(tmp_path / "f.jsonl", rows), "exact", 0.5) == {"a": (2.0, None), "c": (0.5, "x")}
    storage.write_table(str(tmp_path / "f.parquet"), pa.Table.from_pylist(rows))
    assert read_focus(str(tmp_path / "f.parquet"), "exact", 0.5).keys() == {"a", "c"}


@pytest.mark.parametrize("name", ["f.txt", "f.jsonl"])
def test_prompts_of_a_list_have_weight_one(tmp_path, name):
    text = "a\nb\nb\n" if name == "f.txt" else '{"prompt": "a"}\n{"prompt": "b"}\n'
    (tmp_path / name).write_text(text)
    assert read_focus(str(tmp_path / name), "exact", 0.5) == {"a": (1.0, None), "b": (1.0, None)}


@pytest.mark.parametrize(
    ("row", "metric", "message"),
    [
        ({"prompt": "a", "weight": -1}, "exact", "weight -1 for the prompt 'a'; give a number from 0"),
        ({"prompt": "a", "weight": "much"}, "exact", "weight 'much'"),
        ({"prompt": "a", "score_pmi": 7.5}, "score_pmi", "give a metric between 0 and 1"),
    ],
)
def test_invalid_weights_are_refused(tmp_path, row, metric, message):
    with pytest.raises(ConfigError, match=f"^focus: .*{message}"):
        read_focus(lines(tmp_path / "f.jsonl", [row]), metric, 1.0)


def test_first_metric_is_the_default(tmp_path):
    rows = [{"prompt_id": p, "prompt": p, "likes": v, "exact": 1.0} for p, v in (("a", 0.25), ("b", 1.0))]
    schema = evaluation_schema({"judge": (Column("likes", "a share"),), "oracle": (Column("exact", "1 or 0"),)})
    storage.write_table(str(tmp_path / "base" / "part-0.parquet"), pa.Table.from_pylist(rows, schema))
    assert read_focus(str(tmp_path / "base"), None, 1.0) == {"a": (0.75, None)}
    assert read_focus(lines(tmp_path / "f.jsonl", [{"prompt": "a", "weight": 2}]), None, 1.0) == {"a": (2.0, None)}


def test_invalid_files_are_refused(tmp_path):
    folder = evaluation(tmp_path / "run", exact=[0.0] * 8)
    with pytest.raises(ConfigError, match=r"no column 'exactly' among .*--focus-metric"):
        read_focus(folder, "exactly", 1.0)
    with pytest.raises(ConfigError, match=r"declares no metric; set --focus-metric"):
        read_focus(folder, None, 1.0)
    with pytest.raises(ConfigError, match="does not exist"):
        read_focus(str(tmp_path / "none.jsonl"), "exact", 1.0)
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(ConfigError, match=r"^focus: "):
        read_focus(str(tmp_path / "broken.parquet"), "exact", 1.0)


def test_weights_of_a_csv_file_are_numbers(tmp_path):
    file = tmp_path / "f.csv"
    file.write_bytes(b"\xef\xbb\xbfprompt,weight,category\na,2,x\nb,,y\na,0.5,x\n")
    assert read_focus(str(file), "exact", 0.5) == {"a": (2.5, "x")}


def test_labels_may_come_from_a_spreadsheet(tmp_path):
    file = tmp_path / "pool.csv"
    file.write_bytes("prompt_id,candidate_index,label\na,0,1\na,1,\n".encode("utf-16"))
    labels = read_labels(str(file), "digest")
    assert labels["a", 0] == 1
    assert math.isnan(labels["a", 1])
    (tmp_path / "pool.jsonl").write_text('{"prompt_id": "a", "candidate_index": 0}\nno json\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_labels(str(tmp_path / "pool.jsonl"), "digest")
