"""Scoring of existing pairs: scores, error rows, resume, audit page, single pair."""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_inputs import CAPTIONS, IMAGES, encoded, image_of, write_parquet
from PIL import Image

from mi_ray import storage
from mi_ray.config import ScoreConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.information import pointwise
from mi_ray.inputs.images import read_image
from mi_ray.inputs.pair_config import ScorePairsConfig
from mi_ray.inputs.pairs import Columns, plan_pairs
from mi_ray.language import text
from mi_ray.language.negatives import chosen
from mi_ray.language.shapes import negatives
from mi_ray.report.audit import write_audit
from mi_ray.runs.status import run_status
from mi_ray.scoring.branches import hard_negatives
from mi_ray.scoring.pair_scorer import PairScorer
from mi_ray.scoring.scorer import Scorer, draw_probes_of
from mi_ray.scoring.work import Work
from mi_ray.stages import score as stage
from mi_ray.stages import shards
from mi_ray.stages.score import PairActor, ahead, score_one
from mi_ray.storage import tables

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert("x")</script> & a dog'


# ---------------------------------------------------------------------------------------------- images
def test_images_of_another_size_are_refused_or_cropped():
    image = image_of("a circle")
    wide = Image.fromarray(image).resize((128, 64))
    grey, clear = Image.fromarray(image).convert("L"), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert (read_image(encoded(image), (64, 64), "exact") == image).all()
    for other, reported in ((wide, "128x64 pixels, not 64x64"), (grey, "mode is L")):
        with pytest.raises(ValueError, match=reported):
            read_image(encoded(other), (64, 64), "exact")
        assert read_image(encoded(other), (64, 64), "crop").shape == (64, 64, 3)
    assert (read_image(encoded(clear), (64, 64), "crop") == 255).all()
    for content in (b"", b"no image", encoded(image)[:200]):
        with pytest.raises(ValueError, match="corrupt"):
            read_image(content, (64, 64), "exact")


def test_damaged_exif_tags_leave_the_orientation():
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # orientation
    tags += struct.pack("<HHI", 0x011A, 2, 4) + b"72\0\0"  # a resolution that is text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    buffer = io.BytesIO()
    image = image_of("a red circle left of a blue square")
    Image.fromarray(image).save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
    read = read_image(buffer.getvalue(), (64, 64), "exact")
    assert np.abs(read.astype(int) - np.rot90(image, -1)).mean() < 3


# ---------------------------------------------------------------------------------------------- scores
@pytest.fixture(scope="module")
def tiny(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline))


def config_of(tiny_pipeline, source, run_dir, **fields) -> ScorePairsConfig:
    score = {"names": ["pmi", "pmi_negatives"], "num_samples": 3, "max_negatives": 4}
    fields = {"shown": 2, "pairs_per_shard": 3, "words": True, "score": score, "resources": {"batch_size": 2}} | fields
    return ScorePairsConfig.model_validate(
        {"input": str(source), "run_dir": str(run_dir), "model": str(tiny_pipeline), **fields}
    )


def test_scores_equal_those_of_the_estimators(tiny):
    config = ScorePairsConfig(image="-", prompt="-").score.model_copy(update={"num_samples": 4, "max_negatives": 3})
    images = np.stack([image_of(caption) for caption in CAPTIONS])
    rows = PairScorer(tiny, config, 8, seed=5, words=True)(images, CAPTIONS, Work())
    for image, prompt, row in zip(images, CAPTIONS, rows, strict=True):
        others = negatives(prompt)
        texts = [prompt, "", *(other.prompt for other in others), " ".join(prompt.split()[:-1])]
        probes = draw_probes_of([prompt], config, 5, tiny)
        branches = tiny.encode_prompts(texts), torch.arange(len(texts))[None]
        latents = tiny.encode_images(image[None])
        errors = pointwise.denoising_errors(
            tiny.predict_epsilon, tiny.schedule, latents, torch.zeros(1, dtype=torch.long), *branches, probes, 64
        )[0]
        density = dict(zip(texts, pointwise.log_density(errors, probes).tolist(), strict=True))
        assert row["score_pmi"] == pytest.approx(density[prompt] - density[""], abs=2e-3)
        assert row["words"][-1]["word"] == prompt.split()[-1]
        assert row["words"][-1]["value"] == pytest.approx(density[prompt] - density[texts[-1]], abs=2e-3)
        assert row["posterior"] == pytest.approx(1 / (1 + np.exp(-row["score_pmi_negatives"])), abs=1e-4)
        best = max(chosen(others, 3), key=lambda other: density[other.prompt])
        lead, error = pointwise.pmi(errors[texts.index(best.prompt)], errors[0], probes)
        likeliest = max(density[best.prompt], density[""])
        assert row["score_margin"] == pytest.approx(density[prompt] - likeliest, abs=2e-3)
        reported = (best.original, best.instead, best.attribute) if lead > 2 * error else (None, None, None)
        assert tuple(row[name] for name in ("contradicted", "instead", "contradicted_attribute")) == reported


