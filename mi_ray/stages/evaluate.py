"""Evaluation with Ray Data: images of the same held-out prompts and seeds for every model; metrics, PMI, features."""

import time

import numpy as np
import torch

from mi_ray import storage
from mi_ray.alignment.encoder import load_encoder
from mi_ray.alignment.metric import columns_of, load_metrics, measure, reference_of
from mi_ray.config import RunConfig, folder_name
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.images import encode_png
from mi_ray.inputs.shard_plan import Shard, ShardPlan
from mi_ray.runs.layout import REFERENCE
from mi_ray.scoring.best_of import evaluation_samplers
from mi_ray.scoring.machine import take_share
from mi_ray.scoring.sampler import batch_at_size, derived_seed, specialise
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.stages.judges import Judges, ask
from mi_ray.stages.shards import ShardWriter, run_stage
from mi_ray.storage import tables
from mi_ray.training.start import local_start


class Evaluator:
    """Ray Data actor: a batch with one shard of held-out prompts -> one row, the receipt of the shard.

    PMI and the features are always computed with the base model, whichever model samples the images.
    """

    def __init__(
        self, config: dict, model: str, folder: str, adapter: str | None, token: int | None = None, judges: Judges = ()
    ):
        config = RunConfig.model_validate(config)
        take_share(config.resources.cpus_per_actor, config.resources.gpus_per_actor)
        self.config, self.model = config, model
        evaluation, path, dtype, size = config.evaluation, config.model.path, config.model.dtype, config.model.size
        self.base = sampled = load_denoiser(path, dtype, adapter=local_start(config), size=size)
        batch_size = batch_at_size(self.base, config.resources.batch_size)
        if adapter:
            sampled = load_denoiser(path, dtype, adapter=storage.local_folder(adapter), beside=self.base, size=size)
        models = {id(d): d for d in (self.base, sampled)}.values()
        for denoiser in models:
            specialise(denoiser, config.model, batch_size, config.evaluation.sampler.guidance_method)
        self.samplers = evaluation_samplers(config, sampled, self.base, batch_size)
        only_pmi = config.score.model_copy(update={"names": ("pmi",)})
        self.scorer = Scorer(self.base, only_pmi, batch_size, config.seed, []) if evaluation.pmi else None
        self.metrics = load_metrics(evaluation.alignment)
        self.reference = reference_of(self.metrics)
        self.encoder = load_encoder(evaluation.encoder, self.base.encode_images)
        schema = tables.evaluation_schema(columns_of(self.metrics), self.encoder.column)
        self.write = ShardWriter(
            "evaluate", model, folder, schema, config, token, lambda: sum(denoiser.calls for denoiser in models)
        )
        ask(judges, self.metrics, self.write.turn)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        return self.write(batch, self._rows)

    def _rows(self, shard: Shard, positions: list[int], work: Work) -> list[dict]:
        seed, each = self.config.seed, self.config.evaluation.images_per_prompt
        owner = [p for p in positions for _ in range(each)]
        seeds = [[derived_seed(seed, "evaluation", shard.prompt_ids[p], i) for i in range(each)] for p in positions]
        columns = {
            "prompt_id": [shard.prompt_ids[p] for p in owner],
            "prompt": [shard.prompts[p] for p in owner],
            "category": [shard.categories[p] for p in owner],
            "split": [shard.splits[p] for p in owner],
            "image_index": list(range(each)) * len(positions),
            "seed": [seed for of_prompt in seeds for seed in of_prompt],
            "error": [None] * len(owner),
        }
        rows = []
        for scale in (None,) if self.model == REFERENCE else self.samplers:
            whole = columns | self._at_scale(scale, [shard.prompts[p] for p in positions], seeds, work)
            rows += [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
        return rows

    def _at_scale(self, scale: float | None, prompts: list[str], seeds: list[list[int]], work: Work) -> dict[str, list]:
        """The columns that depend on guidance_scale, one row per prompt and seed. Scale None: real images."""
        prompt_of = [prompt for prompt, of_prompt in zip(prompts, seeds, strict=True) for _ in of_prompt]
        scores = dict.fromkeys(("score_pmi", "score_pmi_se"), [None] * len(prompt_of))
        if scale is None:
            flat = [seed for of_prompt in seeds for seed in of_prompt]
            images = np.stack([self.reference(p, seed) for p, seed in zip(prompt_of, flat, strict=True)])
        else:
            conditioning = self.base.encode_prompts(prompts)
            sampled = self.samplers[scale](conditioning, seeds, work, prompts=prompts)
            index = torch.arange(len(prompts)).repeat_interleave(len(seeds[0]))
            if self.scorer:
                scores = self.scorer(prompts, conditioning, index, sampled, work)
            began = time.perf_counter()
            images = self.base.decode(sampled.latents)
            work.timed("decode", began)
        return {
            "guidance_scale": [scale] * len(prompt_of),
            **scores,
            **measure(self.metrics, images, prompt_of),
            "features": list(self.encoder.features(images)),
            "image": [encode_png(image) for image in images],
        }


def evaluate(config: RunConfig, shards: ShardPlan, model: str, adapter: str | None) -> dict:
    """Sample and measure images of every held-out prompt at each guidance_scale, into evaluation/<model>.

    Args:
        model: base, tuned, a control, or `REFERENCE`: real images from a metric, for the quality measures.
        adapter: folder of the model's adapter; None: the base model.
    """
    folder = storage.join(config.run_dir, "evaluation", folder_name(model))
    constructor = {"config": config.model_dump(mode="json"), "model": model, "folder": folder, "adapter": adapter}
    return run_stage("evaluate", model, Evaluator, constructor, shards, folder, config)
