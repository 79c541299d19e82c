"""The main job: rounds of generate, select and fine-tune, then evaluation and report. The run folder can be resumed."""

import math
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib import metadata
from itertools import chain

import numpy as np
import pyarrow as pa

from mi_ray import __version__, storage
from mi_ray.alignment.encoder import check_encoder
from mi_ray.alignment.metric import check_image_size, check_prompts, columns_of, load_metrics, reference_of
from mi_ray.config import RunConfig, pinned
from mi_ray.config.section import ConfigError, collecting
from mi_ray.diffusion.architectures import is_architecture
from mi_ray.diffusion.folders import check_model, load_sizes, load_tokenizer, model_commit, resolve_model
from mi_ray.diffusion.quantisation import check_quantisation
from mi_ray.inputs.online_plan import too_few_prompts
from mi_ray.inputs.prompts import PromptReader
from mi_ray.inputs.shard_plan import Holdout, ShardPlan, with_details, write_prompts
from mi_ray.report.page import alignment_table, write_report
from mi_ray.runs import folder as run_folder
from mi_ray.runs.layout import (
    LESS_BASELINE,
    REFERENCE,
    baseline_folder,
    began_hash,
    home_of,
    online_folder,
    pinned_at_start,
    selects_by,
    takes_baseline,
)
from mi_ray.runs.lease import confirm, held
from mi_ray.runs.status import rough_duration, run_status
from mi_ray.scoring.scorer import NEIGHBOUR_POOL
from mi_ray.scoring.suitability import check_suitability
from mi_ray.stages.cluster import check_room, start_ray
from mi_ray.stages.evaluate import evaluate
from mi_ray.stages.generate import generate
from mi_ray.stages.online import online
from mi_ray.stages.trial import settle
from mi_ray.storage import tables
from mi_ray.training.baseline import subtract_baseline
from mi_ray.training.log import check_loggers
from mi_ray.training.loop import check_targets, finetune
from mi_ray.training.select import select
from mi_ray.training.start import start_adapter

PACKAGES = ("torch", "ray", "diffusers", "transformers", "peft", "pyarrow", "numpy")


