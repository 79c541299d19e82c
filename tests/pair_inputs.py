"""The same five pairs of image and caption in every format that jobs/score.py reads."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mi_ray.shapes.grammar import draw_scene, parse
from mi_ray.shapes.scenes import render

CAPTIONS = ["a red circle left of a blue square", "two hearts", "a striped star", "a green cross", "a pink heart"]


def image_of(prompt: str) -> np.ndarray:
    return render(draw_scene(parse(prompt), np.random.default_rng(0), unseen=True))


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encoded(image_of(caption)) for caption in CAPTIONS]


def write_parquet(folder: Path) -> Path:
    images = [{"bytes": image, "path": None} for image in IMAGES]
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS}), folder / "pairs.parquet", row_group_size=2)
    return folder / "pairs.parquet"


def write_lines(folder: Path) -> Path:
    write_folder(folder)
    lines = [json.dumps({"image": f"images/{i}.png", "text": c, "more": i}) for i, c in enumerate(CAPTIONS)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def write_folder(folder: Path) -> Path:
    (folder / "images").mkdir()
    for i, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
        (folder / "images" / f"{i}.png").write_bytes(image)
        (folder / "images" / f"{i}.txt").write_text(f"{caption}\n")
    return folder / "images"


def write_metadata(folder: Path) -> Path:
    images = write_folder(folder)
    lines = [json.dumps({"file_name": f"{i}.png", "caption": caption}) for i, caption in enumerate(CAPTIONS)]
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return images


def add(tar: tarfile.TarFile, name: str, content: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(folder: Path, mode: str = "w", name: str = "pairs.tar") -> Path:
    with tarfile.open(folder / name, mode) as tar:
        for i, (image, caption) in enumerate(zip(IMAGES, CAPTIONS, strict=True)):
            add(tar, f"data/{i:04d}.png", image)
            if i % 2:
                add(tar, f"data/{i:04d}.txt", caption.encode())
            else:
                add(tar, f"data/{i:04d}.json", json.dumps({"caption": caption}).encode())
    return folder / name


def write_gzipped_tar(folder: Path) -> Path:
    return write_tar(folder, "w:gz", "pairs.tar.gz")
