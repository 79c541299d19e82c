# ruff: noqa: E501 (one row a situation)
"""What is read of an input and what is told of it: one row a situation, each with the small files that it needs.

A row of `PAIRS` is (name, files, input, pairs, told). `files` is {path: content}; a dict as content is a tar of members,
a list of (name, content) a tar with repeats. `pairs` lists, for each pair, its caption, or `Error(part of the reason)`;
it is `Refused(part of the message)` if the input is refused at once. `told` is a part of what is printed about the input
or of a pair's remark.

Each row also goes through the command line of its job with --dry-run: exit code 2 and one message a fault if it is
refused, else 0. Nothing is written.
"""

import base64
import csv
import functools
import gzip
import io
import json
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pair_inputs import IMAGES, add
from safetensors.torch import load_file, save_file

from mi_ray import storage
from mi_ray.inputs.layout import IMAGE_SUFFIXES
from mi_ray.inputs.pairs import Columns, plan_pairs, read_pairs
from mi_ray.inputs.prompts import PromptReader
from mi_ray.stages import pipeline, preflight, score

ROOT = Path(__file__).parents[2]
PNG, OTHER = IMAGES[:2]
BASE64 = base64.b64encode(PNG).decode()
APPLE = b"\0\5\x16\7" + bytes(60)


class Error(str):
    """A pair that is not read, by a part of its reason."""


class Refused(str):
    """An input that is refused, by a part of the message."""


