import hashlib
import json

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompts import PROMPTS, PromptReader, prompt_id, read_prompts
from mi_ray.inputs.shard_plan import Holdout, Shard, ShardPlan, read_shard, write_prompts


def words(prompt: str) -> int:
    return len(prompt.split()) + 2


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: bytes | str | list[dict]) -> str:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def faults(file: str, **settings) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_prompts(file, **settings)
    return caught.value.faults


def table_of(*prompts: str) -> pa.Table:
    empty = [None] * len(prompts)
    return pa.table([[prompt_id(p) for p in prompts], list(prompts), empty, empty, empty], schema=PROMPTS)


# ------------------------------------------------------------------------------------------ what is read
@pytest.mark.parametrize(
    "content",
    [
        b"a cat\nan owl\xe2\x80\xa8 at night\n",
        b"a cat\r\nan owl\xe2\x80\xa8 at night\r\n",
        b"a cat\nan owl\xe2\x80\xa8 at night",
        b"\xef\xbb\xbfa cat\n\n  \nan owl\xe2\x80\xa8 at night\n\n",
        b"a cat\tanimals\t3\r\n  an owl\xe2\x80\xa8 at night  \tbirds",
    ],
    ids=["plain", "crlf", "no_final_newline", "bom_and_blank_lines", "tabs"],
)
def test_text_files(write, content):
    table, skipped = read_prompts(write("prompts.txt", content))
    assert table.schema == PROMPTS
    assert table["prompt"].to_pylist() == ["a cat", "an owl\u2028 at night"]
    assert table["prompt_id"].to_pylist()[0] == hashlib.sha256(b"a cat").hexdigest()[:16]
    assert table["category"].to_pylist() == [None, None]
    assert skipped == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "JSONL"])
def test_rows_with_category_and_split(write, tmp_path, suffix):
    rows = [
        {"prompt": " a cat ", "category": "animals", "split": "test", "other": [1]},
        {"prompt": "a naïve owl", "category": None},
    ]
    file = write(f"prompts.{suffix}", rows)
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    table, _ = read_prompts(file)
    assert table.drop_columns("details").to_pylist() == [
        {"prompt_id": prompt_id("a cat"), "prompt": "a cat", "category": "animals", "split": "test"},
        {"prompt_id": prompt_id("a naïve owl"), "prompt": "a naïve owl", "category": None, "split": None},
    ]


@pytest.mark.parametrize(
    "column", [pa.array(["a", "b"], pa.large_string()), pa.array(["a", "b"]).dictionary_encode()], ids=str
)
def test_parquet_strings_of_any_encoding(tmp_path, column):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"))[0]["prompt"].to_pylist() == ["a", "b"]


def test_order_of_many_lines_is_kept(write):
    prompts = [f"prompt {i}" for i in range(150_000)]
    table, _ = read_prompts(write("p.txt", "\n".join(prompts)))
    assert table["prompt"].to_pylist() == prompts


def test_limit_reads_only_the_first_prompts(write):
    file = write("p.txt", "a\nb\nc\na\na far too long prompt\n")
    table, _ = read_prompts(file, limit=3, token_count=words, max_tokens=4)
    assert table["prompt"].to_pylist() == ["a", "b", "c"]


def test_duplicates_are_dropped_before_the_limit(write):
    file = write("p.txt", "a\na\nb\na\nc\n")
    assert read_prompts(file, duplicates="drop")[0]["prompt"].to_pylist() == ["a", "b", "c"]
    assert read_prompts(file, duplicates="drop", limit=2)[0]["prompt"].to_pylist() == ["a", "b"]


def test_overlong_prompts_are_skipped_with_a_row_each(write):
    file = write("p.txt", "a\na b c d\nb\n")
    table, skipped = read_prompts(file, overlong="skip", token_count=words, max_tokens=5)
    assert table["prompt"].to_pylist() == ["a", "b"]
    assert skipped == [{"prompt": "a b c d", "stage": "prompts", "message": "6 tokens, but the text encoder reads 5"}]


def test_overlong_prompts_stay_whole_when_the_encoder_cuts_them(write):
    table, skipped = read_prompts(write("p.txt", "a b c d\n"), overlong="truncate", token_count=words, max_tokens=5)
    assert (table["prompt"].to_pylist(), skipped) == (["a b c d"], [])


