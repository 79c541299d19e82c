import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.prompts import read_prompts

TABLE = pa.table({"prompt": ["a", "b"], "score": pa.array([1.5, None], pa.float32())})


@pytest.fixture(scope="module")
def endpoint():
    """An S3 server in this process with the bucket `runs`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        query = f"endpoint_override={address}&scheme=http&allow_bucket_creation=true"
        system, _ = storage.filesystem(f"s3://runs?{query}")
        system.create_dir("runs")
        yield address
    server.stop()


@pytest.fixture(params=["local", "s3_by_environment", "s3_by_query"])
def root(request, tmp_path, monkeypatch) -> str:
    """An empty folder's URI."""
    if request.param == "local":
        return str(tmp_path)
    address = request.getfixturevalue("endpoint")
    if request.param == "s3_by_query":
        return f"s3://runs/{tmp_path.name}?endpoint_override={address}&scheme=http"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    return f"s3://runs/{tmp_path.name}"


# ------------------------------------------------------------------------------------------ everywhere
def test_files_are_found_and_read_back(root):
    uri = storage.join(root, "round-0", "a.bin")
    assert not storage.exists(uri)
    assert storage.list_names(storage.join(root, "round-0")) == []
    storage.write_bytes(uri, b"\0\1")
    storage.write_bytes(uri, b"\2")
    storage.write_json(storage.join(root, "round-0", "b.json"), {"x": [1.5, "é"]})
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"\2"
    assert storage.read_json(storage.join(root, "round-0", "b.json")) == {"x": [1.5, "é"]}
    assert storage.list_names(storage.join(root, "round-0")) == ["a.bin", "b.json"]
    assert storage.list_names(root) == ["round-0"]


def test_tables_are_read_back_in_the_order_of_their_names(root):
    folder = storage.join(root, "candidates")
    names = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert storage.missing_parts(folder, names) == names
    for name in (names[2], names[0]):
        storage.write_table(storage.join(folder, name), TABLE.append_column("part", [[name, name]]))
    assert storage.missing_parts(folder, names) == [names[1]]
    assert storage.read_tables(folder)["part"].to_pylist() == [names[0]] * 2 + [names[2]] * 2
    assert storage.read_table(storage.join(folder, names[0]), ["score"]) == TABLE.select(["score"])


def test_events_are_appended(root):
    storage.check_writable(root)
    storage.write_json(storage.join(root, "run.json"), {})
    storage.log_event(root, "started", shards=3)
    storage.log_event(root, "finished")
    lines = storage.read_bytes(storage.join(root, "events.jsonl")).decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert [(e["event"], e.get("shards")) for e in events] == [("started", 3), ("finished", None)]
    assert storage.list_names(root) == ["events.jsonl", "run.json"]


def test_prompts_are_read_from_there(root):
    uri = storage.join(root, "prompts.txt")
    storage.write_bytes(uri, b"a cat\nan owl\n")
    assert read_prompts(uri)[0]["prompt"].to_pylist() == ["a cat", "an owl"]


def test_a_folder_is_there_as_a_local_one(root):
    storage.write_bytes(storage.join(root, "adapter", "weights"), b"12")
    copy = storage.local_folder(storage.join(root, "adapter"))
    assert storage.list_names(copy) == ["weights"]
    assert storage.read_bytes(storage.join(copy, "weights")) == b"12"


# ------------------------------------------------------------------------------------------ URIs, local files
@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("runs/a", "runs/a/b/c.json"),
        ("runs/a/", "runs/a/b/c.json"),
        ("what?/a", "what?/a/b/c.json"),
        ("s3://bucket/a/", "s3://bucket/a/b/c.json"),
        ("s3://bucket/a/?region=x&scheme=http", "s3://bucket/a/b/c.json?region=x&scheme=http"),
    ],
)
def test_join(uri, joined):
    assert storage.join(uri, "b", "c.json") == joined


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "part.parquet"
    storage.write_bytes(str(target), b"before")

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        storage.write_bytes(str(target), b"after")
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_json_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "report.json"), {"auc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folders_are_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        storage.check_writable(str(tmp_path / "file" / "run"))


def test_an_equals_sign_in_a_folder_is_no_column(tmp_path):
    uri = storage.join(str(tmp_path), "lr=1", "part.parquet")
    storage.write_table(uri, TABLE)
    assert storage.read_table(uri) == TABLE


# ------------------------------------------------------------------------------------------ schemas
SCHEMAS = {
    "candidates": storage.candidates_schema(tuple(storage.SCORES)),
    "selected": storage.SELECTED,
    "evaluation": storage.evaluation_schema(),
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_column_says_what_it_is(schema):
    for field in schema:
        assert len(field.metadata[b"description"]) > 5, field.name
        if field.name.startswith("score_"):
            assert b"nats" in field.metadata[b"description"]


def test_descriptions_survive_the_file(tmp_path):
    schema = SCHEMAS["candidates"]
    uri = str(tmp_path / "part.parquet")
    storage.write_table(uri, schema.empty_table())
    assert [(f.name, f.metadata) for f in storage.read_table(uri).schema] == [(f.name, f.metadata) for f in schema]


def test_every_configurable_score_has_a_column():
    known = RunConfig.model_fields["score"].annotation.model_fields["names"].annotation
    for name in known.__args__[0].__args__:
        assert storage.score_columns((name,))[0].name == f"score_{name}"


def test_candidates_open_in_pandas(tmp_path):
    latents = np.arange(8, dtype=np.float16)
    row = {
        "prompt_id": "0123456789abcdef",
        "prompt": "a cat",
        "seed": 2**62,
        "delta_sq": [0.5, 0.25],
        "score_mitune": 1.5,
        "kept": True,
        "latents": latents,
        "latents_shape": [2, 2, 2],
        "image": {"bytes": b"\x89PNG", "path": None},
    }
    rows = [row, {"prompt": "a dog", "error": "out of memory"}]
    storage.write_table(
        str(tmp_path / "part.parquet"), pa.Table.from_pylist(rows, storage.candidates_schema(("mitune",)))
    )
    frame = pd.read_parquet(tmp_path / "part.parquet")
    np.testing.assert_array_equal(frame["latents"][0].reshape(frame["latents_shape"][0]), latents.reshape(2, 2, 2))
    assert frame["latents"][0].dtype == np.float16
    assert frame["image"][0]["bytes"] == b"\x89PNG"
    assert frame["score_mitune"][0] == 1.5
    assert int(frame["seed"][0]) == 2**62
    assert frame["error"].isna().tolist() == [True, False]
