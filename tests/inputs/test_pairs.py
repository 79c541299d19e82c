"""Reading of pairs: which pairs each input gives, and which become a pair with an error."""

import json
import tarfile
import tracemalloc
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_inputs import (
    CAPTIONS,
    IMAGES,
    add,
    write_folder,
    write_gzipped_tar,
    write_lines,
    write_metadata,
    write_parquet,
    write_tar,
)
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.pairs import Columns, PairShard, plan_pairs, read_pairs
from mi_ray.storage import tables


@pytest.fixture(scope="module")
def server(s3_server):
    """The address of an S3 server with the bucket `pairs`."""
    boto3.client("s3", endpoint_url=f"http://{s3_server}").create_bucket(Bucket="pairs")
    return s3_server


@pytest.fixture(params=["s3://pairs", "gs://runs"])
def bucket(request, tmp_path) -> str:
    """An empty folder on an object store."""
    address = request.getfixturevalue("server" if request.param.startswith("s3") else "gcs_server")
    return f"{request.param}/{tmp_path.name}?endpoint_override={address}&scheme=http"


def read_all(
    source: Path | str,
    per_shard: int = 2,
):
    shards = plan_pairs(str(source), per_shard, "key", Columns())
    return [pair for shard in shards for pair in read_pairs(shard, Columns())], shards


@pytest.mark.parametrize(
    ("write", "shards"),
    [
        (write_parquet, 3),
        (write_lines, 3),
        (write_folder, 3),
        (write_metadata, 3),
        (write_tar, 1),
        (write_gzipped_tar, 1),
    ],
)
def test_every_kind_of_input_gives_the_same_pairs(tmp_path, write, shards):
    pairs, planned = read_all(write(tmp_path))
    assert [(pair.image, pair.prompt, pair.error) for pair in pairs] == [
        (image, caption, None) for image, caption in zip(IMAGES, CAPTIONS, strict=True)
    ]
    assert len(planned) == shards
    assert len({shard.name for shard in planned}) == shards
    assert len({pair.key for pair in pairs}) == len(pairs)


def test_changed_input_or_config_changes_the_parts(tmp_path):
    source = write_lines(tmp_path)
    names = [shard.name for shard in plan_pairs(str(source), 2, "key", Columns())]
    assert names == [shard.name for shard in plan_pairs(str(source), 2, "key", Columns())]
    assert not set(names) & {shard.name for shard in plan_pairs(str(source), 2, "other", Columns())}


@pytest.mark.parametrize(
    ("write", "changed", "others"),
    [(write_parquet, "pairs.parquet", 0), (write_lines, "pairs.jsonl", 2), (write_folder, "images/1.txt", 2)],
)
def test_change_of_the_same_length_changes_the_parts(tmp_path, write, changed, others):
    """Only the shards with the change get other names; in a Parquet file all do."""
    source, file = write(tmp_path), tmp_path / changed
    before = {shard.name for shard in plan_pairs(str(source), 2, "key", Columns())}
    file.write_bytes(file.read_bytes().replace(b"two hearts", b"ten hearts"))
    after = {shard.name for shard in plan_pairs(str(source), 2, "key", Columns())}
    assert (len(before), len(before & after), len(after)) == (3, others, 3)


def test_appended_lines_keep_earlier_shards(tmp_path):
    source = write_lines(tmp_path)
    source.write_text(source.read_text() + "\n")
    before = [shard.name for shard in plan_pairs(str(source), 2, "key", Columns())]
    source.write_text(source.read_text() + json.dumps({"image": "images/0.png", "text": "more"}))
    pairs, after = read_all(source)
    after = [shard.name for shard in plan_pairs(str(source), 2, "key", Columns())]
    assert before[:2] == after[:2]
    assert before[2] != after[2]
    assert [pair.prompt for pair in pairs] == [*CAPTIONS, "more"]