def test_broken_lines_are_skipped_with_a_row_each(write):
    lines = [
        b'{"prompt": "a"}',
        b"no json",
        b'{"prompt": "\xff"}',
        b'{"prompt": ""}',
        b'{"prompt": "b\0"}',
        b"",
        b"x" * 2**21,
    ]
    table, skipped = read_prompts(write("p.jsonl", b"\n".join([*lines, b'{"prompt": "c"}'])), broken="skip")
    assert table["prompt"].to_pylist() == ["a", "c"]
    assert sorted(row["message"] for row in skipped) == [
        "line 2 is not JSON",
        "line 3 is not UTF-8",
        "line 4 is without a prompt",
        "line 5 is binary, or UTF-16 without a byte order mark",
        "line 7 is longer than 1 MiB",
    ]
    assert next(row["prompt"] for row in skipped if "line 3" in row["message"]) == '{"prompt": "\ufffd"}'


def test_dropped_duplicates_are_reported(write):
    _, skipped = read_prompts(write("p.txt", "a\nb\na\n"), duplicates="drop")
    assert skipped == [{"prompt": "a", "stage": "prompts", "message": "line 3 repeats line 1"}]


def test_duplicates_are_found_at_any_distance(write):
    prompts = [f"prompt {i}" for i in range(40_000)]
    file = write("p.txt", "\n".join([*prompts, "prompt 39999", "new", "prompt 7"]))
    table, skipped = read_prompts(file, duplicates="drop")
    assert table["prompt"].to_pylist() == [*prompts, "new"]
    assert [row["message"] for row in skipped] == ["line 40001 repeats line 40000", "line 40003 repeats line 8"]


@pytest.mark.parametrize("total", [100_000, pytest.param(1_000_000, marks=(pytest.mark.slow, pytest.mark.long))])
def test_every_one_of_many_lines_on_s3_is_kept_or_counted(s3_server, total):
    """Broken lines of all kinds among 10^5 or 10^6: told in a few rows and a short message, and all counted."""
    bad = {
        "not UTF-8": b'{"prompt": "caf\xe9"}',
        "not JSON": b'{"prompt": "a dog',
        "without a prompt": b'{"prompt": "", "category": "animals"}',
        "binary, or": b'{"prompt": "a\0dog"}',
        "a repeated prompt": b'{"prompt": "prompt number 0"}',
        "longer than the 9 tokens": b'{"prompt": "%d one two three four five six seven eight"}',
    }
    kinds, expected, lines = list(bad), dict.fromkeys(bad, 0), []
    for number in range(total):
        if number % 1000 == 999:
            kind = kinds[number // 1000 % len(kinds)]
            expected[kind] += 1
            lines.append(bad[kind] % number if b"%d" in bad[kind] else bad[kind])
        else:
            lines.append(b'{"prompt": "prompt number %d"}' % number)
    lines[total // 2] = b'{"prompt": "' + b"x" * 2**21 + b'"}'
    client = boto3.client("s3", endpoint_url=f"http://{s3_server}")
    client.create_bucket(Bucket="prompts")
    client.put_object(Bucket="prompts", Key="many.jsonl", Body=b"\n".join(lines))
    uri = f"s3://prompts/many.jsonl?scheme=http&endpoint_override={s3_server}"
    skip = {"duplicates": "drop", "overlong": "skip", "broken": "skip"}
    reader = PromptReader(uri, **skip, token_count=words, max_tokens=9)
    kept = 0
    for batch in reader.batches():
        assert all(prompt.startswith("prompt number") for prompt in batch["prompt"].to_pylist())
        kept += len(batch)
    told = dict.fromkeys([*expected, "longer than 1 MiB"], 0)
    names = {"tokens, but the text": "longer than the 9 tokens", " repeats ": "a repeated prompt"}
    for row in reader.skipped:
        kind = next(name for part, name in [*names.items(), *zip(told, told, strict=True)] if part in row["message"])
        told[kind] += row.get("count", 1)
    assert told == expected | {"longer than 1 MiB": 1}
    assert kept + sum(told.values()) == total
    assert len(reader.skipped) <= 21 * len(told)
    refused = faults(uri)
    assert {"not UTF-8" in fault or "binary" in fault for fault in refused} == {True}
    assert len("".join(refused)) < 1000


# ------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\n \r\n", "is empty"),
        ("p.parquet", b"", "is empty"),
        (
            "p.txt",
            b"a\nb\n\x89PNG\0\0",
            "or UTF-16 without a byte order mark (a zero byte on line 3); save it as UTF-8",
        ),
        ("p.txt", "a\nb\n".encode("utf-16-le"), "mark (a zero byte on line 1)"),
        ("p.txt", "a\nna\u00efve\nb\nd\u00e9j\u00e0".encode("latin-1"), "lines 2, 4 are not UTF-8; save it as"),
        ("p.txt", b"a\n\tanimals\n", "line 2 is without a prompt"),
        ("p.docx", b"a\n", "has the unknown extension '.docx'; give .txt, .jsonl, .json, .csv"),
        ("prompts", b"a\n", "has the unknown extension ''"),
        ("p.parquet", b"PAR1 and nothing else", "is not a Parquet file"),
    ],
)
def test_broken_files(write, name, content, expected):
    file = write(name, content)
    (fault,) = faults(file, field="evaluation.file")
    assert fault.startswith(f"evaluation.file: {file!r} ")
    assert expected in fault


