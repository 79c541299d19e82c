"""Scoring of existing pairs: Ray Data sends them through a pool of actors to one file per shard, then an audit page."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib import metadata
from itertools import islice
from typing import TypeVar

import numpy as np
import pyarrow as pa

from mi_ray import __version__, storage
from mi_ray.config import ModelConfig, pinned
from mi_ray.config.section import ConfigError, collecting
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.fitting import fitting
from mi_ray.diffusion.folders import check_model, load_sizes, load_tokenizer, model_commit
from mi_ray.information.maps import upsampled
from mi_ray.inputs.images import load_image, read_image, thumbnail
from mi_ray.inputs.keep import check_keep, write_kept
from mi_ray.inputs.pair_config import ScorePairsConfig
from mi_ray.inputs.pairs import Pair, PairPlan, PairShard, plan_pairs, read_pairs
from mi_ray.language.sources import negatives_by
from mi_ray.report.attributions import attribution_png
from mi_ray.report.audit import verdict_lines, write_audit
from mi_ray.runs import folder as run_folder
from mi_ray.runs import lease
from mi_ray.runs.cost import score_evaluations
from mi_ray.runs.layout import SCORES, began_hash, pinned_at_start
from mi_ray.scoring.machine import Patience, take_cpus, take_share
from mi_ray.scoring.pair_scorer import PairScorer, finite
from mi_ray.scoring.sampler import batch_at_size
from mi_ray.scoring.suitability import check_pairs
from mi_ray.scoring.trial import size_text, try_fitting
from mi_ray.scoring.work import Work
from mi_ray.stages.cluster import check_room, start_ray
from mi_ray.stages.shards import Committer, whole_or_one_by_one, write_missing
from mi_ray.stages.trial import settle
from mi_ray.storage import tables

SINGLE_BATCH = 64  # batch size for a single pair: a trial run would take longer than the pair
PACKAGES = ("torch", "ray", "diffusers", "transformers", "pyarrow", "numpy")
COLUMNS = ("score_pmi", "score_pmi_negatives", "score_margin")
_END = object()
_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------- in the actor
class PairActor:
    """Ray Data actor: a row that names a shard of pairs -> one row, the receipt of the shard."""

    def __init__(self, config: dict, token: int | None = None):
        self.config = config = ScorePairsConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.denoiser = load_denoiser(config.model, config.dtype, size=config.size)
        self.batch_size = batch_at_size(self.denoiser, config.resources.batch_size)
        self.scorer = PairScorer(self.denoiser, config.score, self.batch_size, config.seed, config.words)
        self.commit = Committer(storage.join(config.run_dir, SCORES), config.run_dir, token)
        self.pairs = 0  # pairs read so far; these also count as progress, since many pairs may not be scored
        self.patience = Patience(config.resources.shard_timeout_s, lambda: self.denoiser.calls + self.pairs)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        shard = PairShard(int(batch["index"][0]), str(batch["name"][0]), str(batch["source"][0]))
        began, work = time.perf_counter(), Work()
        with self.patience():
            rows = self.rows(shard, work)
        table = pa.Table.from_pylist(rows, schema=tables.SCORED)
        facts, receipt = self.commit(shard.index, shard.name, table, work, time.perf_counter() - began)
        return {name: [receipt.get(name, value)] for name, value in facts.items()}

    def rows(self, shard: PairShard, work: Work) -> list[dict]:
        """The rows of a shard, in order. Only the best and the worst pairs so far keep their image in memory."""
        rows = []
        pairs = read_pairs(shard, self.config.columns)
        for chunk in ahead(self._admitted(pairs)):
            rows += self._scored(chunk, work)
            self._drop_images(rows)
        for row in rows:
            row["image"] = None if row["image"] is None else thumbnail(row["image"])
        return rows

    def _admitted(self, pairs: Iterator[Pair]) -> Iterator[list[dict]]:
        """Yield batches of rows, each row with the decoded image or with an error."""
        while chunk := list(islice(pairs, self.batch_size)):
            yield [self._row(pair) for pair in chunk]

    def _row(self, pair: Pair) -> dict:
        self.pairs += 1
        told = {name: getattr(pair, name) for name in ("key", "file", "prompt", "remark", "error")}
        row = dict.fromkeys(tables.SCORED.names) | told
        if row["error"] is None:
            try:
                self._check_caption(pair.prompt)
                row["image"] = read_image(pair.image, self.denoiser.image_size, self.config.fit)
            except ValueError as error:
                row["error"] = str(error)
        return row

    def _check_caption(self, prompt: str | None):
        if prompt is None or not prompt.strip():
            raise ValueError("the caption is empty" if prompt is not None else "there is no caption")
        if self.config.overlong == "error":
            count, most = len(self.denoiser.token_ids(prompt)), self.denoiser.max_tokens
            if count > most:
                raise ValueError(
                    f"the caption has {count} tokens, but the text encoder reads at most {most}; shorten it, or add"
                    " --overlong truncate"
                )

    def _scored(self, rows: list[dict], work: Work) -> list[dict]:
        sound = [row for row in rows if row["error"] is None]

        def score(positions: list[int]) -> list[dict]:
            return self._score([sound[i] for i in positions], work)

        _, failures = whole_or_one_by_one(score, len(sound), self.commit.proven)
        for position, message in failures:
            sound[position] |= {"error": message, "image": None}
        return rows

    def _score(self, rows: list[dict], work: Work) -> list[dict]:
        """Add the scores to the rows, in place; return the rows."""
        if not rows:
            return rows
        images, prompts = np.stack([row["image"] for row in rows]), [row["prompt"] for row in rows]
        scored = fitting(self.scorer, partial(self.scorer, images, prompts, work), work)
        for row, scores in zip(rows, scored, strict=True):
            row |= scores
            if any(finite(scores[name]) is None for name in COLUMNS if scores[name] is not None):
                blank = dict.fromkeys(scores)
                row |= blank | {"error": "the model's output is not finite", "image": None}
        return rows

    def _drop_images(self, rows: list[dict]):
        column = f"score_{self.config.rank_by}"
        order = sorted((row for row in rows if row[column] is not None), key=lambda row: row[column])
        shown = self.config.shown
        kept = {id(row) for row in order[:shown] + order[-shown:]}
        for row in rows:
            if id(row) not in kept:
                row["image"] = None


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield the items. A thread prepares the next item while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, items, _END)
        while (item := waiting.result()) is not _END:
            waiting = pool.submit(next, items, _END)
            yield item


# ---------------------------------------------------------------------------------------------- the job
def _checked(config: ScorePairsConfig) -> tuple[ScorePairsConfig, str | None]:
    """Check the model and the source of the negatives.

    Returns:
        The config, with a hub's model pinned to its commit, and that.

    Raises:
        ConfigError: with every fault.
    """
    faults: list[str] = []
    commit = None
    with collecting(faults, "model"):
        check_model(config.model)
        path = pinned_at_start(config.run_dir, config.model) if config.run_dir else config.model
        commit = model_commit(path)
        config = config.model_copy(update={"model": pinned(path, commit)})
        load_tokenizer(config.model)
        faults += load_sizes(config.model).faults(*config.size)
        with collecting(faults, "score"):
            check_pairs(config.model, config.size, config.score)
    with collecting(faults, "score.negatives"):
        negatives_by(config.score.negatives)
    if faults:
        raise ConfigError(faults)
    return config, commit


def _open_run(config: ScorePairsConfig, commit: str | None, key: str):
    """Record this run in its folder."""
    uri = storage.join(config.run_dir, "run.json")
    versions = {"mi_ray": __version__, **{name: metadata.version(name) for name in PACKAGES}}
    content = {"config": config.results_config(), "config_hash": key, "versions": versions}
    storage.write_json(uri, content | {"model_commit": commit})
    run_folder.log_event(config.run_dir, "run_started", config_hash=key)


def score_pairs(config: ScorePairsConfig) -> str:
    """Score the pairs of an input that have no scores yet, then write the audit page; return its URI.

    Raises:
        ConfigError: the configuration is wrong, or another driver uses the folder; nothing was started.
    """
    config, commit = _checked(config)
    key = began_hash(config.run_dir, config.hash())
    plan = _planned(config, key)
    with run_folder.full_disk_as_config_error(config.run_dir), lease.held(config.run_dir, config.resources.lease_s):
        run_folder.check_run_dir(config.run_dir, config.results_config(), commit)
        return _score_missing(config, plan, commit, key)


class _Shards:
    """Shards of pairs, as input of `write_missing`. Each has size 1: the number of pairs in a tar is not known yet."""

    def __init__(self, shards: list[PairShard]):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return self.shards[index].name

    def size(self, index: int) -> int:
        return 1

    def row(self, index: int) -> dict:
        return asdict(self.shards[index])


def _planned(config: ScorePairsConfig, key: str) -> PairPlan:
    """The plan of the input, after what was found is printed."""
    plan = plan_pairs(config.input, config.pairs_per_shard, key, config.columns)
    print("\n".join(f"input: {line}" for line in plan.found), flush=True)
    if config.keep:
        check_keep(plan, config.keep)
    return plan


def _score_missing(config: ScorePairsConfig, plan: PairPlan, commit: str | None, key: str) -> str:
    folder, resources = storage.join(config.run_dir, SCORES), config.resources
    names = [shard.name for shard in plan]
    if run_folder.missing_parts(folder, names):
        start_ray()
        check_room(resources, train=False)
        height, width = config.size
        model = ModelConfig(path=config.model, dtype=config.dtype, height=height, width=width)
        resources = settle(model, resources)
    _open_run(config, commit, key)  # not before Ray has started: a fault there leaves an empty folder
    constructor = {"config": config.model_copy(update={"resources": resources}).model_dump(mode="json")}
    write_missing(
        "score", config.model, PairActor, constructor, _Shards(plan.shards), folder, config.run_dir, resources, "shard"
    )
    stale = plan.stale(storage.list_tables(folder))
    run_folder.remove_parts(folder, stale)
    if stale:
        run_folder.log_event(config.run_dir, "parts_removed", folder=SCORES, count=len(stale))
        print(f"removed {len(stale)} parts: their pairs are no longer in the input")
    storage.write_json(storage.join(folder, run_folder.MANIFEST), {"parts": [{"name": name} for name in names]})
    page, summary = write_audit(config.run_dir, folder, names, config.results_config(), plan.found)
    run_folder.log_event(config.run_dir, "run_finished")
    print(
        f"{summary['scored']} pairs scored, {summary['errors']} with an error,"
        f" {summary['contradicted']} contradict their caption"
    )
    for remark in summary["remarks"]:
        print(f"remark ({remark['count']} times): {remark['remark']}, first {remark['key']}")
    if config.keep:
        kept, left = write_kept(plan, config.keep, folder)
        print(f"{config.keep}: {kept} pairs kept, {left} left out")
    print(f"audit: {page}")
    if not summary["scored"]:
        most = summary["reasons"][0]["error"] if summary["reasons"] else "the input has no pairs"
        raise ConfigError([f"input: no pair could be scored; most frequent reason: {most}; correct the input"])
    return page


# ---------------------------------------------------------------------------------------------- a single pair
def score_one(config: ScorePairsConfig) -> dict:
    """Score a single pair, print its scores and write its map; return the row.

    Raises:
        ConfigError: the image cannot be read, the prompt is too long, or the map cannot be written.
    """
    config, _ = _checked(config)
    denoiser = load_denoiser(config.model, config.dtype, size=config.size)
    try:
        image = load_image(config.image, denoiser.image_size, config.fit)
    except (OSError, ValueError) as error:
        raise ConfigError([f"image: {config.image!r} cannot be used: {error}; give another image"]) from error
    count = len(denoiser.token_ids(config.prompt))
    if count > denoiser.max_tokens and config.overlong == "error":
        message = f"prompt: it has {count} tokens, but the text encoder reads at most {denoiser.max_tokens}"
        raise ConfigError([f"{message}; shorten it, or add --overlong truncate"])
    batch_size = batch_at_size(denoiser, _batch_size(config))
    scorer = PairScorer(denoiser, config.score, batch_size, config.seed, words=True)
    row = scorer(image[None], [config.prompt], Work())[0]
    density = upsampled(scorer.maps(image[None], [config.prompt]).direct, image.shape[:2])[0].cpu().numpy()
    if not np.isfinite([density.sum(), row["score_pmi"], row["score_margin"]]).all():
        fault = "gives numbers that are not finite; try --dtype float32, or fetch its weights again"
        raise ConfigError([f"model: {config.model!r} {fault}"])
    destination = config.map_file
    picture = attribution_png(image, density, config.prompt, row["score_pmi"], row["score_pmi_se"], row["words"])
    try:
        storage.write_bytes(destination, picture)
    except OSError as error:
        raise ConfigError([f"map: {destination!r} cannot be written ({error}); set --map FILE.png"]) from error
    print("\n".join([*verdict_lines(row), f"map            {destination}"]))
    return row


def _batch_size(config: ScorePairsConfig) -> int:
    return SINGLE_BATCH if config.resources.batch_size == "auto" else config.resources.batch_size


def run_or_describe(config: ScorePairsConfig, dry_run: bool):
    """Run the job: score a single pair, print the plan (dry run), or score the whole input."""
    if config.image is not None:
        score_one(config)
    elif dry_run:
        config, _ = _checked(config)
        shards = _planned(config, config.hash())
        evaluations = score_evaluations(config.score, set(config.score.names), config.score.num_samples)
        take_cpus(config.resources.cpus_per_actor)
        denoiser = load_denoiser(config.model, config.dtype, size=config.size)
        each = try_fitting(denoiser, _batch_size(config)).seconds_per_evaluation
        print(f"images {size_text(denoiser)}")
        print(f"shards: {len(shards)}; up to {evaluations} denoiser evaluations per pair, without those for words:")
        print(
            f"{evaluations * each:.3f} s per pair at {1e3 * each:.2f} ms per evaluation, measured here with one actor"
        )
        price, share = config.resources.price_per_gpu_hour, config.resources.gpus_per_actor
        if price is not None and share:
            hours = 1e6 * evaluations * each / 3600 * max(1, 1 if share == "auto" else share)
            print(f"a million pairs: {hours:,.1f} GPU-hours at {price:g} per hour: {hours * price:,.2f}")
            if denoiser.device.type == "cpu":
                print("this estimate is for the CPU of this machine; repeat it on a machine with the GPU")
    else:
        score_pairs(config)