def test_margin_without_negatives_compares_with_the_empty_prompt(tiny):
    config = ScorePairsConfig(image="-", prompt="-").score.model_copy(update={"num_samples": 3})
    scorer = PairScorer(tiny, config, 4, seed=0, words=False)
    scorer.negatives = lambda prompt: []
    (row,) = scorer(image_of(CAPTIONS[0])[None], CAPTIONS[:1], Work())
    assert row["score_pmi_negatives"] is None
    assert row["score_margin"] == pytest.approx(row["score_pmi"], abs=1e-4)


def test_shortlist_keeps_the_likeliest_negatives(tiny):
    score = ScorePairsConfig(image="-", prompt="-").score
    some = score.model_copy(update={"num_samples": 5, "max_negatives": 6, "shortlist": 2, "shortlist_samples": 2})
    work, images = Work(), np.stack([image_of(caption) for caption in CAPTIONS])
    rows = PairScorer(tiny, some, 8, seed=5, words=False)(images, CAPTIONS, work)
    whole = PairScorer(tiny, some.model_copy(update={"shortlist": None}), 8, 5, words=False)(images, CAPTIONS, Work())
    count = [min(6, len(negatives(prompt))) for prompt in CAPTIONS]
    assert work.score_evaluations == sum(2 * (2 + n) + 3 * (2 + min(2, n)) for n in count)
    for few, all_ in zip(rows, whole, strict=True):
        assert few["score_pmi"] == pytest.approx(all_["score_pmi"], abs=1e-3)
        assert few["score_pmi_negatives"] >= all_["score_pmi_negatives"] - 1e-3  # fewer negatives
        if few["score_margin"] == pytest.approx(all_["score_margin"], abs=1e-3):
            assert few["contradicted"] == all_["contradicted"]


def test_pair_does_not_depend_on_other_pairs(tiny):
    config = ScorePairsConfig(image="-", prompt="-").score.model_copy(update={"num_samples": 3})
    images, scorer = np.stack([image_of(c) for c in CAPTIONS]), PairScorer(tiny, config, 4, seed=0, words=False)
    together, alone = scorer(images, CAPTIONS, Work()), scorer(images[3:4], CAPTIONS[3:4], Work())[0]
    for name in ("score_pmi", "score_pmi_negatives", "posterior"):
        assert together[3][name] == pytest.approx(alone[name], abs=1e-3)


def test_candidates_are_scored_without_the_unconditional_branch(tiny):
    config = ScoreConfig(names=("pmi_negatives",), num_samples=3, max_negatives=4)
    images, work = np.stack([image_of(caption) for caption in CAPTIONS]), Work()
    latents, nothing = tiny.encode_images(images), torch.empty(len(CAPTIONS), 0)
    sampled = Trajectory(latents, torch.empty(0), nothing, nothing)
    prompts = [*CAPTIONS[:4], "a dog"]  # the last one has no negatives and is compared with the empty prompt
    index = torch.tensor([0, 1, 2, 3, 4])
    values = Scorer(tiny, config, 8, 7, [])(prompts, tiny.encode_prompts(prompts), index, sampled, work)
    pairs = PairScorer(tiny, config, 8, 7, words=False)(images[:5], prompts, Work())
    expected = [*(row["score_pmi_negatives"] for row in pairs[:4]), pairs[4]["score_pmi"]]
    assert values["score_pmi_negatives"] == pytest.approx(expected, abs=1e-3)
    assert work.score_evaluations == 3 * (5 + 4 * 4 + 1)


