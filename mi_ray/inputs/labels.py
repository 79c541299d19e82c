"""The images of a calibration's pool, written to be labelled, and the labels that come back."""

import json
import math

import numpy as np
import pyarrow as pa

from mi_ray import storage
from mi_ray.inputs.images import encode_png

_LABEL = ("prompt_id", "candidate_index", "label")


class PoolImages:
    """Writes the images of a pool and, at the end, pool.jsonl, whose lines take the labels."""

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
        told = f"{len(self.lines)} images and pool.jsonl are in {self.folder}"
        print(f"{told}: add `label` to its lines and give --labels")


def read_labels(uri: str, digest: str) -> dict[tuple[str, int], float]:
    """{(prompt_id, candidate_index): label}, NaN where there is none.

    Raises:
        ValueError: the file cannot be read, lacks something, or is of another pool.
    """
    try:
        if not storage.exists(uri):
            raise ValueError("it does not exist")
        rows = storage.read_lines(uri) if uri.endswith(".jsonl") else storage.read_table(uri).to_pylist()
        places = [(str(row["prompt_id"]), int(row["candidate_index"])) for row in rows]
        labels = [math.nan if row.get("label") is None else float(row["label"]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{uri!r} will not do ({reason}); give rows of {', '.join(_LABEL)}") from error
    if any(row.get("pool", digest) != digest for row in rows):
        raise ValueError(f"{uri!r} labels another pool: model, sampler and seed must be those of --pool")
    return dict(zip(places, labels, strict=True))
