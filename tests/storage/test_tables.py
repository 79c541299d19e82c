import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.alignment.metric import Column
from mi_ray.alignment.oracle import Oracle
from mi_ray.config import RunConfig
from mi_ray.storage import tables

METRICS = {
    "oracle": Oracle.columns,
    "judges:Likes": (
        Column("likes", "how much the judge likes it", "nats", None, 7.5, False, "owner/judge", "abc123", True, False),
    ),
}
SCHEMAS = {
    "candidates": tables.candidates_schema(tuple(tables.SCORES), METRICS),
    "selected": tables.SELECTED,
    "evaluation": tables.evaluation_schema(METRICS),
    "scored": tables.SCORED,
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_column_has_a_description(schema):
    for field in schema:
        assert len(field.metadata[b"description"]) > 5, field.name
        if field.name.startswith("score_"):
            meaning = field.metadata[b"description"]
            assert b"nats" in meaning or b"no weight" in meaning


def test_descriptions_are_stored_in_the_file(tmp_path):
    schema = SCHEMAS["candidates"]
    uri = str(tmp_path / "part.parquet")
    storage.write_table(uri, schema.empty_table())
    assert [(f.name, f.metadata) for f in storage.read_table(uri).schema] == [(f.name, f.metadata) for f in schema]


def test_metric_columns_are_read_from_a_file(tmp_path):
    uri = str(tmp_path / "part.parquet")
    storage.write_table(uri, SCHEMAS["evaluation"].empty_table())
    schema = storage.ParquetRows(uri).schema
    assert tables.metric_columns(schema) == METRICS
    assert list(tables.metric_columns(schema)) == ["oracle", "judges:Likes"]
    metadata = schema.field("likes").metadata
    assert metadata[b"metric"] == b"judges:Likes"
    assert (metadata[b"model"], metadata[b"revision"]) == (b"owner/judge", b"abc123")
    assert tables.metric_columns(tables.evaluation_schema()) == {}


@pytest.mark.parametrize("name", ["rank", "score_pmi", "pmi", "round"])
def test_column_with_a_used_name_is_refused(name):
    with pytest.raises(ValueError, match=f"'m:Mine' declares the column '{name}', but the tables already use"):
        tables.candidates_schema(("pmi",), {"m:Mine": (Column(name, "mine"),)})


@pytest.mark.parametrize("name", ["candidates", "evaluation", "scored"])
def test_tables_with_images_have_hugging_face_metadata(name, tmp_path):
    """`datasets` uses the feature of this metadata if its storage type equals the type of the column."""
    uri = str(tmp_path / "part.parquet")
    storage.write_table(uri, SCHEMAS[name].empty_table())
    schema = storage.read_table(uri).schema
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": {"image": {"_type": "Image"}}}}
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_every_configurable_score_has_a_column():
    known = RunConfig.model_fields["score"].annotation.model_fields["names"].annotation
    for name in known.__args__[0].__args__:
        assert tables.score_columns((name,))[0].name == f"score_{name}"


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
        str(tmp_path / "part.parquet"), pa.Table.from_pylist(rows, tables.candidates_schema(("mitune",)))
    )
    frame = pd.read_parquet(tmp_path / "part.parquet")
    np.testing.assert_array_equal(frame["latents"][0].reshape(frame["latents_shape"][0]), latents.reshape(2, 2, 2))
    assert frame["latents"][0].dtype == np.float16
    assert frame["image"][0]["bytes"] == b"\x89PNG"
    assert frame["score_mitune"][0] == 1.5
    assert int(frame["seed"][0]) == 2**62
    assert frame["error"].isna().tolist() == [True, False]