def table(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tarred(members, mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            add(tar, name, content)
    return sink.getvalue()


def row(caption="a circle", image="0.png", **more) -> dict:
    return {"image": image, "caption": caption, **more}


ONE = {"0.png": PNG, "0.txt": b"a circle"}
META = table(url=["http://x/1.jpg"], caption=["a circle"], key=["000000000"], status=["success"])
TURNED = {"0.png": PNG, "1.png": PNG, "0.txt": b"a circle", "1.txt": b"a star"}
NO_CAPTION = Error("there is no caption beside it")

PAIRS = [
    # which files are the user's data
    ("images with text files", ONE, "", ["a circle"], "images with a caption file: 1"),
    ("folders in a folder", {f"a/{n}": c for n, c in ONE.items()}, "", ["a circle"], ""),
    ("dot files of a Mac", {**ONE, "._0.png": APPLE, "._0.txt": APPLE}, "", ["a circle"], "2 hidden or system files"),
    ("the folder __MACOSX", {**ONE, "__MACOSX/0.png": PNG, "__MACOSX/0.txt": b"no"}, "", ["a circle"], "2 hidden"),
    ("checkpoints of notebooks", {**ONE, ".ipynb_checkpoints/0-checkpoint.png": PNG}, "", ["a circle"], "1 hidden"),
    ("files of systems", {**ONE, ".DS_Store": b"", "Thumbs.db": b"", "@eaDir/0.png": PNG}, "", ["a circle"], "3 hidden"),
    ("a Mac's tar", {"a.tar": {"._0.png": APPLE, "0.png": PNG, "._0.txt": APPLE, "0.txt": b"a"}}, "a.tar", ["a"], ""),
    ("a tar of the folder .", {"a.tar": {"./0.png": PNG, "./0.txt": b"a circle"}}, "a.tar", ["a circle"], "tars: 1"),
    ("img2dataset's files", {"00000.parquet": META, "00000_stats.json": b"{}", "00000/0.jpg": PNG, "00000/0.txt": b"a",
      "00000/0.json": lines(row("a"))}, "", ["a"], "passed over: 00000.parquet: no column image"),
    ("img2dataset's tars", {"0.parquet": META, "0_stats.json": b"{}", "0.tar": ONE}, "", ["a circle"], "0.parquet"),
    ("a stray .jsonl", {**ONE, "log.jsonl": lines({"step": 1})}, "", ["a circle"], "passed over: log.jsonl: no column"),
    ("a stray .csv", {**ONE, "stats.csv": b"a,b\n1,2\n"}, "", ["a circle"], "passed over: stats.csv"),
    ("a stray .json", {**ONE, "info.json": b'{\n "a": 1\n}'}, "", ["a circle"], "info.json: its first row is not JSON"),
    ("an archive beside images", {**ONE, "all.zip": b"PK"}, "", ["a circle"], "not read because of their type: 1 .zip"),
    ("other types", {**ONE, "1.heic": b"", "2.heic": b"", "a.mp4": b""}, "", ["a circle"], "2 .heic, 1 .mp4"),
    ("a pair beside a tar", {**ONE, "a.tar": {"1.png": PNG, "1.txt": b"a star"}}, "", ["a star", "a circle"], "tars: 1"),
    ("a pair beside a table", {**ONE, "a.parquet": table(image=[PNG], text=["a star"])}, "", ["a star", "a circle"], ""),
    ("an image without caption", {**ONE, "1.png": PNG}, "", ["a circle", NO_CAPTION], "images with a caption file: 1, images without one: 1"),
    ("only images", {"0.png": PNG}, "", Refused("none of 1 images has a caption file, such as 0.txt"), ""),
    ("only images and a table", {"0.png": PNG, "a.csv": b"a,b\n1,2\n"}, "", Refused("a.csv: no column image"), ""),
    ("an empty folder", {"a/x.md": b""}, "", Refused("has no pairs (nothing; not read because of their type: 1 .md)"), ""),
    ("a damaged table beside images", {**ONE, "a.parquet": b"PAR1"}, "", [Error("Parquet"), "a circle"], ""),
    ("a damaged compressed table", {**ONE, "a.jsonl.gz": b"no gzip"}, "", [Error("zlib"), "a circle"], ""),
    ("a damaged table alone", {"a.parquet": b"PAR1"}, "a.parquet", Refused("a.parquet: "), ""),
    ("an unknown type", {"a.docx": b"x"}, "a.docx", Refused("it has an unknown type; give .parquet"), ""),
    ("an image as input", {"a.png": PNG}, "a.png", Refused("it is a single image; give --image and --prompt"), ""),
    ("other suffixes of images", {"0.jfif": PNG, "0.txt": b"a", "1.JPE": PNG, "1.txt": b"b"}, "", ["a", "b"], ""),
    ("every suffix of an image", {f"{i}.{end}": PNG if end != "txt" else b"a" for i in range(len(IMAGE_SUFFIXES))
      for end in (IMAGE_SUFFIXES[i][1:], "txt")}, "", ["a"] * len(IMAGE_SUFFIXES), ""),
    # text
    ("a byte order mark", {**ONE, "0.txt": b"\xef\xbb\xbfa circle"}, "", ["a circle"], ""),
    ("a mark in a tar", {"a.tar": {"0.png": PNG, "0.txt": b"\xef\xbb\xbfa circle"}}, "a.tar", ["a circle"], ""),
    ("UTF-16 with a mark", {**ONE, "0.txt": "a cïrcle".encode("utf-16")}, "", ["a cïrcle"], ""),
    ("UTF-32 with a mark", {**ONE, "0.txt": "a cïrcle".encode("utf-32")}, "", ["a cïrcle"], ""),
    ("UTF-16 without a mark", {**ONE, "0.txt": "a circle".encode("utf-16-le")}, "", [Error("byte order mark")], ""),
    ("Latin-1", {**ONE, "0.txt": "a cïrcle".encode("latin-1")}, "", [Error("the caption file .txt is not UTF-8")], ""),
    ("control characters", {**ONE, "0.txt": b"a\x1bcircle\t\x07"}, "", ["a circle"], ""),
    ("several lines", {**ONE, "0.txt": b"\n a circle\r\na square\n"}, "", ["a circle"], "has 2 lines; the first is read"),
    ("old line ends", {**ONE, "0.txt": b"a circle\ra square"}, "", ["a circle"], "has 2 lines"),
    ("a line end in a table", {"0.png": PNG, "a.jsonl": lines(row("a\ncircle"))}, "a.jsonl", ["a circle"], ""),
    ("kohya's .caption", {"0.png": PNG, "0.caption": b"a circle"}, "", ["a circle"], ""),
    ("capitals", {"0.PNG": PNG, "0.TXT": b"a circle"}, "", ["a circle"], ""),
    ("capitals that tell files apart", {"a.png": PNG, "A.png": PNG, "a.txt": b"a", "A.txt": b"A"}, "", ["A", "a"], ""),
    ("blank text", {**ONE, "0.txt": b" \n"}, "", [""], ""),
    ("names with dots", {"a.v1.png": PNG, "a.v1.txt": b"a circle"}, "", ["a circle"], ""),
    # several sources of a caption
    ("a text file before JSON", {"a.tar": {**ONE, "0.json": lines(row("old"))}}, "a.tar", ["a circle"],
     "the captions in .txt and its JSON differ; the first is read"),
    ("the same in a folder", {**ONE, "0.json": lines(row("old"))}, "", ["a circle"], ".txt and its JSON differ"),
    ("null hides nothing", {"a.tar": {**ONE, "0.json": lines(row(None))}}, "a.tar", ["a circle"], ""),
    ("JSON alone", {"0.png": PNG, "0.json": lines(row("a star"))}, "", ["a star"], ""),
    ("blank text and JSON", {"a.tar": {**ONE, "0.txt": b"", "0.json": lines(row("a"))}}, "a.tar", ["a"], ""),
    ("a text file and .caption", {**ONE, "0.caption": b"a star"}, "", ["a circle"], "captions in .txt and .caption differ"),
    ("null, then another key", {"0.png": PNG, "a.jsonl": lines(row(None, text="a"))}, "a.jsonl", ["a"],
     "caption from `caption` or else `text`"),
    ("a repeated member", {"a.tar": [*ONE.items(), ("0.txt", b"a star")]}, "a.tar", ["a star"], "txt is repeated"),
    ("the same member again", {"a.tar": [*ONE.items(), ("0.txt", b"a circle")]}, "a.tar", ["a circle"], ""),
    ("a table and text files", {**ONE, "metadata.jsonl": lines(row("a star"))}, "", ["a star"], "not the files beside"),
    # layouts
    ("metadata.jsonl", {"0.png": PNG, "metadata.jsonl": lines({"file_name": "0.png", "text": "a"})}, "", ["a"], ""),
    ("metadata.csv", {"0.png": PNG, "metadata.csv": b"file_name,text\n0.png,a circle\n"}, "", ["a circle"], "CSV: 1"),
    ("metadata.csv in a folder", {"t/0.png": PNG, "t/metadata.csv": b"file_name,text\n0.png,a\n"}, "", ["a"], ""),
    ("images that no table names", {"0.png": PNG, "1.png": PNG, "m.jsonl": lines(row())}, "", ["a circle"],
     "1.png: no caption file, and no table names them"),
    ("CSV with semicolons", {"0.png": PNG, "a.csv": b"image;caption\n0.png;a circle\n"}, "a.csv", ["a circle"], ""),
    ("CSV with quotes", {"0.png": PNG, "a.csv": b'image,caption\n0.png,"a ""red"",\ncircle"\n'}, "a.csv",
     ['a "red", circle'], ""),
    ("CSV with capitals", {"0.png": PNG, "a.csv": b"Image,Caption\n0.png,a\n"}, "a.csv", ["a"], ""),
    ("CSV with a row too long", {"0.png": PNG, "a.csv": b"image,caption\n0.png,a,b\n0.png,c\n"}, "a.csv",
     [Error("a row of 3 values for 2 columns"), "c"], ""),
    ("CSV without these columns", {"a.csv": b"url,label\nx,1\n"}, "a.csv", Refused("among url, label; set --image-col"), ""),
    ("TSV", {"0.png": PNG, "a.tsv": b'image\tcaption\n0.png\t"a" circle\n'}, "a.tsv", ['"a" circle'], ""),
    ("a JSON array", {"0.png": PNG, "a.json": json.dumps([row(), row("b")], indent=1).encode()}, "a.json",
     ["a circle", "b"], "JSON array: 1"),
    ("JSON lines in .json", {"0.png": PNG, "a.json": lines(row())}, "a.json", ["a circle"], "JSON lines: 1"),
    ("compressed lines", {"0.png": PNG, "a.jsonl.gz": gzip.compress(lines(row()))}, "a.jsonl.gz", ["a circle"], ""),
    ("UTF-16 lines", {"0.png": PNG, "a.jsonl": lines(row(), row("b")).decode().encode("utf-16")}, "a.jsonl",
     ["a circle", "b"], ""),
    ("a broken first line", {"0.png": PNG, "a.jsonl": b"x\n" + lines(row())}, "a.jsonl", [Error("not JSON"), "a circle"], ""),
    ("lists of captions", {"a.parquet": table(image=[PNG], caption=[["a circle", "one"]])}, "a.parquet", ["a circle"],
     "there is a list of 2 captions; the first is read"),
    ("lists in lines", {"0.png": PNG, "a.jsonl": lines(row(["", "a"]), row([]))}, "a.jsonl", ["a", None], ""),
    ("a number as caption", {"0.png": PNG, "a.jsonl": lines(row(3))}, "a.jsonl", [Error("not text but int: 3")], ""),
    ("base64", {"a.jsonl": lines(row(image=BASE64))}, "a.jsonl", ["a circle"], ""),
    ("a data: URI", {"a.jsonl": lines(row(image=f"data:image/png;base64,{BASE64}"))}, "a.jsonl", ["a circle"], ""),
    ("a data: URI that is broken", {"a.jsonl": lines(row(image="data:image/png;base64,x!"))}, "a.jsonl",
     [Error("not valid base64")], ""),
    ("a long text as image", {"a.jsonl": lines(row(image="xyz " * 10**6))}, "a.jsonl",
     [Error("a text of 4000000 characters, neither a path nor base64")], ""),
    ("an image on the web", {"a.jsonl": lines(row(image="https://x/1.png"))}, "a.jsonl", [Error("download it")], ""),
    ("an image that is missing", {"a.jsonl": lines(row(image="none.png"))}, "a.jsonl", [Error("does not exist: ")], ""),
    ("backslashes", {"a.jsonl": lines(row(image="a\\0.png"))}, "a.jsonl", [Error("write / instead of \\ in paths")], ""),
    ("no image in a row", {"0.png": PNG, "a.jsonl": lines(row(), row(image=None))}, "a.jsonl",
     ["a circle", Error("there is no image")], ""),
    ("a struct of Hugging Face", {"a.parquet": table(image=[{"bytes": PNG, "path": "x"}], text=["a"])}, "a.parquet",
     ["a"], "image from `image`, caption from `text`"),
    ("a tar out of order", {"a.tar": TURNED}, "a.tar", ["a circle", "a star"], ""),
    ("a tar out of order that is cut", {"a.tar": tarred(TURNED).partition(b" star")[0]}, "a.tar",
     ["a circle", Error("the rest cannot be read")], ""),
    ("a compressed tar out of order", {"a.tgz": tarred(TURNED, "w:gz")}, "a.tgz", [Error("tar --sort=name")] * 4, ""),
    ("a tar that is compressed, by another name", {"a.tar": tarred(ONE, "w:gz")}, "a.tar", ["a circle"], ""),
    ("a sample in two places of a tar", {"a.tar": [*TURNED.items(), ("0.txt", b"b")]}, "a.tar", ["b", "a star"],
     "txt is repeated with another content; the last one is read"),
    ("names with dots in a tar", {"a.tar": {"a.v1.png": PNG, "a.v2.png": PNG, "a.v1.txt": b"a", "a.v2.txt": b"b"}}, "a.tar",
     ["a", "b"], ""),
    ("names with dots in a compressed tar", {"a.tgz": tarred({"a.1.png": PNG, "a.1.txt": b"a"}, "w:gz")}, "a.tgz", ["a"], ""),
    ("one name with dots without text", {"a.tar": {"a.1.png": PNG, "a.1.txt": b"a", "a.2.png": PNG}}, "a.tar",
     ["a", Error("there is no caption among png")], ""),
    ("dotted keys of a tar", {"a.tar": {"0.input.png": PNG, "0.outputs.txt": b"a"}}, "a.tar",
     [Error("set --image-column input.png")], ""),
    ("several images of a sample", {"a.tar": {"0.input.png": PNG, "0.target.png": PNG, "0.txt": b"a"}}, "a.tar",
     [Error("set --image-column input.png")], ""),
    ("more files of a sample", {"a.tar": {**ONE, "0.mask.png": OTHER, "0.cls": b"3"}}, "a.tar", ["a circle"], ""),
    ("a tar.gz", {"a.tar.gz": tarred(ONE, "w:gz")}, "a.tar.gz", ["a circle"], ""),
    ("a tgz", {"a.tgz": tarred(ONE, "w:gz")}, "a.tgz", ["a circle"], ""),
    ("a tar.xz", {"a.tar.xz": tarred(ONE, "w:xz")}, "a.tar.xz", ["a circle"], ""),
    ("a tar.bz2", {"a.tar.bz2": tarred(ONE, "w:bz2")}, "a.tar.bz2", ["a circle"], ""),
    ("lines as .ndjson", {"0.png": PNG, "a.ndjson": lines(row())}, "a.ndjson", ["a circle"], ""),
    ("compressed CSV", {"0.png": PNG, "a.csv.gz": gzip.compress(b"image,text\n0.png,a\n")}, "a.csv.gz", ["a"], ""),
    ("metadata.parquet", {"0.png": PNG, "metadata.parquet": table(file_name=["0.png"], text=["a"])}, "", ["a"], ""),
    ("a path of a struct", {"0.png": PNG, "a.parquet": table(image=[{"bytes": None, "path": "0.png"}], text=["a"])}, "a.parquet", ["a"], ""),
    ("bytes under a key of a tar", {"a.parquet": table(png=[PNG], txt=["a"])}, "a.parquet", ["a"], "image from `png`, caption from `txt`"),
    ("the column jpg", {"a.parquet": table(jpg=[PNG], caption=["a"])}, "a.parquet", ["a"], "image from `jpg`"),
    ("image_path and prompt", {"0.png": PNG, "a.jsonl": lines({"image_path": "0.png", "prompt": "a"})}, "a.jsonl", ["a"], ""),
    ("path and text", {"0.png": PNG, "a.jsonl": lines({"path": "0.png", "text": "a"})}, "a.jsonl", ["a"], ""),
    ("a tar that is cut", {"a.tar": tarred(ONE)[:700]}, "a.tar", [Error("the rest cannot be read")], ""),
    ("an empty tar", {"a.tar": {}}, "a.tar", [], "tars: 1"),
]  # fmt: skip


def write(folder: Path, files: dict):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else tarred(content))


# ------------------------------------------------------------------------------------------ the command line
once = {name: functools.cache(getattr(score, name)) for name in ("check_model", "load_denoiser", "try_fitting")}


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Runs a job with --dry-run in this process, as its command line does: (exit code, output). It must write nothing.
    A model that several rows have is loaded and measured once."""
    for name, function in once.items():
        monkeypatch.setattr(score, name, function)
    monkeypatch.setattr(pipeline, "check_model", once["check_model"])
    monkeypatch.setattr(preflight, "describe", lambda plan, until: "the plan")

    def run(name: str, *arguments: str) -> tuple[int, str]:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--run-dir", str(tmp_path / "run"), "--dry-run"])
        code = 0
        try:
            runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        output, messages = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before
        if code:
            assert all(line.startswith("error: ") for line in messages.splitlines())
            assert len(messages) < 800 + 3 * len(str(tmp_path))
        return code, messages if code else output

    return run


def check_refused(answer: tuple[int, str], told: str):
    assert answer[0] == 2
    assert told in answer[1]


@pytest.mark.parametrize(("files", "source", "pairs", "told"), [case[1:] for case in PAIRS], ids=[c[0] for c in PAIRS])
def test_pairs(tmp_path, dry_run, files, source, pairs, told):
    write(tmp_path, files)
    answer = dry_run("score", "--input", str(tmp_path / source))
    if isinstance(pairs, Refused):
        check_refused(answer, pairs)
        return
    assert answer[0] == 0
    columns = Columns()
    plan = plan_pairs(str(tmp_path / source), 2, "key", columns)
    read = [pair for shard in plan for pair in read_pairs(shard, columns)]
    assert len(read) == len(pairs), read
    for pair, expected in zip(read, pairs, strict=True):
        if isinstance(expected, Error):
            assert expected in (pair.error or pair.prompt)
            assert len(pair.error) < 700
        else:
            assert (pair.error, pair.prompt) == (None, expected)
            assert pair.image == PNG
    assert told in "\n".join([answer[1], *(pair.remark or "" for pair in read)])


# ------------------------------------------------------------------------------------------ prompts
def written(*rows, delimiter=",") -> bytes:
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter).writerows(rows)
    return sink.getvalue().encode()


PROMPTS = [  # (name, file, content, prompts or Refused, told)
    ("PartiPrompts", "p.tsv", b"Prompt\tCategory\tNote\na corgi\tAnimals\t\n", ["a corgi"], "prompts from `Prompt`"),
    ("the same as .txt", "p.txt", b"Prompt\tCategory\na corgi\tAnimals\n", ["a corgi"], "the name of a column"),
    ("the key text", "p.jsonl", lines({"text": "a corgi"}, {"text": "a cat"}), ["a corgi", "a cat"], "`text`"),
    ("the key caption", "p.jsonl", lines({"caption": "a corgi"}), ["a corgi"], "prompts from `caption`"),
    ("no known key", "p.jsonl", lines({"alt": "a corgi"}), Refused("no column prompt, caption, text, txt among alt"), ""),
    ("an array in .jsonl", "p.jsonl", b'[{"prompt": "a corgi"}]', ["a corgi"], "JSON array"),
    ("an array of texts", "p.json", b'["a corgi", "a cat"]', ["a corgi", "a cat"], ""),
    ("an array of anything", "p.json", b'[{"prompt": "a"}, 3]', Refused("item 2 is a JSON int, not an object"), ""),
    ("an array that is cut", "p.json", b'[{"prompt": "a"}', Refused("not a JSON array"), ""),
    ("a JSON object", "p.json", b'{\n"a": {"b": 1}\n}', Refused("lines 1, 2, 3 are not JSON"), ""),
    ("comments", "k.txt", b"# test set\na cat\n", ["a cat"], "line 1 is a comment, and is left out, first '# test set'"),
    ("options", "k.txt", b"a cat --w 512 --n blurry\n", ["a cat --w 512 --n blurry"], "option such as --w 512"),
    ("CSV", "p.csv", written(["prompt", "category"], ["a, b", "x"]), ["a, b"], "CSV"),
    ("CSV without header", "p.csv", b"a corgi\n", Refused("no column prompt, caption, text, txt among a corgi; set"), ""),
    ("compressed text", "p.txt.gz", gzip.compress(b"a\nb\n"), ["a", "b"], "text, one prompt a line"),
    ("compressed lines", "p.jsonl.gz", gzip.compress(lines({"txt": "a"})), ["a"], "prompts from `txt`"),
    ("lines in .json", "p.json", lines({"prompt": "a"}), ["a"], "JSON lines"),
    ("compressed CSV", "p.csv.gz", gzip.compress(b"prompt,category\na,3\n"), ["a"], "CSV, prompts from `prompt`"),
    ("compressed TSV", "p.tsv.gz", gzip.compress(b"Prompt\tx\na\t3\n"), ["a"], "TSV, prompts from `Prompt`"),
    ("a compressed array", "p.json.gz", gzip.compress(b'["a"]'), ["a"], "JSON array"),
    ("Parquet", "p.parquet", table(prompt=["a", "b"], category=[1, None]), ["a", "b"], "Parquet, prompts from `prompt`"),
    ("UTF-32", "p.txt", "a\ncïrcle\n".encode("utf-32"), ["a", "cïrcle"], ""),
    ("lines as .ndjson", "p.ndjson", lines({"prompt": "a"}), ["a"], "JSON lines"),
    ("a first line that is a name", "p.txt", b"Prompt\na\n", ["a"], "line 1 is the name of a column"),
    ("compressed, but not", "p.txt.gz", b"a\nb\n", Refused("cannot be read"), ""),
    ("UTF-16", "p.txt", "a\ncïrcle\n".encode("utf-16"), ["a", "cïrcle"], ""),
    ("UTF-16 without a mark", "p.txt", "a\n".encode("utf-16-le"), Refused("or UTF-16 without a byte order mark"), ""),
    ("old line ends", "p.txt", b"a\rb\r", ["a", "b"], ""),
    ("control characters", "p.txt", b"a\x1b[1mb\x07\n", ["a [1mb"], ""),
    ("a list of prompts", "p.jsonl", lines({"prompt": ["a", "b"]}), ["a"], "a list of prompts; the first is read"),
    ("a long key", "p.jsonl", lines({"x" * 10**6: "a"}), Refused("without a prompt"), ""),
    ("a long line", "p.txt", b"a" * (1 << 21), Refused("longer than 1 MiB"), ""),
    ("an archive", "p.zip", b"PK", Refused("unknown extension '.zip'; give .txt"), ""),
]  # fmt: skip


def prompts_of(file: Path, **settings) -> tuple[list[dict], str]:
    reader = PromptReader(str(file), **settings)
    rows = pa.Table.from_batches(reader.batches()).to_pylist()
    return rows, "\n".join(reader.found)


@pytest.mark.parametrize(("name", "content", "prompts", "told"), [c[1:] for c in PROMPTS], ids=[c[0] for c in PROMPTS])
def test_prompts(tmp_path, dry_run, name, content, prompts, told):
    write(tmp_path, {name: content, "held-out.txt": b"a held-out prompt\n"})
    files = ["--prompts.file", str(tmp_path / name), "--evaluation.file", str(tmp_path / "held-out.txt")]
    answer = dry_run("pipeline", "--model.path", "shapes", *files)
    if isinstance(prompts, Refused):
        check_refused(answer, prompts)
        assert "skip" not in answer[1] or b'"a"' in content  # skipping would leave nothing
        return
    assert answer[0] == 0
    assert told in answer[1]
    rows, _ = prompts_of(tmp_path / name)
    assert [row["prompt"] for row in rows] == prompts


def test_categories_may_be_numbers_and_a_column_may_be_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(lines({"alt": "a", "prompt": "b", "category": 3, "split": None}))
    ((row,), found) = prompts_of(tmp_path / "p.jsonl", column="alt")
    assert (row["prompt"], row["category"], row["split"]) == ("a", "3", None)
    assert "prompts from `alt`" in found


# ------------------------------------------------------------------------------------------ models
def config(part: str, **values):
    """Changes values of a part's configuration; None removes them."""

    def change(folder: Path):
        name = {"tokenizer": "tokenizer_config", "scheduler": "scheduler_config", "": "model_index"}.get(part, "config")
        file = folder / part / f"{name}.json"
        changed = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return change


def weights(part: str, change):
    """Writes the weights of a part again, with other names; None leaves one out."""

    def write_again(folder: Path):
        file = next((folder / part).glob("*.safetensors"))
        save_file({change(key): value for key, value in load_file(file).items() if change(key)}, file, {"format": "pt"})

    return write_again


def content(name: str, data: bytes | None):
    """Replaces or removes a file."""
    return lambda folder: (folder / name).unlink() if data is None else (folder / name).write_bytes(data)


def halves_only(folder: Path):
    for file in folder.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_suffix(".fp16.safetensors"))


