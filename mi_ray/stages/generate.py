"""Generation on Ray Data: an actor pool samples, scores, ranks and writes one atomic file a shard."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.prompts import Shard
from mi_ray.stages.candidates import Sampler, Scorer, Work, derived_seed, encode_png, measured
from mi_ray.stages.select import ranks


def take_cpus(count: float):
    """Use as many threads as CPUs were asked for, so that actors never fight for cores."""
    torch.set_num_threads(max(1, int(count)))


class CandidateGenerator:
    """Ray Data actor: a batch holding one shard -> one row that says what was written."""

    def __init__(
        self,
        config: dict,
        round_index: int,
        folder: str,
        adapter: str | None,
        keep_by: list[str],
        previews: list[str],
        pool: list[str],
    ):
        config = RunConfig.model_validate(config)
        take_cpus(config.resources.cpus_per_actor)
        self.config, self.round, self.folder, self.keep_by = config, round_index, folder, keep_by
        self.previews = frozenset(previews)
        adapter = adapter and storage.local_folder(adapter)
        self.denoiser = load_denoiser(config.model.path, config.model.dtype, adapter=adapter)
        self.sampler = Sampler(self.denoiser, config.sampler, config.resources.batch_size)
        self.scorer = Scorer(self.denoiser, config.score, config.resources.batch_size, config.seed, pool)
        self.schema = storage.candidates_schema(config.score.names)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        shard = shard_of(batch)
        began, work = time.perf_counter(), Work()
        rows, failures = whole_or_one_by_one(self._rows, shard, work)
        rows += [error_row(self.schema, shard, position, message) for position, message in failures]
        rows.sort(key=lambda row: (shard.prompt_ids.index(row["prompt_id"]), row["candidate_index"] or 0))
        storage.write_table(storage.join(self.folder, shard.name), pa.Table.from_pylist(rows, schema=self.schema))
        return written(shard, len(rows), len(failures), work, began)

    def _rows(self, shard: Shard, positions: list[int], work: Work) -> list[dict]:
        """The candidates' rows of some of the shard's prompts."""
        config = self.config
        prompts = [shard.prompts[p] for p in positions]
        ids = [shard.prompt_ids[p] for p in positions]
        each = config.generate.candidates_per_prompt
        seeds = [[derived_seed(config.seed, f"round-{self.round}", i, c) for c in range(each)] for i in ids]
        embeddings = self.denoiser.encode_prompts(prompts)
        index = torch.arange(len(prompts)).repeat_interleave(each)
        sampled = self.sampler(embeddings, seeds, work)
        scores = self.scorer(prompts, embeddings, index, sampled, work)
        columns = self._columns(shard, positions, seeds, sampled, scores, work)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _columns(self, shard, positions, seeds, sampled: Trajectory, scores: dict, work: Work) -> dict[str, list]:
        config = self.config
        each = config.generate.candidates_per_prompt
        owner = [p for p in positions for _ in range(each)]
        latents = sampled.latents.cpu().numpy()
        finite = np.isfinite(latents.reshape(len(latents), -1)).all(1)
        columns = {
            "prompt_id": [shard.prompt_ids[p] for p in owner],
            "prompt": [shard.prompts[p] for p in owner],
            "category": [shard.categories[p] for p in owner],
            "candidate_index": list(range(each)) * len(positions),
            "seed": [seed for of_prompt in seeds for seed in of_prompt],
            "delta_sq": sampled.delta_sq.cpu().tolist(),
            "cross": sampled.cross.cpu().tolist(),
            **scores,
            "error": [None if ok else "the model's output is not finite" for ok in finite],
        }
        previewed = [shard.prompt_ids[p] in self.previews for p in owner]
        images = self._decode(sampled.latents, columns["prompt"], previewed, columns, work)
        kept_by_any = np.zeros(len(owner), bool)
        for by in reversed(self.keep_by):  # the first is the selecting one: its ranks stay in the table
            columns["rank"] = []
            for start in range(0, len(owner), each):
                of_prompt = {k: v[start : start + each] for k, v in columns.items() if k != "rank"}
                columns["rank"] += ranks(of_prompt, by, config.seed)
            sound = [error is None for error in columns["error"]]
            columns["kept"] = [r < config.select.top_k and ok for r, ok in zip(columns["rank"], sound, strict=True)]
            kept_by_any |= np.array(columns["kept"])
        undecoded = [i for i, kept in enumerate(columns["kept"]) if kept and images[i] is None]
        if undecoded:
            began = time.perf_counter()
            for i, image in zip(undecoded, self.denoiser.decode(sampled.latents[undecoded]), strict=True):
                images[i] = image
            work.timed("decode", began)
        shown = [k or p for k, p in zip(columns["kept"], previewed, strict=True)]
        half = latents.astype(np.float16).reshape(len(latents), -1)
        columns["latents"] = [row if kept else None for row, kept in zip(half, kept_by_any, strict=True)]
        columns["latents_shape"] = [list(latents.shape[1:])] * len(owner)
        columns["image"] = [encode_png(i) if s else None for i, s in zip(images, shown, strict=True)]
        return columns

    def _decode(self, latents, prompts, previewed, columns, work: Work) -> list[np.ndarray | None]:
        """Decode what is previewed, or everything where every candidate is measured (which adds its columns)."""
        began = time.perf_counter()
        alignment = self.config.generate.alignment
        wanted = [i for i, preview in enumerate(previewed) if preview or alignment]
        images: list[np.ndarray | None] = [None] * len(prompts)
        if wanted:
            for i, image in zip(wanted, self.denoiser.decode(latents[wanted]), strict=True):
                images[i] = image
        work.timed("decode", began)
        columns |= measured(np.stack(images) if alignment else None, prompts, alignment)
        return images


# ------------------------------------------------------------------------------------------ shards
def shard_of(batch: dict[str, np.ndarray]) -> Shard:
    """The one shard that a Ray Data batch of size 1 holds."""
    fields = {name: values[0] for name, values in batch.items()}
    lists = {name: list(values) for name, values in fields.items() if isinstance(values, np.ndarray)}
    return Shard(index=int(fields["index"]), name=str(fields["name"]), **lists)


def whole_or_one_by_one(make_rows, shard: Shard, work: Work) -> tuple[list[dict], list[tuple[int, str]]]:
    """Rows of all prompts at once; if that fails, prompt by prompt, so that one bad prompt costs only itself.

    Returns:
        The rows, and (position in the shard, message) of each prompt that failed.
    """
    everything = list(range(len(shard.prompts)))
    try:
        return make_rows(shard, everything, work), []
    except Exception as error:
        if len(everything) == 1:
            return [], [(0, f"{type(error).__name__}: {error}")]
    rows, failures = [], []
    for position in everything:
        try:
            rows += make_rows(shard, [position], work)
        except Exception as error:
            failures.append((position, f"{type(error).__name__}: {error}"))
    return rows, failures


def error_row(schema: pa.Schema, shard: Shard, position: int, message: str) -> dict:
    row = dict.fromkeys(schema.names)
    row |= {"prompt_id": shard.prompt_ids[position], "prompt": shard.prompts[position], "error": message}
    return row | {"category": shard.categories[position]}


def written(shard: Shard, rows: int, errors: int, work: Work, began: float) -> dict[str, list]:
    return {
        "index": [shard.index],
        "shard": [shard.name],
        "rows": [rows],
        "errors": [errors],
        "denoiser_evaluations": [work.denoiser_evaluations],
        "score_evaluations": [work.score_evaluations],
        "seconds": [time.perf_counter() - began],
        **{f"{name}_seconds": [work.seconds.get(name, 0.0)] for name in ("sample", "score", "decode")},
    }


def run_shards(actor: type, constructor: dict, shards: list[Shard], config: RunConfig) -> Iterator[dict]:
    """Run shards through a pool of actors and yield, as each is written, what was written."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    least, most = (min(n, len(shards)) for n in config.resources.num_actors)
    dataset = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    dataset = dataset.map_batches(
        actor,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
        num_cpus=config.resources.cpus_per_actor,
        num_gpus=config.resources.gpus_per_actor,
        fn_constructor_kwargs=constructor,
    )
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
        yield {name: values[0].item() if hasattr(values[0], "item") else values[0] for name, values in batch.items()}


