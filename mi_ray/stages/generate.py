"""Generation on Ray Data: an actor pool samples, scores, ranks and writes one atomic file a shard."""

import time

import numpy as np
import torch

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.sampling import Trajectory
from mi_ray.prompts import Shard
from mi_ray.stages.candidates import Sampler, Scorer, Work, derived_seed, encode_png, measured
from mi_ray.stages.select import ranks
from mi_ray.stages.shards import ShardWriter, run_stage, take_cpus


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
        token: int | None = None,
    ):
        config = RunConfig.model_validate(config)
        take_cpus(config.resources.cpus_per_actor)
        self.config, self.round, self.keep_by = config, round_index, keep_by
        self.previews = frozenset(previews)
        adapter = adapter and storage.local_folder(adapter)
        self.denoiser = load_denoiser(config.model.path, config.model.dtype, adapter=adapter)
        self.sampler = Sampler(self.denoiser, config.sampler, config.resources.batch_size)
        self.scorer = Scorer(self.denoiser, config.score, config.resources.batch_size, config.seed, pool)
        schema = storage.candidates_schema(config.score.names)
        self.write = ShardWriter("generate", f"round {round_index}", folder, schema, config, token)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        return self.write(batch, self._rows)

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