def test_unreadable_pair_has_a_reason(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "images" / "0.txt").unlink()
    lines = [
        '{"image": "images/none.png", "caption": "a circle"}',
        '{"image": "images/1.png"}',
        "not json",
        "[1]",
        '{"image": "ftp://host/1.png", "caption": "a circle"}',
        '{"image": null, "caption": "a circle"}',
        '{"image": "images/1.png", "caption": 3}',
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs, _ = read_all(tmp_path / "pairs.jsonl")
    assert len(pairs) == len(lines)
    expected = [
        "does not exist",
        "no column caption, prompt",
        "is not JSON",
        "is a JSON list, not an object",
        "cannot be read",
        "no image",
        "the caption is not text but int: 3",
    ]
    for pair, reason in zip(pairs, expected, strict=False):
        assert reason in pair.error
    assert "there is no caption beside it, such as 0.txt" in read_all(tmp_path / "images")[0][0].error


def test_names_and_captions_that_are_not_utf8(tmp_path):
    """JSON can contain half a surrogate pair, and names in a tar are bytes. Neither is valid UTF-8."""
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": "a \\ud800 circle"}\n')
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    with tarfile.open(tmp_path / "b.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        add(tar, "\udcff.png", IMAGES[0])
        add(tar, "\udcff.txt", CAPTIONS[0].encode())
    (bad,), (good,) = (read_all(tmp_path / name)[0] for name in ("a.jsonl", "b.tar"))
    assert "surrogate" in bad.error
    assert (good.error, good.prompt) == (None, CAPTIONS[0])
    rows = [{"key": pair.key, "prompt": pair.prompt, "error": pair.error} for pair in (bad, good)]
    assert len(pa.Table.from_pylist(rows, schema=tables.SCORED)) == 2


class Hostile:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_table_with_pickles_is_refused(tmp_path):
    pickles = ArrowPythonObjectArray.from_objects([Hostile(tmp_path / "ran")])  # ray.data would unpickle them
    pq.write_table(pa.table({"image": pickles, "caption": ["a circle"]}), tmp_path / "pairs.parquet")
    with pytest.raises(ConfigError, match="whose values may be code"):
        read_all(tmp_path / "pairs.parquet")
    place = {"kind": "parquet", "uri": str(tmp_path / "pairs.parquet"), "row_groups": [0], "first": 0}
    (pair,) = read_pairs(PairShard(0, "part", json.dumps(place)), Columns())
    assert "whose values may be code" in pair.error
    with pytest.raises(ValueError, match="whose values may be code"):
        storage.read_table(str(tmp_path / "pairs.parquet"))
    assert not (tmp_path / "ran").exists()


def test_unreadable_row_does_not_affect_other_rows(tmp_path):
    rows = 30
    captions = [b"a circle"] * rows
    captions[5] = "a caf\xe9".encode("latin-1")
    text = pa.array(captions, pa.binary()).view(pa.string())  # as Arrow takes it, unseen
    table = pa.table({"image": [IMAGES[0]] * rows, "caption": text})
    file = tmp_path / "pairs.parquet"
    pq.write_table(table, file, row_group_size=10, compression="none", use_dictionary=False)
    pairs, _ = read_all(file, per_shard=100)
    assert [number for number, pair in enumerate(pairs) if pair.error] == [5]
    assert "is not text" in pairs[5].error
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    with file.open("r+b") as whole:
        whole.seek(column.data_page_offset)
        whole.write(b"\xff" * 20)
    pairs, _ = read_all(file, per_shard=100)
    assert len(pairs) == rows
    assert [number for number, pair in enumerate(pairs) if pair.error] == [5, *range(10, 20)]
    assert len({pair.key for pair in pairs}) == rows


def test_duplicate_columns_are_reported(tmp_path):
    table = pa.table([IMAGES[:1], IMAGES[:1], CAPTIONS[:1]], ["image", "image", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="2 columns image"):
        read_all(tmp_path / "a.parquet")


def test_deeply_nested_json_does_not_affect_other_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.png", IMAGES[0])
        add(tar, "0.json", b"[" * 100_000)
        add(tar, "1.png", IMAGES[1])
        add(tar, "1.txt", CAPTIONS[1].encode())
    bad, good = read_all(tmp_path / "a.tar")[0]
    assert "caption cannot be read" in bad.error
    assert (good.error, good.prompt) == (None, CAPTIONS[1])


def test_added_file_keeps_other_shards(tmp_path):
    tar = write_tar(tmp_path)
    before = [shard.name for shard in read_all(tmp_path)[1]]
    (tmp_path / "a.tar").write_bytes(tar.read_bytes())
    after = [shard.name for shard in read_all(tmp_path)[1]]
    assert len(after) == len(before) + 1
    assert set(before) < set(after)


def test_transient_store_error_is_raised(tmp_path, monkeypatch):
    source = write_metadata(tmp_path)

    def fails(uri):
        raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    shards = plan_pairs(str(source), 2, "key", Columns())
    monkeypatch.setattr(storage, "read_bytes", fails)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        list(read_pairs(shards.shards[0], Columns()))


def test_files_cut_short_keep_what_comes_before(tmp_path):
    tar = write_tar(tmp_path)
    with tarfile.open(tar) as whole:
        cut = whole.getmembers()[4].offset_data + 50  # in the third image
    tar.write_bytes(tar.read_bytes()[:cut])
    pairs, _ = read_all(tar)
    assert [pair.prompt for pair in pairs[:2]] == CAPTIONS[:2]
    assert pairs[-1].error.startswith("the rest cannot be read")
    folder = tmp_path / "tables"
    folder.mkdir()
    write_parquet(folder)
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"picture": IMAGES}), folder / "other.parquet")
    pairs, _ = read_all(folder)
    assert sum(pair.error is None for pair in pairs) == len(CAPTIONS)
    assert {Path(pair.key).name for pair in pairs if pair.error} == {"broken.parquet"}