def bad_pairs(folder: Path) -> Path:
    rows = [
        *zip(IMAGES, CAPTIONS, strict=True),
        (IMAGES[0], ""),
        (IMAGES[0], None),
        (IMAGES[0][:200], "a red circle"),
        (encoded(Image.new("RGB", (32, 64))), "a red circle"),
        (encoded(Image.new("L", (64, 64))), "a red circle"),
        (None, "a red circle"),
        (IMAGES[0], "red " * 40),
        (IMAGES[0], "a dog"),
    ]
    images, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / "bad.parquet", row_group_size=4)
    return folder / "bad.parquet"


@pytest.fixture(scope="module")
def scored(tiny_pipeline, tmp_path_factory):
    """The audit of pairs that an actor scored, called directly without Ray."""
    folder = tmp_path_factory.mktemp("scored")
    config = config_of(tiny_pipeline, bad_pairs(folder), folder / "run")
    actor = PairActor(config.model_dump(mode="json"))
    shards = plan_pairs(config.input, config.pairs_per_shard, config.hash(), config.columns)
    for shard in shards:
        batch = {"index": [shard.index], "name": [shard.name], "source": [shard.source]}
        receipt = actor({name: np.array(value) for name, value in batch.items()})
        assert receipt["rows"][0] > 0
    names = [shard.name for shard in shards]
    parts = storage.join(config.run_dir, "scores")
    uri, summary = write_audit(config.run_dir, parts, names, config.results_config())
    table = pa.concat_tables([storage.read_table(storage.join(parts, name)) for name in names])
    return table.to_pandas(), summary, Path(uri).read_text(), actor


def test_bad_pairs_are_error_rows(scored):
    rows, summary, _, _ = scored
    assert len(rows) == len(CAPTIONS) + 8
    assert rows["error"].isna().tolist() == [True] * len(CAPTIONS) + [False] * 7 + [True]
    expected = ["empty", "no caption", "corrupt", "32x64", "mode is L", "no image", "42 tokens"]
    for error, reported in zip(rows["error"][len(CAPTIONS) :], expected, strict=False):
        assert reported in error
    assert rows[rows["error"].isna()]["score_pmi"].notna().all()
    assert rows[rows["error"].notna()]["score_pmi"].isna().all()
    assert (summary["scored"], summary["errors"], summary["unjudged"]) == (6, 7, 1)


def test_only_best_and_worst_pairs_keep_their_image(scored):
    rows, _, _, actor = scored
    assert rows["image"].notna().sum() <= 2 * actor.config.shown * 4
    kept = rows[rows["image"].notna()].iloc[0]
    shown = np.array(Image.open(io.BytesIO(kept["image"]["bytes"])))
    assert shown.shape == (64, 64, 3)
    assert rows["words"][0][0]["word"] == "red"


def test_audit_page_is_self_contained(scored):
    _, summary, page, _ = scored
    assert "<script>" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+", page)
    assert f"{summary['contradicted']} of 5 captions look wrong" in page
    assert page.count("data:image/png;base64,") == 4
    assert "the caption is empty" in page
    assert "photographs much worse" in page


def test_hostile_caption_is_escaped(tiny_pipeline, tmp_path):
    row = dict.fromkeys(tables.SCORED.names) | {"key": "<b>key</b>", "prompt": HOSTILE, "score_pmi": 1.0, "words": []}
    row |= {"contradicted": "<i>red</i>", "instead": "<u>blue</u>", "instead_posterior": 0.9, "posterior": 0.1}
    row |= {"score_pmi_negatives": -2.0, "score_margin": -1.5, "contradicted_attribute": "<em>"}
    bad = dict.fromkeys(tables.SCORED.names) | {"key": "k", "error": "<img src=x>"}
    storage.write_table(str(tmp_path / "scores" / "a.parquet"), pa.Table.from_pylist([row, bad], tables.SCORED))
    config = config_of(tiny_pipeline, "-", tmp_path).results_config()
    uri, _ = write_audit(str(tmp_path), str(tmp_path / "scores"), ["a.parquet"], config)
    page = Path(uri).read_text()
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; a dog" in page
    for tag in ("<script", "<b>key", "<i>red", "<u>blue", "<em>", "<img src=x"):
        assert tag not in page