def run_stage(
    stage: str, model: str, actor: type, constructor: dict, shards: list[Shard], folder: str, config: RunConfig
) -> dict:
    """Write the missing parts of a folder, with progress and events, then its manifest. Returns the manifest."""
    manifest_uri = storage.join(folder, storage.MANIFEST)
    if storage.exists(manifest_uri):
        return storage.read_json(manifest_uri)
    missing = set(storage.missing_parts(folder, [shard.name for shard in shards]))
    todo = [shard for shard in shards if shard.name in missing]
    total = sum(len(shard.prompts) for shard in shards)
    with tqdm(total=total, desc=f"{stage} {model}", unit="prompt", mininterval=2, dynamic_ncols=True) as progress:
        progress.update(total - sum(len(shard.prompts) for shard in todo))
        for done in run_shards(actor, constructor, todo, config) if todo else ():
            storage.log_event(config.run_dir, "shard_written", stage=stage, model=model, **done)
            progress.update(len(shards[done["index"]].prompts))
    manifest = {"parts": [{"name": shard.name, "prompts": len(shard.prompts)} for shard in shards], "prompts": total}
    storage.write_json(manifest_uri, manifest)
    return manifest


def generate(
    config: RunConfig,
    shards: list[Shard],
    folder: str,
    round_index: int,
    adapter: str | None,
    keep_by: list[str],
    previews: list[str],
    pool: list[str],
) -> dict:
    """Generate, score and rank the pool of every prompt into `folder`.

    Args:
        adapter: folder of the adapter to generate with; None: the base model.
        keep_by: selections whose kept candidates need latents; the first ranks and marks the table.
        previews: ids of the prompts all of whose candidates are kept as images.
        pool: prompts among which pmi_contrastive finds each one's neighbours.
    """
    constructor = {
        "config": config.model_dump(mode="json"),
        "round_index": round_index,
        "folder": folder,
        "adapter": adapter,
        "keep_by": keep_by,
        "previews": previews,
        "pool": pool if "pmi_contrastive" in config.score.names else [],
    }
    return run_stage("generate", f"round {round_index}", CandidateGenerator, constructor, shards, folder, config)