def test_a_tar_out_of_order_is_not_kept_in_memory(tmp_path):
    size, count = 1 << 20, 64
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(count):
            add(tar, f"a.{i}.png", bytes([i]) * size)
        for i in range(count):
            add(tar, f"a.{i}.txt", f"caption {i}".encode())
    (shard,) = plan_pairs(str(tmp_path / "a.tar"), 2, "key", Columns())
    tracemalloc.start()
    try:
        for i, pair in enumerate(read_pairs(shard, Columns())):
            assert (pair.image, pair.prompt) == (bytes([i]) * size, f"caption {i}")
        assert i == count - 1
        assert tracemalloc.get_traced_memory()[1] < 8 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda folder: folder / "none", "does not exist"),
        (lambda folder: folder, "has no pairs"),
        (lambda folder: folder / "a.docx", "has an unknown type"),
        (lambda folder: folder / "other.parquet", "no column image, jpg"),
    ],
)
def test_input_without_pairs_is_refused(tmp_path, make, reported):
    source = make(tmp_path)
    if source.suffix == ".docx":
        source.write_text("a,b")
    if source.suffix == ".parquet":
        pq.write_table(pa.table({"picture": IMAGES}), source)
    with pytest.raises(ConfigError, match=reported):
        plan_pairs(str(source), 2, "key", Columns())


@pytest.mark.parametrize("write", [write_parquet, write_lines, write_folder, write_tar])
def test_pairs_from_object_stores(tmp_path, bucket, write):
    source = write(tmp_path)
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        storage.write_bytes(storage.join(bucket, *file.relative_to(tmp_path).parts), file.read_bytes())
    pairs, _ = read_all(storage.join(bucket, source.name))
    assert [(pair.image, pair.prompt) for pair in pairs] == list(zip(IMAGES, CAPTIONS, strict=True))
    assert all(pair.key.startswith(bucket.partition("?")[0]) for pair in pairs)