def test_failing_pair_does_not_affect_other_pairs(tiny_pipeline, tmp_path, monkeypatch):
    actor = PairActor(config_of(tiny_pipeline, write_parquet(tmp_path), tmp_path).model_dump(mode="json"))
    whole = actor.scorer.__call__

    def failing(images, prompts, work):
        if "two hearts" in prompts:
            raise RuntimeError("no hearts")
        return whole(images, prompts, work)

    monkeypatch.setattr(actor, "scorer", failing)
    (shard, *_) = plan_pairs(str(tmp_path / "pairs.parquet"), 5, "key", Columns())
    errors = [row["error"] for row in actor.rows(shard, Work())]
    assert errors == [None, "RuntimeError: no hearts", None, None, None]


def test_pairs_use_smaller_batches_if_memory_runs_out(tiny_pipeline, tmp_path):
    actor = PairActor(config_of(tiny_pipeline, write_parquet(tmp_path), tmp_path).model_dump(mode="json"))
    (shard, *_) = plan_pairs(str(tmp_path / "pairs.parquet"), 5, "key", Columns())
    whole = [row["score_pmi"] for row in actor.rows(shard, Work())]

    def limited(unet, arguments):
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    assert 2 * actor.scorer.batch_size > 2
    actor.denoiser.network.register_forward_pre_hook(limited)
    rows = actor.rows(shard, work := Work())
    assert [row["error"] for row in rows] == [None] * 5
    assert [row["score_pmi"] for row in rows] == pytest.approx(whole, rel=1e-3, abs=1e-3)
    assert work.batch_halvings >= 1


def test_tokens_from_two_threads(tiny):
    counts, shapes = [], []

    def count():
        counts.extend(len(tiny.token_ids("a red circle " * 20)) for _ in range(3000))

    thread = threading.Thread(target=count)
    thread.start()
    while thread.is_alive():
        shapes.append(tiny.encode_prompts(["a red circle", "two hearts"])["embeds"].shape[1])
    thread.join()
    assert set(counts) == {62}
    assert set(shapes) <= {tiny.max_tokens}


def test_truncated_caption_has_no_negatives_in_the_truncated_part(tiny):
    caption = "a big cat and " * 10 + "a red circle left of a blue square"
    assert len(tiny.token_ids(caption)) > tiny.max_tokens
    cut = tiny.token_ids(caption)[: tiny.max_tokens - 1]
    whole = text.negatives(caption)
    kept = hard_negatives(tiny, text.negatives, caption, 1000)
    assert len(kept) < len(whole)
    assert all(tiny.token_ids(negative.prompt)[: tiny.max_tokens - 1] != cut for negative in kept)
    short = "a red circle left of a blue square"
    assert len(hard_negatives(tiny, text.negatives, short, 1000)) == len(text.negatives(short))


def test_ahead_keeps_order_and_errors():
    assert list(ahead(iter(range(5)))) == list(range(5))

    def broken():
        yield 1
        raise OSError("gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


# ---------------------------------------------------------------------------------------------- the commands
def test_single_pair_prints_its_scores_and_writes_its_map(tiny_pipeline, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    config = ScorePairsConfig(image=str(tmp_path / "x.png"), prompt=CAPTIONS[0], model=str(tiny_pipeline))
    row = score_one(config)
    reported = capsys.readouterr().out
    value, error = (f"{row[name]:.2f}".replace("-", "−") for name in ("score_pmi", "score_pmi_se"))
    assert f"{value} ± {error} nats" in reported
    assert Image.open(tmp_path / "x-map.png").size[0] > 500
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="the image is corrupt"):
        score_one(config)


def test_flag_keeps_the_other_defaults_of_its_section():
    config, _ = load_config(["--input", "a", "--run-dir", "b", "--score.num-samples", "6"], model=ScorePairsConfig)
    default = ScorePairsConfig(input="a", run_dir="b").score
    assert config.score == default.model_copy(update={"num_samples": 6})


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("--input", "a.parquet"), "run_dir is missing, and input needs it"),
        (("--image", "a.png"), "image or prompt is missing, and a single pair needs both"),
        ((), "set either input and run_dir"),
        (("--input", "a", "--run-dir", "b", "--prompt", "c"), "set either input and run_dir"),
        (("--input", "a", "--run-dir", "b", "--captoin-column", "c"), "did you mean 'caption_column'?"),
        (("--input", "a", "--run-dir", "b", "--score.negatives", "verbs"), "score.negatives: 'verbs' is not valid"),
    ],
)
def test_wrong_settings_are_reported(arguments, reported):
    with pytest.raises(ConfigError) as caught:
        load_config(list(arguments), model=ScorePairsConfig)
    assert reported in "\n".join(caught.value.faults)


