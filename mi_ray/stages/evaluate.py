"""Evaluation on Ray Data: the same held-out prompts and seeds for every model; images, alignment, PMI, features."""

import time

import numpy as np
import torch

from mi_ray import storage
from mi_ray.alignment.quality import latent_features
from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.shard_plan import Shard, ShardPlan
from mi_ray.runs.layout import REFERENCE
from mi_ray.scoring.images import encode_png, measured
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.sampler import Sampler, batch_at_size, derived_seed, specialise
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.shapes.grammar import draw_scene, parse
from mi_ray.shapes.scenes import render
from mi_ray.stages.shards import ShardWriter, run_stage
from mi_ray.storage import tables


class Evaluator:
    """Ray Data actor: a batch holding one shard of held-out prompts -> one row that says what was written.

    The judge of PMI and the source of features is always the base model, whichever model draws.
    """

    def __init__(self, config: dict, model: str, folder: str, adapter: str | None, token: int | None = None):
        config = RunConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.config, self.model = config, model
        evaluation, path, dtype, size = config.evaluation, config.model.path, config.model.dtype, config.model.size
        self.base = drawing = load_denoiser(path, dtype, size=size)
        batch_size = batch_at_size(self.base, config.resources.batch_size)
        if adapter:
            merged = storage.local_folder(adapter)
            drawing = load_denoiser(path, dtype, adapter=merged, beside=self.base, size=size)
        models = {id(d): d for d in (self.base, drawing)}.values()
        for denoiser in models:
            specialise(denoiser, config.model, batch_size)
        self.sampler = Sampler(drawing, evaluation.sampler, batch_size, config.model.kernel)
        judged = config.score.model_copy(update={"names": ("pmi",)})
        self.scorer = Scorer(self.base, judged, batch_size, config.seed, []) if evaluation.pmi else None

        def calls() -> int:
            return sum(denoiser.calls for denoiser in models)

        self.write = ShardWriter("evaluate", model, folder, tables.evaluation_schema(), config, token, calls)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        return self.write(batch, self._rows)

    def _rows(self, shard: Shard, positions: list[int], work: Work) -> list[dict]:
        evaluation = self.config.evaluation
        each = evaluation.images_per_prompt
        owner = [p for p in positions for _ in range(each)]
        seeds = [
            [derived_seed(self.config.seed, "evaluation", shard.prompt_ids[p], i) for i in range(each)]
            for p in positions
        ]
        prompts = [shard.prompts[p] for p in owner]
        flat_seeds = [seed for of_prompt in seeds for seed in of_prompt]
        scores = dict.fromkeys(("score_pmi", "score_pmi_se"), [None] * len(owner))
        if self.model == REFERENCE:
            images = np.stack([draw(p, seed) for p, seed in zip(prompts, flat_seeds, strict=True)])
        else:
            distinct = [shard.prompts[p] for p in positions]
            conditioning = self.base.encode_prompts(distinct)
            sampled = self.sampler(conditioning, seeds, work)
            index = torch.arange(len(positions)).repeat_interleave(each)
            if self.scorer:
                scores = self.scorer(distinct, conditioning, index, sampled, work)
            began = time.perf_counter()
            images = self.base.decode(sampled.latents)
            work.timed("decode", began)
        features = latent_features(self.base.encode_images(images)).cpu().numpy()
        columns = {
            "prompt_id": [shard.prompt_ids[p] for p in owner],
            "prompt": prompts,
            "category": [shard.categories[p] for p in owner],
            "split": [shard.splits[p] for p in owner],
            "image_index": list(range(each)) * len(positions),
            "seed": flat_seeds,
            **scores,
            **measured(images, prompts, evaluation.alignment),
            "features": list(features),
            "image": [encode_png(image) for image in images],
            "error": [None] * len(owner),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def draw(prompt: str, seed: int) -> np.ndarray:
    """A real render of what a shapes prompt says, (64, 64, 3) uint8."""
    return render(draw_scene(parse(prompt), np.random.default_rng(seed), unseen=True))


def evaluate(config: RunConfig, shards: ShardPlan, model: str, adapter: str | None) -> dict:
    """Draw and measure `images_per_prompt` images of every held-out prompt into evaluation/<model>.

    Args:
        model: base, tuned, a control, or `REFERENCE`: real renders, for the quality measures.
        adapter: folder of the model's adapter; None: the base model.
    """
    folder = storage.join(config.run_dir, "evaluation", model)
    constructor = {"config": config.model_dump(mode="json"), "model": model, "folder": folder, "adapter": adapter}
    return run_stage("evaluate", model, Evaluator, constructor, shards, folder, config)
