# ruff: noqa: E501 (a strategy a line)
"""Whatever an input holds, only the right value, an error row, or a message of bounded length comes out.

`EXAMPLES` in the environment is the number of examples of each property; `benchmarks/hostile_inputs.py` takes more.
"""

import csv
import gzip
import io
import json
import os
import re
import string
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pair_inputs import IMAGES, add
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.images import read_image
from mi_ray.inputs.pairs import Columns, Pair, plan_pairs, read_pairs
from mi_ray.inputs.prompts import PromptReader
from mi_ray.storage.tables import SCORED

EXAMPLES = int(os.environ.get("EXAMPLES", "300"))
MOST = 1500  # characters of a message, with the paths in it
hostile = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)

PNG = IMAGES[0]
any_text = st.text(st.characters(), max_size=60)  # with surrogates, controls and all planes
plain_text = st.text(string.ascii_letters + "äß漢🔴,;\"' ", min_size=1, max_size=30).filter(lambda t: t.strip())
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["image", "caption", "prompt", "text", "file_name", "Image", "category", "split"])
rows = st.dictionaries(names | any_text, any_json | st.just("0.png"), max_size=5)


@contextmanager
def folder(**files: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        for name, content in ({"0.png": PNG} | files).items():
            (Path(path) / name).write_bytes(content)
        yield Path(path)


def check_bounded(error: Exception, expected: bool = True):
    assert expected, error
    assert len(str(error)) < MOST


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def clean(text: str) -> str:
    """What the rules of `inputs.text` make of a text: written again here, by other means."""
    return re.sub("[\x00-\x1f\x7f-\x9f]", " ", text.replace("\ufeff", "")).strip()


def prompts_of(path: Path, **settings) -> list[str] | None:
    """The prompts; None: refused with a message of bounded length."""
    reader = PromptReader(str(path), duplicates="drop", **settings)
    try:
        table = pa.Table.from_batches(reader.batches())
    except ConfigError as error:
        check_bounded(error)
        return None
    assert all(len(row["message"]) < MOST and len(row["prompt"]) <= 500 for row in reader.skipped)
    assert len("\n".join(reader.found)) < 30 * MOST
    found = table["prompt"].to_pylist()
    assert all(prompt == clean(prompt) != "" for prompt in found)
    return found


def pairs_of(path: Path, columns: Columns | None = None) -> list[Pair]:
    columns = columns or Columns()
    try:
        plan = plan_pairs(str(path), 2, "key", columns)
    except ConfigError as error:
        check_bounded(error)
        return []
    assert len("\n".join(plan.found)) < 10 * MOST
    pairs = [pair for shard in plan for pair in read_pairs(shard, columns)]
    for pair in pairs:
        assert (pair.error is None) == (pair.image is not None)
        assert len(pair.error or "") < MOST
        assert len(pair.remark or "") < MOST
        assert pair.prompt is None or pair.prompt == clean(pair.prompt)
    told = [{name: getattr(pair, name) for name in ("key", "file", "prompt", "remark", "error")} for pair in pairs]
    pa.Table.from_pylist([dict.fromkeys(SCORED.names) | row for row in told], SCORED)  # they can be stored
    return pairs


# ------------------------------------------------------------------------------------------ prompts
@hostile
@given(st.lists(plain_text, min_size=1, max_size=8), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
       st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())  # fmt: skip
def test_lines_are_read_in_every_encoding(lines, encoding, end, packed):
    content = end.join(lines).encode(encoding)
    name = "p.txt.gz" if packed else "p.txt"
    expected = list(dict.fromkeys(clean(line) for line in lines))
    if expected[0].casefold() in ("prompt", "caption", "text", "txt"):
        expected = expected[1:]
    with folder(**{name: gzip.compress(content) if packed else content}) as path:
        assert (prompts_of(path / name) or []) == expected


@hostile
@given(st.lists(st.binary(max_size=40) | any_text.map(lambda t: t.encode(errors="surrogatepass")), max_size=8),
       st.sampled_from(["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p.txt.gz", "p.parquet"]))  # fmt: skip
def test_any_bytes_as_prompts(lines, name):
    with folder(**{name: b"\n".join(lines)}) as path:
        for broken in ("error", "skip"):
            prompts_of(path / name, broken=broken)


@hostile
@example([[], {"prompt": "a cat"}], False)
@given(st.lists(any_json | rows, max_size=6), st.booleans())
def test_any_json_as_prompts(values, array):
    content = dumped(values) if array else b"\n".join(map(dumped, values))
    name = "p.json" if array else "p.jsonl"
    with folder(**{name: content}) as path:
        found = prompts_of(path / name, broken="skip") or []
    texts = [value.get("prompt") if isinstance(value, dict) else value for value in values]
    readable = {clean(t) for t in texts if isinstance(t, str) and not re.search("[\ud800-\udfff]", t)} - {""}
    assert {prompt for prompt in readable if {"prompt": prompt} in values} <= {*found}


# ------------------------------------------------------------------------------------------ pairs
@hostile
@given(st.binary(max_size=60) | any_text.map(lambda t: t.encode("utf-16", errors="surrogatepass")))
def test_any_bytes_as_a_caption(content):
    with folder(**{"0.txt": content}) as path:
        (pair,) = pairs_of(path)
        assert (pair.error is None) or "caption" in pair.error
    with folder(**{"a.tar": tarred([("0.png", PNG), ("0.txt", content)])}) as path:
        (other,) = pairs_of(path / "a.tar")
    assert (pair.prompt, bool(pair.error)) == (other.prompt, bool(other.error))


@hostile
@given(
    plain_text, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.sampled_from(["txt", "caption", "TXT"])
)
def test_a_caption_is_read_in_every_encoding(caption, encoding, suffix):
    with folder(**{f"0.{suffix}": caption.encode(encoding)}) as path:
        (pair,) = pairs_of(path)
    assert (pair.prompt, pair.image) == (clean(caption), PNG)


@hostile
@given(st.lists(any_json | rows, max_size=6), st.booleans())
def test_any_json_as_pairs(values, array):
    content = dumped(values) if array else b"\n".join(map(dumped, values))
    name = "a.json" if array else "a.jsonl"
    with folder(**{name: content}) as path:
        pairs = pairs_of(path / name)
    assert all(pair.image == PNG for pair in pairs if pair.error is None)
    if pairs:
        assert len(pairs) == len(values)


@hostile
@given(st.lists(st.tuples(plain_text, plain_text), min_size=1, max_size=6), st.sampled_from([",", ";", "\t"]))
def test_a_written_table_is_read_back(texts, delimiter):
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([["image", "caption", "more"], *(["0.png", *both] for both in texts)])
    name = "a.tsv" if delimiter == "\t" else "a.csv"
    with folder(**{name: sink.getvalue().encode()}) as path:
        pairs = pairs_of(path / name)
    assert [pair.prompt for pair in pairs] == [clean(caption) for caption, _ in texts]


def tarred(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", errors="surrogateescape") as tar:
        for name, content in members:
            add(tar, name, content)
    return sink.getvalue()


members = st.tuples(
    st.tuples(st.sampled_from(["0", "1", "a/0", "._0", "__MACOSX/0", "./2"]) | any_text.map(lambda t: t[:9].replace("\0", "")),
              st.sampled_from([".png", ".txt", ".json", ".input.png", ".JPG", ""])).map("".join)
    .filter(lambda name: not re.search("[\ud800-\udfff]", name)),
    st.sampled_from([PNG, b"a circle", b"", b'{"caption": "a star"}', b"\xff\xfe", b"[1]"]) | st.binary(max_size=20),
)  # fmt: skip


@hostile
@given(st.lists(members, max_size=8), st.integers(0, 40))
def test_any_members_of_a_tar(files, cut):
    content = tarred(files)
    with folder(**{"a.tar": content[: len(content) - 97 * cut] if cut else content}) as path:
        pairs = pairs_of(path / "a.tar")
    assert all(
        pair.image in dict(files).values() or pair.image in [c for _, c in files] for pair in pairs if not pair.error
    )


@hostile
@given(
    st.lists(plain_text, min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from(["{:03}", "a.{}"])
)
def test_a_tar_is_read_whole_in_any_order(captions, random, name):
    files = [
        (f"{name.format(i)}.{suffix}", content)
        for i, caption in enumerate(captions)
        for suffix, content in (("png", PNG), ("txt", caption.encode()))
    ]
    random.shuffle(files)
    with folder(**{"a.tar": tarred(files)}) as path:
        found = {pair.key: (pair.prompt, pair.image) for pair in pairs_of(path / "a.tar")}
        keys = [f"{path}/a.tar#{name.format(i)}" for i in range(len(captions))]
    assert found == dict(zip(keys, [(clean(caption), PNG) for caption in captions], strict=True))


# ------------------------------------------------------------------------------------------ images
MODES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["L", "P"],
         "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"], "WEBP": ["RGB", "RGBA"], "BMP": ["1", "L", "RGB"]}  # fmt: skip
forms = st.sampled_from([(kind, mode) for kind, modes in MODES.items() for mode in modes])


def drawn(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """An image with values over the whole range of its mode."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    if mode in ("I;16", "I"):
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257).convert(mode)
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32) / 255)
    image = Image.fromarray(values)
    return Image.merge("LAB", image.split()) if mode == "LAB" else image.convert(mode)


@hostile
@given(forms, st.integers(1, 90), st.integers(1, 90), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_images_of_every_mode_are_read_or_have_a_reason(form, width, height, orientation, seed, big_profile):
    kind, mode = form
    image, sink, exif = drawn(mode, width, height, seed), io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    more = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if kind == "PNG" and big_profile:
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_text("comment", "x" * (2 << 20), zip=True)
    image.save(sink, kind, lossless=True, quality=100, **more) if kind == "WEBP" else image.save(sink, kind, **more)
    try:
        read = read_image(sink.getvalue(), (32, 32), "crop")
    except ValueError as error:
        check_bounded(error, mode == "LAB")
        return
    assert read.shape == (32, 32, 3)
    if kind in ("PNG", "TIFF", "BMP", "WEBP") and mode in ("1", "L", "RGB", "I;16", "I", "F"):
        grey = np.asarray(drawn("RGB", width, height, seed))[..., 0]
        plain = Image.fromarray(grey) if mode in ("I;16", "I", "F") else image
        turned = plain.convert("RGB")
        turned.getexif()[ExifTags.Base.Orientation] = orientation if more else 1
        expected = np.asarray(ImageOps.fit(ImageOps.exif_transpose(turned), (32, 32), Image.Resampling.LANCZOS))
        assert np.abs(read.astype(int) - expected).max() <= 1


@hostile
@given(
    forms, st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), max_size=6), st.integers(0, 3)
)
def test_damaged_images_are_read_or_have_a_reason(form, changes, cut):
    kind, mode = form
    sink = io.BytesIO()
    drawn(mode, 24, 24, 0).save(sink, kind)
    content = bytearray(sink.getvalue())
    for at, change in changes:
        at %= len(content)
        content[at : at + len(change)] = change
    for fit in ("crop", "exact"):
        try:
            read = read_image(bytes(content[: len(content) * (4 - cut) // 4]), (24, 24), fit)
        except ValueError as error:
            check_bounded(error)
        else:
            assert read.shape == (24, 24, 3)


@pytest.mark.parametrize("uri", ["s3://b/a", "/x/y", "gs://b/?x"])
def test_a_name_joined_to_a_folder_is_found_again(uri):
    @hostile
    @given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12))
    def check(name):
        joined = storage.join(uri, name)
        path = joined.removesuffix("?") if "://" in uri and "?" in joined else joined
        assert path.endswith(f"/{name}") or "://" not in uri

    check()
