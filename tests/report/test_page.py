import base64
import io
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from run_folder import CANDIDATES, HOSTILE, METRICS, SCORES, SEEDS, config_of, png

from mi_ray.alignment.metric import Column
from mi_ray.report.columns import mark
from mi_ray.report.page import _strips, _tile, alignment_table, headline, previews, write_report
from mi_ray.report.summary import summarise
from mi_ray.storage import read_tables, write_json, write_table
from mi_ray.storage.tables import candidates_schema


class Page(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(run_dir, config):
    uri = write_report(str(run_dir), config)
    return uri, Path(uri).read_text()


@pytest.fixture(scope="module")
def page(written):
    return Page(written[1])


def test_both_files_are_written(written, run_dir, config):
    assert written[0] == f"{run_dir}/report/index.html"
    content = (run_dir / "report" / "report.json").read_text()
    assert json.loads(content) == summarise(str(run_dir), config)


def test_page_is_self_contained(page, written):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import", written[1])


def test_text_is_escaped(page, written):
    assert "<script" not in written[1]
    assert HOSTILE in page.text  # as text
    assert "no <scene> drawn" in page.text


def test_page_has_every_section(page):
    headings = "".join(page.text.split("\n"))
    for heading in ("Alignment", "Base and tuned on the same seeds", "Candidates by score", "Quality of the scores"):
        assert heading in headings
    for heading in ("Fine-tuning", "Image quality", "Errors and skipped prompts", "Full configuration"):
        assert heading in headings
    plots = [attrs for tag, attrs in page.tags if tag == "img" and attrs.get("class", "").startswith("plot")]
    assert len(plots) == 4
    kept = [attrs for tag, attrs in page.tags if tag == "div" and "kept" in attrs.get("class", "")]
    assert len(kept) == 4  # one in each previewed pool


def test_side_by_side_shows_the_same_seeds(page):
    for model in ("base", "tuned"):
        images = [a for tag, a in page.tags if tag == "img" and a["alt"].startswith(f"{model} model")]
        assert len(images) == 12 * SEEDS


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.02, 0.08, "better by exact"), (-0.02, 0.08, "no clear difference"), (-0.08, -0.02, "worse by exact")],
)
def test_headline_depends_on_the_interval(low, high, text):
    mean = (low + high) / 2
    report = {
        "metrics": {name: [asdict(column) for column in columns] for name, columns in METRICS.items()},
        "alignment": {
            "base": {"exact": {"value": 0.482, "low": 0.4, "high": 0.5}},
            "tuned": {"exact": {"value": 0.482 + mean, "low": 0.4, "high": 0.6}},
        },
        "comparison": {"tuned-base": {"exact": {"difference": mean, "low": low, "high": high}}},
    }
    title, verdict = headline(report | {"quality": {}})
    assert text in verdict
    assert "collapsed" in headline(report | {"quality": {"tuned": {"collapsed": True}}})[1]
    assert title.startswith(f"exact: 48.2 % → {48.2 + 100 * mean:.1f} % (")
    assert f"± {50 * (high - low):.1f} points" in title


def test_alignment_table(run_dir, config):
    report = summarise(str(run_dir), config)
    table = alignment_table(report)
    exact = next(line for line in table.splitlines() if line.startswith("exact, %"))
    numbers = re.findall(r"[+−\d.]+(?= ±)", exact)
    assert numbers[:2] == [f"{100 * report['alignment'][m]['exact']['value']:.1f}" for m in ("base", "tuned")]
    difference = report["comparison"]["tuned-base"]["exact"]["difference"]
    assert numbers[-1] == f"{100 * difference:+.1f}".replace("-", "−")
    assert "exact, %, out of distribution" in table
    assert "tuned − random" in table


def test_report_of_a_run_without_results(tmp_path):
    config = config_of(tmp_path)
    page = Page(Path(write_report(str(tmp_path), config)).read_text())
    assert "Not evaluated yet" in page.text
    assert alignment_table(summarise(str(tmp_path), config)) == "no evaluation yet"


def test_page_shows_benchmarks_with_escaped_text(tmp_path):
    result = {
        "question": HOSTILE,
        "results": [{"fault": "driver", "runs": 20, "lost": 0}, {"fault": "<i>", "runs": 10, "lost": None}],
        "gates": {
            "lost": {"value": 3, "max": 0, "holds": False},
            "happened": {"value": 0.95, "min": 0.8, "holds": True},
        },
    }
    write_json(str(tmp_path / "benchmarks" / "faults.json"), result)
    write_json(str(tmp_path / "benchmarks" / "other.json"), {"something": "else"})
    uri = write_report(str(tmp_path), config_of(tmp_path))
    page = Page(Path(uri).read_text())
    assert json.loads((tmp_path / "report" / "report.json").read_text())["benchmarks"] == {"faults": result}
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "i" not in {tag for tag, _ in page.tags}
    cells = [line.strip() for line in page.text.split("\n")]
    assert {"faultrunslost", "driver200<i>10–"} <= set(cells)
    assert "lost 3 (at most 0), which fails; happened 0.950 (at least 0.800)" in cells


