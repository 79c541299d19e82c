import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.storage import tables

SCHEMAS = {
    "candidates": tables.candidates_schema(tuple(tables.SCORES)),
    "selected": tables.SELECTED,
    "evaluation": tables.evaluation_schema(),
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_column_says_what_it_is(schema):
    for field in schema:
        assert len(field.metadata[b"description"]) > 5, field.name
        if field.name.startswith("score_"):
            meaning = field.metadata[b"description"]
            assert b"nats" in meaning or b"no weight" in meaning


def test_descriptions_survive_the_file(tmp_path):
    schema = SCHEMAS["candidates"]
    uri = str(tmp_path / "part.parquet")
    storage.write_table(uri, schema.empty_table())
    assert [(f.name, f.metadata) for f in storage.read_table(uri).schema] == [(f.name, f.metadata) for f in schema]


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