UNET = "unet/diffusion_pytorch_model.safetensors"
MODELS = [  # (name, change of a model folder, a part of the message; None: it is accepted)
    ("as diffusers writes it", lambda folder: None, None),
    ("only fp16 files", halves_only, None),
    ("weights with an adapter", weights("text_encoder", lambda key: key.replace("q_proj", "q_proj.base_layer")),
     "it was saved with an adapter attached"),
    ("names that the network does not have", weights("unet", lambda key: key.replace("to_q", "query_of")), "in its unet"),
    ("a weight that is missing", weights("vae", lambda key: None if key == "quant_conv.bias" else key),
     "lacks 1 weights (quant_conv.bias) in its vae"),
    ("weights of another shape", config("unet", cross_attention_dim=32), "they are parts of different models"),
    ("more layers than weights", config("unet", layers_per_block=2), "in its unet; fetch the part again"),
    ("no sample_size", config("unet", sample_size=None), "sample_size"),
    ("a file that is cut", content(UNET, b"x" * 100), f"has a {UNET} that cannot be read"),
    ("a file of git lfs", content(UNET, b"version https://git-lfs.github.com/spec/v1\n"), "whole (git lfs pull?)"),
    ("no weights", content(UNET, None), f"lacks {UNET}; complete the folder"),
    ("another variant only", lambda folder: (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.ema.safetensors"),
     "write it without the variant"),
    ("no index", content("model_index.json", None), "has no model_index.json"),
    ("an index that is not JSON", content("model_index.json", b"{"), "model_index.json that is not JSON"),
    ("another pipeline", config("", _class_name="KandinskyPipeline"), "is a KandinskyPipeline, which is not supported"),
    ("no vocabulary", content("tokenizer/tokenizer.json", None), "lacks its tokenizer's vocabulary"),
    ("an unknown prediction", config("scheduler", prediction_type="flow"), "scheduler_config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_models(tmp_path, dry_run, tiny_pipeline, change, told):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    change(folder)
    write(tmp_path, {"in/0.png": PNG, "in/0.txt": b"a circle"})
    answer = dry_run("score", "--input", str(tmp_path / "in"), "--model", str(folder))
    if told is None:
        assert answer[0] == 0
        return
    check_refused(answer, told)
    assert "error: model: " in answer[1]


# ------------------------------------------------------------------------------------------ in a process of its own
SHAPES = ("--config", "jobs/configs/shapes-smoke.yaml")
COMMANDS = [  # (name, job, arguments, exit code, a part of what is printed)
    ("pairs that are read", "score", ["--input", "{0}/in", "--run-dir", "{0}/run", "--dry-run"], 0, "input: images with a"),
    ("an input that is missing", "score", ["--input", "{0}/none", "--run-dir", "{0}/run"], 2, "none' does not exist"),
    ("a model that is missing", "score", ["--image", "{0}/in/0.png", "--prompt", "a", "--model", "{0}/none"], 2, "is no model"),
    ("an image that is none", "score", ["--image", "{0}/p.txt", "--prompt", "a"], 2, "error: image: "),
    ("prompts that are none", "pipeline", [*SHAPES, "--prompts.file", "{0}/in/0.png", "--run-dir", "{0}/run"], 2,
     "unknown extension '.png'"),
    ("a store that does not answer", "score", ["--image", "s3://b/0.png?endpoint_override=127.0.0.1:9", "--prompt", "a"],
     2, "https://127.0.0.1:9 does not answer"),
    ("a flag that is none", "pipeline", [*SHAPES, "--prompt.file", "{0}/p.txt"], 2, "did you mean 'prompts.file'"),
]  # fmt: skip
IN_SHORT = ("pairs that are read", "a flag that is none")  # the others have a row above, without a process of their own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "given", "code", "told"),
    [pytest.param(*c[1:], id=c[0], marks=() if c[0] in IN_SHORT else pytest.mark.long) for c in COMMANDS],
)
def test_commands(tmp_path, job, given, code, told):
    write(tmp_path, {"in/0.png": PNG, "in/0.txt": b"a circle", "p.txt": b"a circle\n"})
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, f"jobs/{job}.py", *(argument.format(tmp_path) for argument in given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == code
    assert told in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------ more about pairs
def test_a_pair_names_the_images_own_file(tmp_path):
    write(tmp_path, {**ONE, "a.tar": ONE, "m/metadata.csv": b"file_name,text\n../0.png,b\n"})
    (tmp_path / "a.jsonl").write_bytes(lines(row(image=str(tmp_path / "0.png")), row(image=BASE64)))
    plans = [plan_pairs(str(tmp_path / name), 9, "key", Columns()) for name in ("a.tar", "m", "a.jsonl")]
    files = [pair.file for plan in plans for shard in plan for pair in read_pairs(shard, Columns())]
    assert files == [f"{tmp_path}/a.tar#0.png", f"{tmp_path}/m/../0.png", f"{tmp_path}/0.png", None]


def test_named_columns_are_read_where_the_usual_ones_are_ambiguous(tmp_path):
    write(tmp_path, {"d.tar": {"0.input.png": PNG, "0.mask.png": OTHER, "0.out.txt": b"a"}})
    columns = Columns("input.png", "out.txt")
    (pair,) = (p for shard in plan_pairs(str(tmp_path / "d.tar"), 9, "k", columns) for p in read_pairs(shard, columns))
    assert (pair.image, pair.prompt, pair.error) == (PNG, "a", None)


def test_named_columns_of_a_table(tmp_path):
    write(tmp_path, {"0.png": PNG, "a.csv": b"image,caption,photo,alt\nx.png,no,0.png,a circle\n"})
    columns = Columns("Photo", "alt")
    (pair,) = (p for shard in plan_pairs(str(tmp_path / "a.csv"), 9, "k", columns) for p in read_pairs(shard, columns))
    assert (pair.image, pair.prompt, pair.error) == (PNG, "a circle", None)


def test_an_image_may_be_a_uri(tmp_path, gcs_server):
    folder = f"gs://runs/{tmp_path.name}"
    query = f"?endpoint_override={gcs_server}&scheme=http"
    storage.write_bytes(f"{folder}/0.png{query}", PNG)
    write(tmp_path, {"a.jsonl": lines(row(image=f"{folder}/0.png{query}"))})
    (pair,) = (
        p for shard in plan_pairs(str(tmp_path / "a.jsonl"), 9, "k", Columns()) for p in read_pairs(shard, Columns())
    )
    assert (pair.image, pair.file, pair.error) == (PNG, f"{folder}/0.png{query}", None)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "jsonl.gz", "json"])
def test_every_row_is_read_once_whatever_the_shards_are(tmp_path, suffix):
    captions = [f"caption {i}\nof two lines" if i % 3 else f"caption {i}" for i in range(11)]
    if suffix == "csv":
        content = written(["image", "caption"], [], *(["0.png", caption] for caption in captions), [])
    elif suffix == "json":
        content = json.dumps([row(caption) for caption in captions]).encode()
    else:
        content = b"\n\n".join(lines(row(caption)) for caption in captions)
    content = b"\xef\xbb\xbf" + content
    write(tmp_path, {"0.png": PNG, f"a.{suffix}": gzip.compress(content) if suffix.endswith("gz") else content})
    for per_shard in (1, 2, 4, 100):
        plan = plan_pairs(str(tmp_path / f"a.{suffix}"), per_shard, "key", Columns())
        pairs = [pair for shard in plan for pair in read_pairs(shard, Columns())]
        assert [pair.prompt for pair in pairs] == [caption.replace("\n", " ") for caption in captions]
        assert len({pair.key for pair in pairs}) == len(captions)
        assert len(plan) == -(-len(captions) // per_shard)


def test_only_parts_of_a_file_that_cannot_be_read_now_outlive_their_pairs(tmp_path):
    write(tmp_path, {"a.parquet": table(image=[PNG], text=["a"]), "b.parquet": table(image=[PNG], text=["b"])})
    before = [shard.name for shard in plan_pairs(str(tmp_path), 1, "key", Columns())]
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.parquet").write_bytes(table(image=[PNG], text=["other"]))
    plan = plan_pairs(str(tmp_path), 1, "key", Columns())
    assert plan.stale([*before, *(shard.name for shard in plan)]) == {before[1]}
