"""The main job: rounds of generate, select and fine-tune, then evaluation and the report, in one resumable folder."""

import platform
import time
from contextlib import contextmanager
from importlib import metadata

import pyarrow as pa
import ray

from mi_ray import __version__, storage
from mi_ray.alignment.oracle import foreign_prompts
from mi_ray.config import ConfigError, RunConfig
from mi_ray.diffusion.denoisers import check_model, load_tokenizer
from mi_ray.prompts import holdout, plan_shards, read_prompts
from mi_ray.report.page import alignment_table, write_report
from mi_ray.stages.candidates import NEIGHBOUR_POOL
from mi_ray.stages.evaluate import REFERENCE, evaluate
from mi_ray.stages.finetune import check_targets, finetune
from mi_ray.stages.generate import generate
from mi_ray.stages.lease import confirm, held
from mi_ray.stages.select import select
from mi_ray.stages.training_log import check_loggers
from mi_ray.stages.trial import settle

PACKAGES = ("torch", "ray", "diffusers", "transformers", "peft", "pyarrow", "numpy")


class Plan:
    """What a run will do: its prompts and shards. Building it checks everything that can be checked beforehand.

    Raises:
        ConfigError: with every fault of the model, the prompt files and the run folder.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        faults: list[str] = []
        tokenizer = None
        with collecting(faults):
            tokenizer = _checked_tokenizer(config)
        with collecting(faults):
            check_loggers(config.finetune.log_to)
        if tokenizer:
            with collecting(faults):
                check_targets(config)
        with collecting(faults):
            storage.check_run_dir(config.run_dir, config.results_config())
        token_count = tokenizer and (lambda prompt: len(tokenizer(prompt).input_ids))
        max_tokens = tokenizer and tokenizer.model_max_length
        self.skipped: list[dict] = []
        self.train = self.held_out = None
        with collecting(faults):
            self.train = self._read(config.prompts.file, "prompts.file", config.prompts.limit, token_count, max_tokens)
        if config.evaluation.file:
            with collecting(faults):
                file, limit = config.evaluation.file, config.evaluation.limit
                self.held_out = self._read(file, "evaluation.file", limit, token_count, max_tokens)
        elif self.train is not None:
            self.train, self.held_out = holdout(self.train, config.evaluation.holdout_share, config.seed)
            self.held_out = self.held_out.slice(0, config.evaluation.limit)
        with collecting(faults):
            _check_alignment(config, self.train, self.held_out)
        if faults:
            raise ConfigError(faults)
        key = config.hash()
        self.shards = plan_shards(self.train, config.generate.prompts_per_shard, key)
        self.evaluation_shards = plan_shards(self.held_out, config.generate.prompts_per_shard, key)

    def settle(self):
        """Find what the resources leave open, on the cluster."""
        resources = settle(self.config.model, self.config.resources)
        self.config = self.config.model_copy(update={"resources": resources})

    def _read(self, file: str, field: str, limit: int | None, token_count, max_tokens) -> pa.Table:
        prompts = self.config.prompts
        table, skipped = read_prompts(
            file,
            field=field,
            limit=limit,
            duplicates=prompts.duplicates,
            overlong=prompts.overlong,
            token_count=token_count,
            max_tokens=max_tokens,
        )
        self.skipped += skipped
        return table

    @property
    def pool(self) -> list[str]:
        """The prompts among which pmi_contrastive finds neighbours."""
        return self.train["prompt"].slice(0, NEIGHBOUR_POOL).to_pylist()


@contextmanager
def collecting(faults: list[str]):
    """Collect the faults of a ConfigError instead of raising it, so that all are told at once."""
    try:
        yield
    except ConfigError as error:
        faults += error.faults


def _checked_tokenizer(config: RunConfig):
    try:
        check_model(config.model.path)
        return load_tokenizer(config.model.path)
    except ValueError as error:
        raise ConfigError([f"model.path: {fault}" for fault in str(error).split("\n")]) from error


def _check_alignment(config: RunConfig, *tables: pa.Table | None):
    faults = []
    for field, wanted, table in zip(
        ("generate.alignment", "evaluation.alignment"),
        (config.generate.alignment, config.evaluation.alignment),
        tables,
        strict=True,
    ):
        if wanted == "oracle" and table is not None and (foreign := foreign_prompts(table["prompt"].to_pylist())):
            shown = ", ".join(repr(prompt) for prompt in foreign[:3])
            faults.append(
                f"{field}: the oracle reads only prompts of the shapes grammar, not {shown}"
                f" ({len(foreign)} of {len(table)}); set it to none for your own prompts"
            )
    if faults:
        raise ConfigError(faults)


# ------------------------------------------------------------------------------------------ running
@contextmanager
def timed(config: RunConfig, stage: str):
    """Log how long a stage took."""
    confirm(config.run_dir)
    began = time.monotonic()
    yield
    confirm(config.run_dir)
    storage.log_event(config.run_dir, "stage_finished", stage=stage, seconds=round(time.monotonic() - began, 3))


def open_run(plan: Plan):
    """Write run.json, which makes the folder this run's, and note what was read."""
    config = plan.config
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions = {"mi_ray": __version__, "python": platform.python_version(), **versions}
    content = {"config": config.results_config(), "config_hash": config.hash(), "versions": versions}
    content |= {"resources": config.resources.model_dump(mode="json")}
    storage.write_json(storage.join(config.run_dir, "run.json"), content)
    storage.log_event(config.run_dir, "run_started", config_hash=config.hash())
    for stage, table in (("train", plan.train), ("evaluation", plan.held_out)):
        facts = {"used": len(table), "skipped": len(plan.skipped), "read": len(table) + len(plan.skipped)}
        storage.log_event(config.run_dir, "prompts_read", stage=stage, **facts)
    for skipped in plan.skipped:
        storage.log_event(config.run_dir, "prompt_skipped", **skipped)


