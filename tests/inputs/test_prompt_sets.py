"""Published prompt sets: small files in their published forms, and the real files of T2I-CompBench."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompt_sets import Prompt
from mi_ray.inputs.prompts import PromptReader, read_prompts
from mi_ray.inputs.shard_plan import ShardPlan, read_shard, with_details, write_prompts
from mi_ray.storage import ParquetRows

COMPBENCH = Path(__file__).parents[3] / "shared" / "t2i_compbench"  # prompt files of the user


def found(file: Path | str, **settings) -> list[tuple]:
    """(prompt, category, split, details) of every prompt."""
    table, _ = read_prompts(str(file), **settings)
    return [(str(p), row["category"], row["split"], p.details) for p, row in zip(
        with_details(table), table.to_pylist(), strict=True)]  # fmt: skip


def test_geneval(tmp_path):
    include = [{"class": "tv", "count": 1}, {"class": "apple", "count": 1, "position": ["above", 0]}]
    rows = [
        {"tag": "position", "include": include, "prompt": "a photo of an apple above a tv"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
        | {"prompt": "a photo of two dogs"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert found(tmp_path / "evaluation_metadata.jsonl") == [
        ("a photo of an apple above a tv", "position", None, {"include": include}),
        ("a photo of two dogs", "counting", None, {key: rows[1][key] for key in ("include", "exclude")}),
    ]


def test_geneval_2(tmp_path):
    pairs = [["How many cars are in the image?", "five"], ["Are there any cars in the image?", "Yes"]]
    row = {"prompt": "five cars", "atom_count": 2, "vqa_list": pairs, "skills": ["count", "object"]}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(row))
    details = {"vqa_list": pairs, "skills": ["count", "object"]}
    assert found(tmp_path / "geneval2_data.jsonl") == [("five cars", "2 atoms", None, details)]


def test_parti_prompts(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tmany\na "quoted" cat\tAnimals\tImagination\t\n'
    )
    assert found(tmp_path / "PartiPrompts.tsv") == [
        ("bond", "Abstract", None, {"challenge": "Basic"}),
        ('a "quoted" cat', "Animals", None, {"challenge": "Imagination"}),
    ]


def test_diffusion_db(tmp_path):
    columns = {"image_name": ["a.png", "b.png"], "prompt": ["a cat", "a cat"], "seed": pa.array([1, 2], pa.uint32())}
    pq.write_table(pa.table(columns | {"prompt_nsfw": [0.1, 0.2]}), tmp_path / "metadata.parquet")
    assert found(tmp_path / "metadata.parquet", duplicates="drop") == [("a cat", None, None, {})]


DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
partiprompts7,"A red car, and a dog.",,1,0,entity,whole,entity - whole (car),Is there a car?
partiprompts7,"A red car, and a dog.",,2,1,attribute,color,"attribute - color (car, red)",Is the car red?
partiprompts7,"A red car, and a dog.",,4,"1, 2",relation,spatial,"relation (car, dog)",Is the car beside the dog?
12,Two cats.,,1,0,entity,whole,entity - whole (cats),Are there cats?
"""


def test_questions_of_dpg_are_joined_by_item(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(DPG)
    questions = [["Is there a car?", "yes"], ["Is the car red?", "yes"], ["Is the car beside the dog?", "yes"]]
    details = {"vqa_list": questions, "skills": ["entity", "attribute", "relation"], "parents": [[], [0], [0, 1]]}
    one = {"vqa_list": [["Are there cats?", "yes"]], "skills": ["entity"], "parents": [[]]}
    assert found(tmp_path / "dpg_bench.csv") == [
        ("A red car, and a dog.", "partiprompts", None, details),
        ("Two cats.", None, None, one),
    ]
    (tmp_path / "dpg_bench.csv").write_text(DPG.replace(",1,0,entity,whole,entity - whole (cats)", ",x,0,e,w,c"))
    with pytest.raises(ConfigError, match=r"line 5 is not a question .*; write a number as proposition_id"):
        found(tmp_path / "dpg_bench.csv")


def test_categories_of_t2i_compbench_are_the_names_of_its_files(tmp_path):
    texts = {
        "color_val_seen.txt": "a green bench and a blue bowl\r\n",
        "color_val_unseen.txt": "a pink car and a gray dog",
        "complex_val_spatial.txt": "The red hat was on top of the rack.\n\n",
        "complex_val_spatialaction.txt": "The river flowed next to the trees.\nprompt\n",
        "spatial_val.txt": "a giraffe next to a lamp\tgiraffe\n",
        "notes.md": "no prompts",
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    reader = PromptReader(str(tmp_path / "*_val*.txt"))
    table = pa.Table.from_batches(reader.batches())
    labels = [(row["category"], row["split"], p.details) for p, row in zip(
        with_details(table), table.to_pylist(), strict=True)]  # fmt: skip
    assert labels == [
        ("color", "seen", {}),
        ("color", "unseen", {}),
        ("complex", None, {"relations": "spatial"}),
        ("complex", None, {"relations": "spatialaction"}),
        ("complex", None, {"relations": "spatialaction"}),
        ("spatial", None, {}),
    ]
    assert found(tmp_path / "spatial_val.txt") == [("a giraffe next to a lamp", "spatial", None, {})]
    (tmp_path / "texture_val.txt").write_text("a pink car and a gray dog\n")
    with pytest.raises(ConfigError, match="on line 8, which repeats line 2"):  # counted over all files
        found(tmp_path / "*_val*.txt")
    with pytest.raises(ConfigError, match=r"'.*\*_test.txt' matches no file; correct the name"):
        found(tmp_path / "*_test.txt")


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="needs the prompt files of T2I-CompBench")
def test_the_real_files_of_t2i_compbench():
    rows = found(COMPBENCH / "*_val.txt", duplicates="drop")
    counts = {c: sum(category == c for _, category, _, _ in rows) for c in ("color", "complex", "numeracy", "spatial")}
    assert counts == {"color": 300, "complex": 300, "numeracy": 300, "spatial": 300}


@pytest.mark.parametrize("column", ["include", "vqa_list"])
def test_columns_of_any_table(tmp_path, column):
    """In CSV a list is JSON; a column of the same name that holds something else is not read."""
    (tmp_path / "mine.csv").write_text(f'prompt,{column}\na cat,"[[""Is it a cat?"", ""Yes""]]"\na dog,yes\na cow,\n')
    assert [row[3] for row in found(tmp_path / "mine.csv")] == [{column: [["Is it a cat?", "Yes"]]}, {}, {}]


def test_a_shard_has_the_details_and_a_changed_question_is_another_prompt_table(tmp_path):
    row = {"prompt": "two cars", "vqa_list": [["How many cars?", "two"]]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row))
    source, stored = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    write_prompts(source, read_prompts(str(file))[0].to_batches())
    plan = ShardPlan(source, 2, "key")
    (prompt,) = read_shard(plan.row(0), ParquetRows(source)).prompts
    assert (prompt, prompt.details) == ("two cars", {"vqa_list": [["How many cars?", "two"]]})
    plan.store(stored, "prompts.file")
    file.write_text(json.dumps(row | {"vqa_list": [["How many cars?", "three"]]}))
    write_prompts(source, read_prompts(str(file))[0].to_batches())
    with pytest.raises(ConfigError, match="other prompts: details 1 was"):
        ShardPlan(source, 2, "key").check_stored(stored, "prompts.file")


def test_prompts_of_an_earlier_version_have_no_details():
    table = pa.table({"prompt": ["a cat"]})
    assert with_details(table)[0].details == {}
    assert Prompt("a cat").details == {}
