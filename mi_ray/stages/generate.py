"""Generation with Ray Data: a pool of actors samples, scores and ranks candidates, and writes one file per shard."""

import time

import numpy as np
import torch

from mi_ray import storage
from mi_ray.alignment.metric import columns_of, load_metrics, measure
from mi_ray.config import RunConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.inputs.images import encode_png
from mi_ray.inputs.shard_plan import Shard, ShardPlan
from mi_ray.scoring.best_of import sampler_of
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.pruning import Halving, cut_scorer
from mi_ray.scoring.sampler import batch_at_size, derived_seed, specialise
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.stages.judges import Judges, ask
from mi_ray.stages.shards import ShardWriter, run_stage
from mi_ray.storage import tables
from mi_ray.training.select import keeps, ranks


class CandidateGenerator:
    """Ray Data actor: a batch with one shard -> one row, the receipt of the shard."""

    def __init__(
        self,
        config: dict,
        round_index: int,
        folder: str,
        adapter: str | None,
        keep_by: list[str],
        previews: list[str],
        pool: list[str],
        token: int | None = None,
        judges: Judges = (),
    ):
        config = RunConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.config, self.round, self.keep_by = config, round_index, keep_by
        self.previews = frozenset(previews)
        adapter = adapter and storage.local_folder(adapter)
        model = config.model
        self.denoiser = load_denoiser(model.path, model.dtype, adapter=adapter, size=model.size)
        batch_size = batch_at_size(self.denoiser, config.resources.batch_size)
        specialise(self.denoiser, config.model, batch_size, config.sampler.guidance_method)
        self.sampler = sampler_of(config, config.sampler, self.denoiser, self.denoiser, batch_size, pool)
        self.scorer = Scorer(self.denoiser, config.score, batch_size, config.seed, pool)
        self.cuts = config.prune.cuts(config.sampler.num_inference_steps, config.generate.candidates_per_prompt)
        self.cut_scorer = cut_scorer(config, self.scorer, pool) if self.cuts else None
        self.metrics = load_metrics(config.generate.alignment)
        self.declared = columns_of(self.metrics)
        schema = tables.candidates_schema(config.score.names, self.declared)
        self.write = ShardWriter(
            "generate", f"round {round_index}", folder, schema, config, token, lambda: self.denoiser.calls
        )
        ask(judges, self.metrics, self.write.turn)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        return self.write(batch, self._rows)

    def _rows(self, shard: Shard, positions: list[int], work: Work) -> list[dict]:
        """The rows of the candidates of the prompts at these positions of the shard."""
        config = self.config
        prompts = [shard.prompts[p] for p in positions]
        ids = [shard.prompt_ids[p] for p in positions]
        each = config.generate.candidates_per_prompt
        seeds = [[derived_seed(config.seed, f"round-{self.round}", i, c) for c in range(each)] for i in ids]
        conditioning = self.denoiser.encode_prompts(prompts)
        index = torch.arange(len(prompts)).repeat_interleave(each)
        halving = self._halving(prompts, ids, conditioning, work) if self.cuts else None
        sampled = self.sampler(conditioning, seeds, work, halving, prompts)
        rows = torch.arange(len(index)) if halving is None else torch.from_numpy(halving.finished).nonzero()[:, 0]
        scores = self.scorer(prompts, conditioning, index[rows], sampled.of(rows), work)
        scores = {name: _spread(values, rows.tolist(), len(index)) for name, values in scores.items()}
        columns = self._columns(shard, positions, seeds, sampled, scores, halving, work)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _halving(self, prompts: list[str], ids: list[str], conditioning: Conditioning, work: Work) -> Halving:
        """The cuts. Candidates of the random control are never pruned: a control must not depend on a score."""
        each, top_k = self.config.generate.candidates_per_prompt, self.config.select.top_k
        carried = np.zeros((len(ids), each), bool)
        if "random" in self.keep_by:
            for row, prompt in zip(carried, ids, strict=True):
                lots = {"candidate_index": list(range(each)), "prompt_id": [prompt] * each}
                row[:] = np.array(ranks(lots, "random", self.config.seed)) < top_k
        return Halving(self.cuts, self.cut_scorer, prompts, conditioning, carried.ravel(), work)

    def _columns(
        self, shard, positions, seeds, sampled: Trajectory, scores: dict, halving: Halving | None, work: Work
    ) -> dict[str, list]:
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
            "pruned_after": [None] * len(owner),
            "prune_score": [None] * len(owner),
            "error": _errors(finite, {name: scores[f"score_{name}"] for name in config.score.names}),
        }
        finished = np.ones(len(owner), bool)
        if halving is not None:
            finished = halving.finished
            done = halving.steps_done(sampled.delta_sq.shape[1])
            curves = {name: [c[:n] for c, n in zip(columns[name], done, strict=True)] for name in ("delta_sq", "cross")}
            columns |= halving.columns() | curves
        previewed = [shard.prompt_ids[p] in self.previews and done for p, done in zip(owner, finished, strict=True)]
        images = self._decode(sampled.latents, columns["prompt"], previewed, finished, columns, work)
        kept_by_any = np.zeros(len(owner), bool)
        for by in reversed(self.keep_by):  # the first one is the actual selection: its ranks stay in the table
            columns["rank"] = []
            for start in range(0, len(owner), each):
                of_prompt = {k: v[start : start + each] for k, v in columns.items() if k != "rank"}
                columns["rank"] += ranks(of_prompt, by, config.seed, self.declared.get(by, ()))
            kept = keeps(columns, columns["rank"], by, config.select) & np.array(finished, bool)
            columns["kept"] = kept.tolist()
            kept_by_any |= kept
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

    def _decode(self, latents, prompts, previewed, finished, columns, work: Work) -> list[np.ndarray | None]:
        """Decode previewed candidates; with metrics, decode all finished candidates and add the metrics' columns."""
        began = time.perf_counter()
        wanted = [i for i, preview in enumerate(previewed) if preview or (self.metrics and finished[i])]
        images: list[np.ndarray | None] = [None] * len(prompts)
        if wanted:
            for i, image in zip(wanted, self.denoiser.decode(latents[wanted]), strict=True):
                images[i] = image
        work.timed("decode", began)
        found = measure(self.metrics, [images[i] for i in wanted], [prompts[i] for i in wanted])
        columns |= {name: _spread(values, wanted, len(prompts)) for name, values in found.items()}
        return images