def test_headline_of_a_metric_where_lower_is_better():
    dark = Column("dark_pixels", "number of dark pixels", "pixels", 0, 4096, higher_is_better=False)
    base, tuned = ({"dark_pixels": {"value": v, "low": v - 9, "high": v + 9}} for v in (1200.0, 1100.0))
    difference = {"dark_pixels": {"difference": -100.0, "low": -120.0, "high": -80.0}}
    report = {"metrics": {"m:Dark": [asdict(dark)]}, "alignment": {"base": base, "tuned": tuned}, "quality": {}}
    title, verdict = headline(report | {"comparison": {"tuned-base": difference}})
    assert title == "dark pixels: 1200.0 → 1100.0 (−100.0 ± 20.0 pixels)"
    assert "is better by dark pixels" in verdict
    assert mark(1200.0, dark) == {"kind": "number", "text": "1200.0", "title": "dark pixels, pixels: 1200.0"}
    assert mark(None, dark) is None


def test_report_of_a_run_without_metrics_and_previews(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    for folder in ("round-0/candidates", "evaluation/base", "evaluation/tuned"):
        table = read_tables(str(run_dir / folder))
        table = table.drop_columns([column.name for column in METRICS["oracle"]])
        for name in ("category", "split", "features"):
            if name in table.column_names:
                index = table.column_names.index(name)
                field = table.schema.field(name)
                table = table.set_column(index, field, pa.nulls(len(table), field.type))
        write_table(str(tmp_path / "run" / folder / "part-00000-0.parquet"), table)
    shutil.rmtree(tmp_path / "run" / "evaluation" / "random")
    config = config_of(tmp_path / "run")
    page = Page(Path(write_report(str(tmp_path / "run"), config)).read_text())
    assert "PMI: " in page.text
    assert not [a for _, a in page.tags if "corner" in a.get("class", "")]
    assert "exact" not in alignment_table(summarise(str(tmp_path / "run"), config))


def test_previews_leave_out_pruned_candidates_and_read_only_the_first_parts(run_dir, tmp_path):
    folder = tmp_path / "run" / "round-0" / "candidates"
    table = read_tables(str(run_dir / "round-0/candidates")).to_pandas()
    pruned = (table["prompt_id"] == table["prompt_id"][0]) & (table["rank"] >= 4)
    table["pruned_after"] = np.where(pruned, 2, None)
    table["image"] = table["image"].where(~pruned, None)
    schema = candidates_schema(SCORES, METRICS)
    for index, rows in enumerate((table, table[:0])):
        part = pa.Table.from_pandas(rows, schema, preserve_index=False)
        write_table(str(folder / f"part-0000{index}-0.parquet"), part)
    (folder / "part-00002-0.parquet").write_bytes(b"not a table: this part must not be read")
    config = config_of(tmp_path / "run")
    assert config.generate.preview_prompts <= 2 * config.generate.prompts_per_shard
    assert [card["n_candidates"] for card in previews(str(tmp_path / "run"), config)] == [4, *[CANDIDATES] * 3]


def test_strips_show_a_score_of_zero_but_no_candidate_without_a_score():
    scores = [0.0, None, -1.0, float("nan"), 2.0, 1.0]
    image = png(np.zeros((8, 8, 3), np.uint8))
    pool = [{"prompt": "a", "s": score, "kept": score == 2, "image": image} for score in scores]
    tiles = _strips(pool, "s")["tiles"]
    assert [tile["score"] for tile in tiles["highest"]] == [2, 1]
    assert [tile["score"] for tile in tiles["lowest"]] == [0, -1]
    assert [tile["kept"] for tile in tiles["highest"]] == [True, False]


def test_large_images_become_thumbnails():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    tile = _tile({"image": png(noise), "exact": None}, METRICS["oracle"][0])
    assert tile["mark"] is None
    assert not tile["crisp"]
    assert len(tile["source"]) < 200_000
    small = _tile({"image": png(noise[:64, :64]), "exact": 1.0}, METRICS["oracle"][0])
    assert small["crisp"]
    assert small["mark"] == {"kind": "yes", "text": "✓", "title": "exact"}
    thumbnail = Image.open(io.BytesIO(base64.b64decode(tile["source"].partition(",")[2])))
    assert thumbnail.size == (256, 256)