def align(plan: Plan, arm: str = "tuned", until: str = "report") -> str | None:
    """All rounds of one arm; returns the last adapter's folder.

    The arm `tuned` selects by `select.by`. A control is an arm that selects otherwise: it shares the first round's pool
    and from then on generates with its own adapters, so that arms differ in nothing but the selection.
    """
    config, run_dir = plan.config, plan.config.run_dir
    home = run_dir if arm == "tuned" else storage.join(run_dir, "controls", arm)
    by = config.select.by if arm == "tuned" else arm
    suffix = "" if arm == "tuned" else f"_{arm}"
    previews = plan.train["prompt_id"].slice(0, config.generate.preview_prompts).to_pylist()
    adapter = None
    for r in range(config.rounds):
        candidates = storage.join(run_dir if r == 0 else home, f"round-{r}", "candidates")
        selected, tuned = (storage.join(home, f"round-{r}", name) for name in ("selected.parquet", "adapter"))
        if r or arm == "tuned":
            keep_by = [by] if r else [by, *config.evaluation.controls]
            with timed(config, f"generate{suffix}"):
                generate(config, plan.shards, candidates, r, adapter, keep_by, previews, plan.pool)
        if until == "generate":
            return None
        with timed(config, f"select{suffix}"):
            select(config, candidates, selected, by)
        with timed(config, f"finetune{suffix}"):
            finetune(config, selected, tuned, adapter, f"{arm}-{r}")
        adapter = tuned
    return adapter


def run_pipeline(config: RunConfig, until: str = "report") -> str | None:
    """Run or continue the whole job, or what comes up to a stage; returns the report's URI.

    Args:
        until: the last stage to run: generate (of the first round), finetune, evaluate or report.

    Raises:
        ConfigError: something the user gave is wrong, or another driver holds the run, and nothing was started; or the
            disk is full.
    """
    plan = Plan(config)
    with storage.full_disk_told(config.run_dir), held(config.run_dir, config.resources.lease_s):
        # Again: who held the run until now may have begun another config.
        storage.check_run_dir(config.run_dir, config.results_config())
        return _run(plan, until)


def _run(plan: Plan, until: str) -> str | None:
    ray.init(logging_level="warning", ignore_reinit_error=True)
    plan.settle()
    config = plan.config
    open_run(plan)
    adapters: dict[str, str | None] = {"base": None, "tuned": align(plan, until=until)}
    if until == "generate":
        return None
    adapters |= {arm: align(plan, arm) for arm in config.evaluation.controls}
    if until == "finetune":
        return None
    if config.evaluation.alignment == "oracle":
        with timed(config, "evaluate_reference"):
            evaluate(config, plan.evaluation_shards, REFERENCE, None)
    for model, adapter in adapters.items():
        with timed(config, f"evaluate_{model}"):
            evaluate(config, plan.evaluation_shards, model, adapter)
    storage.log_event(config.run_dir, "run_finished")
    if until == "evaluate":
        return None
    report = write_report(config.run_dir, config)
    print(alignment_table(storage.read_json(storage.join(config.run_dir, "report", "report.json"))))
    print(f"report: {report}")
    return report
