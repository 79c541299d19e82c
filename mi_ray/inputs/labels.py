"""Writes the candidate images of a calibration, so that a user can label them, and reads the labels."""

import json
import math

import numpy as np
import pyarrow as pa

from mi_ray import storage
from mi_ray.inputs.images import encode_png
from mi_ray.inputs.prompts import LONGEST_LINE
from mi_ray.inputs.records import form_of, format_of, read_records

_LABEL = ("prompt_id", "candidate_index", "label")


class PoolImages:
    """Writes the images of a pool and, at the end, pool.jsonl. The user adds the labels to its lines."""

    def __init__(self, folder: str, digest: str):
        self.folder, self.digest, self.lines = folder, digest, []

    def __call__(self, images: np.ndarray, prompts: list[str], places: list[tuple[str, int]]):
        for image, prompt, (prompt_id, candidate) in zip(images, prompts, places, strict=True):
            name = f"{prompt_id}-{candidate}.png"
            storage.write_bytes(storage.join(self.folder, name), encode_png(image)["bytes"])
            line = {"image": name, "prompt": prompt, "prompt_id": prompt_id, "candidate_index": candidate}
            self.lines.append(line | {"pool": self.digest})

    def finish(self):
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        storage.write_bytes(storage.join(self.folder, "pool.jsonl"), text.encode())
        print(
            f"{len(self.lines)} images and pool.jsonl are in {self.folder}: add `label` to its lines and set --labels"
        )


def read_labels(uri: str, digest: str) -> dict[tuple[str, int], float]:
    """{(prompt_id, candidate_index): label}; NaN means no label.

    Raises:
        ValueError: the file cannot be read, a field is missing, or it belongs to another pool.
    """
    try:
        if not storage.exists(uri):
            raise ValueError("it does not exist")
        rows = _rows(uri)
        places = [(str(row["prompt_id"]), int(row["candidate_index"])) for row in rows]
        labels = [math.nan if row.get("label") in (None, "") else float(row["label"]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{uri!r} is not valid ({reason}); give rows with {', '.join(_LABEL)}") from error
    if any(row.get("pool", digest) != digest for row in rows):
        raise ValueError(f"{uri!r} labels another pool; use the model, sampler and seed of the run with --pool")
    return dict(zip(places, labels, strict=True))


def _rows(uri: str) -> list[dict]:
    if not format_of(uri):
        return storage.read_table(uri).to_pylist()
    records = list(read_records(uri, form_of(uri, LONGEST_LINE), LONGEST_LINE))
    if fault := next((f"line {record.number} is {record.fault}" for record in records if record.fields is None), None):
        raise ValueError(fault)
    return [record.fields for record in records]
