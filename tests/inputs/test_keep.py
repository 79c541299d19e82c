"""Writing of the input's rows without those called wrong."""

import gzip
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_inputs import CAPTIONS, IMAGES, add, write_folder, write_gzipped_tar, write_lines, write_parquet, write_tar

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.keep import check_keep, write_kept
from mi_ray.inputs.pairs import Columns, plan_pairs, read_pairs
from mi_ray.storage.tables import SCORED

WRONG = (1, 3)
RIGHT = [caption for number, caption in enumerate(CAPTIONS) if number not in WRONG]


def write_csv(folder):
    write_folder(folder)
    rows = [f'images/{i}.png,"{caption}"\n' for i, caption in enumerate(CAPTIONS)]
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(rows))
    return folder / "pairs.csv"


def write_array(folder):
    write_folder(folder)
    rows = [{"image": f"images/{i}.png", "caption": caption, "more": [i]} for i, caption in enumerate(CAPTIONS)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def write_packed(folder):
    lines = write_lines(folder)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    return folder / "pairs.jsonl.gz"


def scored(folder, source):
    """The plan of an input, and the folder of its scores: the captions at `WRONG` are contradicted."""
    plan = plan_pairs(str(source), 2, "key", Columns())
    for shard in plan:
        rows = []
        for pair in read_pairs(shard, Columns()):
            wrong = "color" if CAPTIONS.index(pair.prompt) in WRONG else None
            told = {"key": pair.key, "file": pair.file, "prompt": pair.prompt, "contradicted_attribute": wrong}
            rows.append(dict.fromkeys(SCORED.names) | told)
        storage.write_table(str(folder / "scores" / shard.name), pa.Table.from_pylist(rows, SCORED))
    return plan, str(folder / "scores")


def write_turned(folder):
    """A tar with all images first, and names with dots."""
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i, image in enumerate(IMAGES):
            add(tar, f"a.v{i}.png", image)
        for i, caption in enumerate(CAPTIONS):
            add(tar, f"a.v{i}.txt", caption.encode())
    return folder / "pairs.tar"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (write_parquet, "kept.parquet"),
        (write_lines, "kept.jsonl"),
        (write_packed, "kept.jsonl.gz"),
        (write_csv, "kept.csv"),
        (write_array, "kept.json"),
        (write_tar, "kept.tar"),
        (write_turned, "kept.tar"),
        (write_gzipped_tar, "kept.tgz"),
        (write_folder, "kept.jsonl"),
    ],
)
def test_what_is_kept_reads_as_the_input_without_its_wrong_pairs(tmp_path, make, name):
    source = make(tmp_path)
    plan, scores = scored(tmp_path, source)
    assert write_kept(plan, str(tmp_path / name), scores) == (3, 2)
    kept = plan_pairs(str(tmp_path / name), 100, "key", Columns())
    pairs = [pair for shard in kept for pair in read_pairs(shard, Columns())]
    assert [pair.prompt for pair in pairs] == RIGHT
    assert [pair.image for pair in pairs] == [image for i, image in enumerate(IMAGES) if i not in WRONG]


def test_rows_keep_all_their_columns_and_their_bytes(tmp_path):
    source = write_lines(tmp_path)
    plan, scores = scored(tmp_path, source)
    write_kept(plan, str(tmp_path / "kept.jsonl"), scores)
    lines = source.read_text().splitlines()
    assert (tmp_path / "kept.jsonl").read_text().splitlines() == [lines[0], lines[2], lines[4]]
    (tmp_path / "p").mkdir()
    table = write_parquet(tmp_path / "p")
    plan, scores = scored(tmp_path / "p", table)
    write_kept(plan, str(tmp_path / "kept.parquet"), scores)
    assert pq.read_table(tmp_path / "kept.parquet").equals(pq.read_table(table).take([0, 2, 4]))
    with tarfile.open(write_tar(tmp_path)) as tar:
        assert len(tar.getnames()) == 2 * len(CAPTIONS)


def test_a_file_of_another_type_is_refused_before_the_scores(tmp_path):
    plan = plan_pairs(str(write_lines(tmp_path)), 2, "key", Columns())
    with pytest.raises(ConfigError, match=r"keep: .*kept.parquet' is not of the input's type; end it in .jsonl"):
        check_keep(plan, str(tmp_path / "kept.parquet"))
    with pytest.raises(ConfigError, match="it is the input itself"):
        check_keep(plan, str(tmp_path / "pairs.jsonl"))
    write_parquet(tmp_path)
    with pytest.raises(ConfigError, match="the input has 2 files with pairs"):
        check_keep(plan_pairs(str(tmp_path), 2, "key", Columns()), str(tmp_path / "kept.jsonl"))
