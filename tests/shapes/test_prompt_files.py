import json
import subprocess
import sys
from pathlib import Path

import pytest

from mi_ray.shapes.grammar import CATEGORIES, parse

ROOT = Path(__file__).parents[2]
FILES = ROOT / "jobs" / "configs" / "prompts"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


def test_prompt_files_equal_the_output_of_the_job(tmp_path):
    subprocess.run([sys.executable, ROOT / "jobs" / "make_shapes_prompts.py", "--folder", tmp_path], check=True)
    for name in ("shapes-train.jsonl", "shapes-test.jsonl", "shapes-online.jsonl"):
        assert (tmp_path / name).read_bytes() == (FILES / name).read_bytes()


def test_no_prompt_is_in_two_files():
    names = ("shapes-train.jsonl", "shapes-test.jsonl", "shapes-online.jsonl")
    train, test, online = ({row["prompt"] for row in rows(name)} for name in names)
    assert (len(train), len(test), len(online)) == (600, 360, 720)
    assert not train & test
    assert not online & (train | test)
    assert all(parse(prompt) for prompt in train | test | online)


@pytest.mark.parametrize(
    ("name", "limit"), [("shapes-train.jsonl", 96), ("shapes-test.jsonl", 36), ("shapes-online.jsonl", 48)]
)
def test_first_prompts_have_all_categories_equally(name, limit):
    first = [row["category"] for row in rows(name)[:limit]]
    assert {first.count(category) for category in CATEGORIES} == {limit // 6}


def test_file_has_two_prompts_in_distribution_per_ood_prompt():
    for start in range(0, 360, 18):
        splits = [row["split"] for row in rows("shapes-test.jsonl")[start : start + 18]]
        assert (splits.count("test"), splits.count("ood")) == (12, 6)