def _errors(finite: np.ndarray, scores: dict[str, list]) -> list[str | None]:
    """The error of each candidate: the model's output was NaN or infinite, during sampling or in a score."""
    errors = [None if ok else "the model's output is not finite" for ok in finite]
    for name, values in scores.items():
        for row, value in enumerate(values):
            if errors[row] is None and value is not None and not np.isfinite(value):
                errors[row] = f"the model's output is not finite in {name}"
    return errors


def _spread(values: list, rows: list[int], count: int) -> list:
    """A list of `count` entries with the values at their rows, and None elsewhere."""
    spread = [None] * count
    for row, value in zip(rows, values, strict=True):
        spread[row] = value
    return spread


def generate(
    config: RunConfig,
    shards: ShardPlan,
    folder: str,
    round_index: int,
    adapter: str | None,
    keep_by: list[str],
    previews: list[str],
    pool: list[str],
) -> dict:
    """Generate, score and rank the pool of every prompt into `folder`.

    Args:
        adapter: folder of the adapter to use; None: the base model.
        keep_by: selections whose kept candidates need latents; the first one sets the columns rank and kept.
        previews: ids of the prompts for which the images of all candidates are stored.
        pool: prompts among which pmi_contrastive searches the neighbours of each prompt.
    """
    constructor = {
        "config": config.model_dump(mode="json"),
        "round_index": round_index,
        "folder": folder,
        "adapter": adapter,
        "keep_by": keep_by,
        "previews": previews,
        "pool": pool if "pmi_contrastive" in config.candidate_scores else [],
    }
    return run_stage("generate", f"round {round_index}", CandidateGenerator, constructor, shards, folder, config)
