"""The job that makes more prompts, through its command line."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.make_prompts import make_prompts
from mi_ray.inputs.more_prompts_config import MorePromptsConfig
from mi_ray.inputs.prompts import read_prompts

ROOT = Path(__file__).parents[2]
LIST = ROOT / "jobs" / "configs" / "prompts" / "shapes-train.jsonl"
OWN = [
    *({"prompt": "a red car and a blue dog", "category": "color"}, {"prompt": "two cats", "category": "numeracy"}),
    *({"prompt": "three mice and one dog", "category": "numeracy"}, {"prompt": "a green apple", "category": "color"}),
]


def job(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "jobs" / "make_prompts.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OWN))
    return str(tmp_path / "own.jsonl")


def made(tmp_path, suffix: str = ".jsonl", **fields) -> list[dict]:
    """The rows that the job writes."""
    out = str(tmp_path / f"new{suffix}")
    make_prompts(MorePromptsConfig(out=out, **fields))
    return read_prompts(out)[0].to_pylist()


def test_the_command_line(tmp_path, own):
    (tmp_path / "test.txt").write_text("A blue car and a red dog\n")
    flags = ("--file", own, "--exclude", tmp_path / "test.txt", "--count", 8, "--seed", 3)
    for name in ("a.jsonl", "b.jsonl"):
        done = job(*flags, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["category"] for row in rows} == {"color", "numeracy"}
    assert not {row["prompt"] for row in rows} & {"a blue car and a red dog", *(row["prompt"] for row in OWN)}
    assert "4 of 4 prompts are templates" in done.stdout


def test_all_faults_are_reported(tmp_path, own):
    done = job("--file", "none.txt", "--exclude", "no.txt", "--out", tmp_path / "new.jsonl", "--count", 3)
    assert done.returncode == 2
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["file", "exclude"]
    done = job("--file", own, "--out", tmp_path / "new.jsonl", "--count", 10_000)
    assert done.returncode == 2
    assert "count: 10000 new prompts are wanted, but only" in done.stderr
    possible = int(done.stderr.split("wanted, but only ")[1].split()[0])
    assert not (tmp_path / "new.jsonl").exists()
    assert job("--file", own, "--out", tmp_path / "new.jsonl", "--count", possible).returncode == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out": "new.csv"}, r"out is '.*/new\.csv'; use the extension \.jsonl, \.parquet or \.txt"),
        ({"out": "own.jsonl", "file": "own.jsonl"}, "would be overwritten"),
        ({"out": "new.txt", "phrases": "text"}, "phrases 'text' needs it; set --file LIST"),
    ],
)
def test_contradictory_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MorePromptsConfig(count=3, **fields)


def test_list_that_cannot_be_parsed_is_refused(tmp_path):
    (tmp_path / "own.txt").write_text("happiness\nvibes, 4k\n")
    with pytest.raises(ConfigError, match=r"^phrases: 'auto' finds no words in 2 prompts"):
        made(tmp_path, file=str(tmp_path / "own.txt"), count=1)
    with pytest.raises(ConfigError, match=r"^phrases: .*python -m spacy download en_core_web_none"):
        made(tmp_path, file=str(tmp_path / "own.txt"), count=1, phrases="spacy:en_core_web_none")


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_all_formats_give_the_same_prompts(tmp_path, own, suffix):
    prompts = [row["prompt"] for row in made(tmp_path, file=own, count=5)]
    assert [row["prompt"] for row in made(tmp_path, suffix, file=own, count=5)] == prompts


def test_the_shapes_grammar(tmp_path, capsys):
    rows = made(tmp_path, file=str(LIST), exclude=(str(LIST.with_name("shapes-test.jsonl")),), count=100)
    assert {row["split"] for row in rows} == {"train"}
    rows = made(tmp_path, count=60, split="ood")
    assert {row["split"] for row in rows} == {"ood"}
    assert len({row["category"] for row in rows}) == 6


def test_focus_uses_failing_prompts(tmp_path, own, capsys):
    table = {"prompt": ["two cats", "one ox"] * 2, "category": ["numeracy"] * 4, "exact": [1.0, 0.0, 0.0, 0.5]}
    storage.write_table(str(tmp_path / "base" / "part-0.parquet"), pa.table(table))
    rows = made(tmp_path, file=own, focus=str(tmp_path / "base"), focus_metric="exact", count=2)
    assert {row["prompt"] for row in rows} == {"two oxen", "one cat"}
    assert "2 prompts fail, 1 of them are in the list" in capsys.readouterr().out


def test_new_prompts_fit_the_text_encoder(tmp_path):
    long = " and ".join(f"a {color} {noun}" for color, noun in [("red", "dog"), ("blue", "cat")] * 12)
    (tmp_path / "own.txt").write_text(f"{long}\na red dog\na green cat\n")
    rows = made(tmp_path, file=str(tmp_path / "own.txt"), count=3, model="shapes")
    assert all(len(row["prompt"]) < 40 for row in rows)