def test_a_missing_file_and_a_folder(tmp_path):
    missing = str(tmp_path / "none.txt")
    assert faults(missing) == [f"prompts.file: {missing!r} does not exist; give a file with prompts"]
    assert "is a folder" in faults(str(tmp_path))[0]
    assert "cannot be read" in faults("gopher://host/p.txt")[0]


def test_all_faults_of_a_jsonl_are_reported_together(write):
    lines = [
        '{"prompt": "a"}',
        "no json",
        "[1]",
        '{"text": "b"}',
        '{"prompt": " "}',
        '{"prompt": 3}',
        "{",
        "[" * 100_000,
    ]
    lines += [r'{"prompt": "half \ud83d"}', '{"prompt": "b", "category": [7]}']
    told = faults(write("p.jsonl", "\n".join(lines)))
    assert [fault.partition(".jsonl' ")[2].partition(";")[0] for fault in told] == [
        "lines 2, 7, 8 are not JSON",
        "line 3 is a JSON list, not an object",
        "line 5 is without a prompt",
        "line 6 is not usable (the prompt is not text but int)",
        "line 9 is not usable (the prompt is not text but contains half a surrogate pair)",
        "line 10 is not usable (the category or split is neither text nor a number)",
    ]


def test_many_broken_lines_are_counted(write):
    (fault,) = faults(write("p.jsonl", "x\n" * 40))
    assert "lines 1, 2, 3, 4, 5 and 35 more are not JSON" in fault


def test_duplicates_and_overlong_prompts_are_reported_together(write):
    file = write("p.txt", "a\nb\na\nb\na\nc d e f\n")
    told = faults(file, token_count=words, max_tokens=5)
    assert told == [
        f"prompts.file: {file!r} has 3 repeated prompts, first 'a' on line 3, which repeats line 1;"
        " remove them or set prompts.duplicates: drop",
        f"prompts.file: {file!r} has 1 prompt longer than the 5 tokens that the text encoder reads,"
        " first line 6 with 6 tokens: 'c d e f'; shorten them or set prompts.overlong: skip, or truncate",
    ]


def test_skipping_everything_is_refused(write):
    (fault,) = faults(write("p.txt", "a b c d"), overlong="skip", token_count=words, max_tokens=5)
    assert "has no valid prompt left" in fault


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"picture": ["a"], "n": [1]}, "has no column prompt, caption, text, txt among picture, n; set"),
        ({"prompt": [1, 2]}, "has int64 in column 'prompt', not text"),
        ({"prompt": [b"\x80\x04pickled"]}, "has binary in column 'prompt', not text"),
        ({"prompt": ["a", None, ""]}, "rows 2, 3 are without a prompt"),
        ({"prompt": pa.array([], pa.string())}, "has no prompts"),
    ],
)
def test_broken_parquet(tmp_path, columns, expected):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    (fault,) = faults(str(tmp_path / "p.parquet"))
    assert expected in fault