def test_scores_of_removed_inputs_are_removed(tiny_pipeline, tmp_path, monkeypatch, capsys):
    def inline(actor, constructor, rows, resources, in_flight, at_once):
        scorer = actor(**constructor)
        for row in rows:
            done = scorer({name: np.array([value], object) for name, value in row.items()})
            yield {name: value for name, (value,) in done.items()}

    monkeypatch.setattr(shards, "stream", inline)
    monkeypatch.setattr(stage, "start_ray", lambda: None)
    monkeypatch.setattr(stage, "check_room", lambda *_, **__: None)
    source = write_parquet(tmp_path)
    config = config_of(tiny_pipeline, source, tmp_path).model_copy(update={"pairs_per_shard": 2})
    stage.score_pairs(config)
    pq.write_table(pq.read_table(source).slice(0, 3), source, row_group_size=2)
    stage.score_pairs(config)
    assert "removed 3 parts: their pairs are no longer in the input" in capsys.readouterr().out
    scores = Path(config.run_dir) / "scores"
    assert pd.read_parquet(scores)["prompt"].tolist() == CAPTIONS[:3]
    assert len(list((scores / "_commits").iterdir())) == len(list(scores.glob("part-*"))) == 2
    removed = [e for e in storage.read_lines(f"{config.run_dir}/events.jsonl") if e["event"] == "parts_removed"]
    assert [event["count"] for event in removed] == [3]

    folder = tmp_path / "input"
    folder.mkdir()
    for name in ("one", "two"):
        shutil.copy(source, folder / f"{name}.parquet")
    config = config.model_copy(update={"input": str(folder), "run_dir": str(tmp_path / "run")})
    stage.score_pairs(config)
    (folder / "two.parquet").write_bytes(b"cannot be read for now")
    stage.score_pairs(config)
    sound = pd.read_parquet(tmp_path / "run" / "scores").query("error.isna()")
    assert sound["prompt"].tolist().count(CAPTIONS[0]) == 2


def test_a_ray_that_does_not_start_leaves_the_folder_free(tiny_pipeline, tmp_path, monkeypatch):
    def refuse():
        raise ConfigError(["Ray cannot start"])

    monkeypatch.setattr(stage, "start_ray", refuse)
    config = config_of(tiny_pipeline, write_parquet(tmp_path), tmp_path / "run")
    for seed in (0, 1):  # another run may use the folder
        with pytest.raises(ConfigError, match="Ray cannot start"):
            stage.score_pairs(config.model_copy(update={"seed": seed}))
    assert not (tmp_path / "run" / "run.json").exists()


def job(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/score.py", *arguments]
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # a separate Ray instance
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.ray
@pytest.mark.slow
def test_run_continues_and_another_config_is_refused(tiny_pipeline, tmp_path):
    source, run_dir = write_parquet(tmp_path), tmp_path / "run"
    command = ["--input", str(source), "--run-dir", str(run_dir), "--model", str(tiny_pipeline)]
    command += ["--pairs-per-shard", "2", "--score.num-samples", "2", "--score.max-negatives", "2"]
    done = job(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 pairs scored, 0 with an error" in done.stdout
    parts = sorted((run_dir / "scores").glob("*.parquet"))
    before = pd.concat([pd.read_parquet(part) for part in parts])
    assert before["prompt"].tolist() == CAPTIONS
    reported = run_status(str(run_dir))
    assert [(stage["stage"], stage["done"], stage["left"]) for stage in reported["stages"]] == [
        ("score", 3, 0),
        ("audit", 1, 0),
    ]
    parts[1].unlink()
    (run_dir / "scores" / "_commits" / f"{parts[1].name}.json").unlink()
    kept = parts[0].stat().st_mtime_ns
    done = job(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    after = pd.concat([pd.read_parquet(part) for part in parts])
    pd.testing.assert_frame_equal(before.drop(columns="words"), after.drop(columns="words"))
    assert parts[0].stat().st_mtime_ns == kept
    events = [event["event"] for event in storage.read_lines(str(run_dir / "events.jsonl"))]
    assert [events.count(event) for event in ("run_started", "shard_written", "run_finished")] == [2, 4, 2]
    done = job(*command, "--seed", "1")
    assert done.returncode == 2
    assert "seed was 0 and is 1" in done.stderr