class Plan:
    """The prompts and shards of a run. The constructor checks everything that can be checked before the run starts.

    The prompts are in a temporary folder until `open_run` copies them to the run folder. They are not kept in memory.

    Args:
        dry_run: the model may be an architecture without weights; then prompts are not compared with its tokenizer.

    Raises:
        ConfigError: with every fault of the model, the prompt files and the run folder.
    """

    def __init__(self, config: RunConfig, dry_run: bool = False):
        self.config = config
        faults: list[str] = []
        tokenizer = self.model_commit = None
        sizes_only = dry_run and is_architecture(config.model.path)
        with collecting(faults, "model.path"):
            if sizes_only:
                resolve_model(config.model.path)
            else:
                check_model(config.model.path)
            path = pinned_at_start(config.run_dir, config.model.path)
            self.model_commit = model_commit(path)
            # All actors load this commit, even if the hub has a newer one when they start.
            model = config.model.model_copy(update={"path": pinned(path, self.model_commit)})
            self.config = config = config.model_copy(update={"model": model})
            tokenizer = None if sizes_only else load_tokenizer(config.model.path)
        with collecting(faults):
            check_loggers(config.finetune.log_to)
        with collecting(faults, "model.quantize"):
            check_quantisation(config.model.quantize)
        if tokenizer or (sizes_only and not faults):
            with collecting(faults, "model.path"):
                check_targets(config)
            with collecting(faults, "model.path"):
                faults += _size_faults(config)
            with collecting(faults, "score"):
                check_suitability(config)
        with collecting(faults):
            run_folder.check_run_dir(config.run_dir, config.results_config(), self.model_commit)
        token_count = tokenizer and (lambda prompt: len(tokenizer(prompt).input_ids))
        max_tokens = tokenizer and tokenizer.model_max_length
        self._folder = tempfile.TemporaryDirectory(prefix="mi_ray-")
        self.skipped: dict[str, list[dict]] = {"train": [], "evaluation": []}
        self.train = self.held_out = None
        with collecting(faults):
            self.train = self._read("train", config.prompts.file, config.prompts.limit, token_count, max_tokens)
        if config.evaluation.file:
            with collecting(faults):
                file, limit = config.evaluation.file, config.evaluation.limit
                self.held_out = self._read("evaluation", file, limit, token_count, max_tokens)
        elif self.train is not None:
            with collecting(faults):
                self.train, self.held_out = self._split(self.train)
        with collecting(faults):
            self.has_reference = _check_alignment(config, self.train, self.held_out)
        faults += [] if self.train is None else too_few_prompts(config, len(self.train))
        if faults:
            raise ConfigError(faults)
        self.hash, per_shard = began_hash(config.run_dir, config.hash()), config.generate.prompts_per_shard
        self.shards = ShardPlan(self.train.uri, per_shard, self.hash)
        self.evaluation_shards = ShardPlan(self.held_out.uri, per_shard, self.hash)
        for uri, field, shards in self.stored:
            with collecting(faults):
                shards.check_stored(uri, field)
        if faults:
            raise ConfigError(faults)

    @property
    def stored(self) -> list[tuple[str, str, ShardPlan]]:
        """(URI of the stored prompts, the config field that they come from, their shards), for train and evaluation."""
        folder = storage.join(self.config.run_dir, "prompts")
        held_out_by = "evaluation.file" if self.config.evaluation.file else "prompts.file"
        return [
            (storage.join(folder, "train.parquet"), "prompts.file", self.shards),
            (storage.join(folder, "evaluation.parquet"), held_out_by, self.evaluation_shards),
        ]

    def settle(self):
        """Replace every `auto` of the resources by what a trial on the cluster finds."""
        resources = settle(self.config.model, self.config.resources)
        self.config = self.config.model_copy(update={"resources": resources})

    def _read(self, stage: str, file: str, limit: int | None, token_count, max_tokens) -> storage.ParquetRows:
        prompts = self.config.prompts
        reader = PromptReader(
            file,
            field="prompts.file" if stage == "train" else "evaluation.file",
            limit=limit,
            duplicates=prompts.duplicates,
            overlong=prompts.overlong,
            broken=prompts.broken,
            token_count=token_count,
            max_tokens=max_tokens,
            column=prompts.column,
        )
        table = self._table(stage, reader.batches())
        self.skipped[stage] = reader.skipped
        print("\n".join(reader.found), flush=True)
        return table

    def _split(self, prompts: storage.ParquetRows) -> tuple[storage.ParquetRows, storage.ParquetRows]:
        """Divide the prompts into training and evaluation, if the evaluation has no file of its own."""
        evaluation = self.config.evaluation
        ids = (i for batch in prompts.batches(["prompt_id"]) for i in batch["prompt_id"].to_pylist())
        held_out = Holdout(ids, evaluation.holdout_share, self.config.seed)
        kept = (batch.filter(pa.array(~held_out(batch["prompt_id"].to_pylist()))) for batch in prompts.batches())
        taken = (batch.filter(pa.array(held_out(batch["prompt_id"].to_pylist()))) for batch in prompts.batches())
        return self._table("training", kept), self._table("evaluation", _first(taken, evaluation.limit))

    def _table(self, name: str, batches: Iterator[pa.RecordBatch]) -> storage.ParquetRows:
        uri = storage.join(self._folder.name, f"{name}.parquet")
        write_prompts(uri, batches)
        return storage.ParquetRows(uri)

    def skipped_count(self, stage: str) -> int:
        return sum(row.get("count", 1) for row in self.skipped[stage])

    @cached_property
    def pool(self) -> list[str]:
        """The prompts among which pmi_contrastive searches neighbours: all, or `NEIGHBOUR_POOL` evenly spaced ones."""
        rows, found, start = np.linspace(0, len(self.train), NEIGHBOUR_POOL, endpoint=False, dtype=np.int64), [], 0
        for batch in self.train.batches(["prompt"]):
            here = np.unique(rows[(rows >= start) & (rows < start + len(batch))])
            found += batch["prompt"].take(here - start).to_pylist()
            start += len(batch)
        return found