# ------------------------------------------------------------------------------------------ plan
def shards_of(table: pa.Table, prompts_per_shard: int, key: str, folder) -> list[Shard]:
    """All shards, read like in an actor."""
    source = str(folder / "prompts.parquet")
    write_prompts(source, table.to_batches())
    plan = ShardPlan(source, prompts_per_shard, key)
    stored = storage.ParquetRows(source)
    return [read_shard(plan.row(index), stored) for index in range(len(plan))]


def test_shards_contain_every_prompt_once_in_order(tmp_path):
    table = table_of(*(f"prompt {i}" for i in range(11)))
    shards = shards_of(table, 4, "key", tmp_path)
    assert [len(shard.prompts) for shard in shards] == [4, 4, 3]
    assert [p for shard in shards for p in shard.prompts] == table["prompt"].to_pylist()
    assert [i for shard in shards for i in shard.prompt_ids] == table["prompt_id"].to_pylist()
    assert [shard.index for shard in shards] == [0, 1, 2]
    assert len({shard.name for shard in shards}) == 3


def test_names_of_shards_depend_on_key_and_prompts_only(tmp_path):
    def plan_shards(table, prompts_per_shard, key):
        return shards_of(table, prompts_per_shard, key, tmp_path)

    names = [shard.name for shard in plan_shards(table_of("a", "b", "c"), 2, "key")]
    assert names == [shard.name for shard in plan_shards(table_of("a", "b", "c"), 2, "key")]
    assert all(name.startswith(f"part-0000{i}-") and name.endswith(".parquet") for i, name in enumerate(names))
    assert not {*names} & {shard.name for shard in plan_shards(table_of("a", "b", "c"), 2, "other")}
    assert names[0] != plan_shards(table_of("b", "a"), 2, "key")[0].name


def split(table: pa.Table, share: float, seed: int) -> tuple[pa.Table, pa.Table]:
    ids = table["prompt_id"].to_pylist()
    held_out = Holdout(ids, share, seed)(ids)
    return table.filter(pa.array(~held_out)), table.filter(pa.array(held_out))


def test_stored_table_is_kept_and_another_one_refused(tmp_path):
    table = table_of(*(f"prompt {i}" for i in range(40_000)))
    source, stored = str(tmp_path / "source.parquet"), tmp_path / "stored.parquet"
    write_prompts(source, table.to_batches())
    write_prompts(str(stored), table.to_batches(max_chunksize=777))  # the same rows, in other groups
    was = stored.read_bytes()
    ShardPlan(source, 1000, "key").store(str(stored), "prompts.file")
    last = table.schema.get_field_index("category")
    others = {
        "there were 40000 and now there are 39999": table.slice(0, 39_999),
        "prompt 1 was 'prompt 0' and is 'prompt 1'": table.slice(1),
        "category 1 was None and is 'color'": table.set_column(last, "category", pa.array(["color"] * len(table))),
    }
    for told, other in others.items():
        write_prompts(source, other.to_batches())
        with pytest.raises(ConfigError, match=rf"^prompts\.file: .*{told}"):
            ShardPlan(source, 1000, "key").store(str(stored), "prompts.file")
    assert stored.read_bytes() == was


def test_holdout_has_its_share_and_is_stable():
    table = table_of(*(f"prompt {i}" for i in range(2000)))
    train, held_out = split(table, 0.1, seed=0)
    assert len(held_out) == pytest.approx(200, abs=60)
    assert sorted(train["prompt"].to_pylist() + held_out["prompt"].to_pylist()) == sorted(table["prompt"].to_pylist())
    fewer = table.filter(pa.array(np.arange(2000) % 3 > 0))
    assert {*split(fewer, 0.1, seed=0)[1]["prompt"].to_pylist()} < {*held_out["prompt"].to_pylist()}
    assert split(table, 0.1, seed=1)[1]["prompt"] != held_out["prompt"]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_holdout_leaves_a_prompt_on_either_side(share):
    assert sorted(map(len, split(table_of("a", "b", "c"), share, seed=0))) == [1, 2]


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(ConfigError, match="single prompt"):
        Holdout([prompt_id("a")], 0.5, seed=0)