def _first(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    """The first `limit` rows. None: all rows."""
    left = math.inf if limit is None else limit
    for batch in batches:
        if left <= 0:
            return
        yield batch.slice(0, min(left, len(batch)))
        left -= len(batch)


def _size_faults(config: RunConfig) -> list[str]:
    """The faults of the image size, for the model and the metrics.

    Raises:
        ValueError: the model's files do not contain its sizes.
    """
    sizes = load_sizes(config.model.path)
    faults = [f"model.{fault}" for fault in sizes.faults(*config.model.size)]
    for section in () if faults else ("generate", "evaluation"):
        with suppress(ValueError):  # _check_alignment reports unknown metrics
            metrics = load_metrics(getattr(config, section).alignment)
            with collecting(faults, f"{section}.alignment"):
                check_image_size(metrics, sizes.image(*config.model.size))
    return faults


def _check_alignment(config: RunConfig, *prompts: storage.ParquetRows | None) -> bool:
    """Check that all metrics load, name their columns differently and read all prompts. True if one has real images."""
    faults, metrics = [], {}
    schemas = {
        "generate": partial(tables.candidates_schema, config.score.names),
        "evaluation": tables.evaluation_schema,
    }
    for (section, schema), table in zip(schemas.items(), prompts, strict=True):
        with collecting(faults, f"{section}.alignment"):
            metrics = load_metrics(getattr(config, section).alignment)
            schema(columns_of(metrics))
            if metrics and table is not None:
                check_prompts(metrics, chain.from_iterable(map(with_details, table.batches(["prompt", "details"]))))
    with collecting(faults, "evaluation.encoder"):
        check_encoder(config.evaluation.encoder)
    if faults:
        raise ConfigError(faults)
    return reference_of(metrics) is not None


# ------------------------------------------------------------------------------------------ running
@contextmanager
def timed(config: RunConfig, stage: str):
    """Context of a stage. Logs and prints its duration, and prints an estimate for the rest of the run."""
    confirm(config.run_dir)
    began = time.monotonic()
    yield
    confirm(config.run_dir)
    took = time.monotonic() - began
    run_folder.log_event(config.run_dir, "stage_finished", stage=stage, seconds=round(took, 3))
    left = None
    with suppress(OSError, ValueError, KeyError, ConfigError):  # a failed estimate must not stop the run
        left = run_status(config.run_dir)["seconds_left"]
    rest = f"; the rest of the pipeline takes about {rough_duration(left)}" if left else ""
    print(f"{stage}: {rough_duration(took)}{rest}", flush=True)


def open_run(plan: Plan):
    """Write run.json, so that the folder belongs to this run. Store the prompts; log what was read and skipped."""
    config = plan.config
    versions = {"mi_ray": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in PACKAGES}
    content = {"config": config.results_config(), "config_hash": plan.hash, "versions": versions}
    content |= {"model_commit": plan.model_commit, "has_reference": plan.has_reference}
    content |= {"resources": config.resources.model_dump(mode="json")}
    storage.write_json(storage.join(config.run_dir, "run.json"), content)
    run_folder.log_event(config.run_dir, "run_started", config_hash=plan.hash)
    for stage, (uri, field, shards) in zip(("train", "evaluation"), plan.stored, strict=True):
        shards.store(uri, field)
        used, skipped = shards.prompts, plan.skipped_count(stage)
        run_folder.log_event(
            config.run_dir, "prompts_read", stage=stage, read=used + skipped, used=used, skipped=skipped
        )
        for row in plan.skipped[stage]:
            run_folder.log_event(config.run_dir, "prompt_skipped", **row)


def align(plan: Plan, arm: str = "tuned", until: str = "report") -> str | None:
    """Run all rounds of one arm. Returns the folder of the last adapter.

    The arm `tuned` selects by `select.by`. A control is an arm with another selection. All arms share the candidates of
    the first round; in later rounds each arm generates with its own adapter. So arms differ only in the selection.
    """
    config, run_dir, adapter = plan.config, plan.config.run_dir, start_adapter(plan.config)
    if config.online.updates:
        rewards = config.online.rewards if arm == "tuned" else (arm,)
        of_arm = config.model_copy(update={"online": config.online.model_copy(update={"rewards": rewards})})
        with timed(config, "online" if arm == "tuned" else f"online_{arm}"):
            return online(of_arm, plan.shards.source, online_folder(run_dir, arm), arm)
    home, by = home_of(run_dir, arm), selects_by(config, arm)
    suffix = "" if arm == "tuned" else f"_{arm}"
    previews = plan.train.read(0, config.generate.preview_prompts)["prompt_id"].to_pylist()
    for r in range(config.rounds):
        candidates = storage.join(run_dir if r == 0 else home, f"round-{r}", "candidates")
        selected, tuned = (storage.join(home, f"round-{r}", name) for name in ("selected.parquet", "adapter"))
        if r or arm == "tuned":
            baseline = ["random"] if takes_baseline(config, r, by) else []
            keep_by = list(dict.fromkeys([by, *baseline, *([] if r else config.evaluation.controls)]))
            with timed(config, f"generate{suffix}"):
                generate(config, plan.shards, candidates, r, adapter, keep_by, previews, plan.pool)
        if until == "generate":
            return None
        with timed(config, f"select{suffix}"):
            select(config, candidates, selected, by)
        with timed(config, f"finetune{suffix}"):
            finetune(config, selected, tuned, adapter, f"{arm}-{r}")
            if takes_baseline(config, r, by):
                tuned = _less_baseline(config, arm, candidates, tuned, adapter, r)
        adapter = tuned
    return adapter


def _less_baseline(config: RunConfig, arm: str, candidates: str, tuned: str, start: str | None, r: int) -> str:
    """Subtract the baseline, an adapter trained on a random selection, from an arm's adapter. Returns its folder."""
    folder = baseline_folder(config.run_dir, arm, r)
    selected, baseline = storage.join(folder, "selected.parquet"), storage.join(folder, "adapter")
    select(config, candidates, selected, "random")
    finetune(config, selected, baseline, start, f"{'baseline' if r else 'random'}-{r}")
    destination = storage.join(home_of(config.run_dir, arm), f"round-{r}", LESS_BASELINE)
    subtract_baseline(config, tuned, baseline, start, destination)
    return destination


def run_pipeline(config: RunConfig, until: str = "report") -> str | None:
    """Run or continue the job up to a stage. Returns the URI of the report, or None if the job ends earlier.

    Args:
        until: the last stage to run: generate (of the first round), finetune, evaluate or report.

    Raises:
        ConfigError: a setting or an input file is wrong, or another driver holds the run, and nothing was started; or
            the disk is full.
    """
    plan = Plan(config)
    with run_folder.full_disk_as_config_error(config.run_dir), held(config.run_dir, config.resources.lease_s):
        # Check again: the driver that held the lease before may have started a run with another config.
        run_folder.check_run_dir(config.run_dir, config.results_config(), plan.model_commit)
        return _run(plan, until)


def _run(plan: Plan, until: str) -> str | None:
    start_ray()
    if not storage.exists(storage.join(plan.config.run_dir, "report", "report.json")):  # otherwise the run is finished
        check_room(plan.config.resources, until != "generate", at_once=plan.config.online.updates > 0)
    plan.settle()
    config = plan.config
    open_run(plan)
    adapters: dict[str, str | None] = {"base": None, "tuned": align(plan, until=until)}
    if until == "generate":
        return None
    adapters |= {arm: align(plan, arm) for arm in config.evaluation.controls}
    if until == "finetune":
        return None
    if plan.has_reference:
        with timed(config, "evaluate_reference"):
            evaluate(config, plan.evaluation_shards, REFERENCE, None)
    for model, adapter in adapters.items():
        with timed(config, f"evaluate_{model}"):
            evaluate(config, plan.evaluation_shards, model, adapter)
    run_folder.log_event(config.run_dir, "run_finished")
    if until == "evaluate":
        return None
    report = write_report(config.run_dir, config)
    print(alignment_table(storage.read_json(storage.join(config.run_dir, "report", "report.json"))))
    print(f"report: {report}")
    return report
