"""The work of one actor of an online run: sample candidates with the policy, score them with the frozen base model."""

import copy
import time

import numpy as np
import torch

from mi_ray.alignment.metric import load_metrics, measure
from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import MergedAdapter, adapter_state, attach_adapter, attach_saved
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.inputs.images import encode_png
from mi_ray.inputs.shard_plan import Shard
from mi_ray.scoring.rewards import RANDOM, candidate_advantages, run_rewards
from mi_ray.scoring.sampler import Sampler, batch_at_size, derived_seed, specialise
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work


class PolicySampler:
    """Samples and scores candidates, and computes their advantages. The policy starts as the base model, see `load`.

    Scores are always computed with the base model. If the policy computed them, it could get a better score by becoming
    a worse judge.

    Args:
        start: local folder of the adapter that the run starts from; it is a part of the base model.
    """

    def __init__(self, config: RunConfig, start: str | None = None):
        self.config, tuning = config, config.finetune
        model, settings = config.model, {"size": config.model.size}
        self.base = plain = load_denoiser(model.path, model.dtype, **settings)
        batch_size = batch_at_size(self.base, config.resources.batch_size)
        self.drawing = copy.copy(plain)
        self.drawing.network = copy.deepcopy(plain.network)
        if start is None:
            self.adapter = MergedAdapter(attach_adapter(self.drawing.network, **tuning.adapter_settings))
        else:
            self.base = load_denoiser(model.path, model.dtype, adapter=start, beside=plain, **settings)
            adapted = attach_saved(self.drawing.network, start)
            self.adapter = MergedAdapter(adapted)
            self.adapter.load(adapter_state(adapted))
        self.drawing.network = self.adapter.model.get_base_model()
        for denoiser in (self.base, self.drawing):
            specialise(denoiser, config.model, batch_size, config.sampler.guidance_method)
        self.sampler = Sampler(self.drawing, config.sampler, batch_size, config.model.kernel)
        # Validations also use the metrics of the evaluation, which are not part of the reward. Each is loaded once.
        self.validation_metrics = load_metrics(config.metrics)
        self.metrics = {name: self.validation_metrics[name] for name in config.generate.alignment}
        self.rewards = run_rewards(config)
        self.random = all(reward.name == RANDOM for reward in self.rewards)
        self.scorer = Scorer(self.base, config.score, batch_size, config.seed, [])

    @property
    def calls(self) -> int:
        return self.base.calls + self.drawing.calls

    def load(self, state: dict[str, torch.Tensor]):
        """Replace the policy by the base model with these adapter weights."""
        self.adapter.load(state)

    def rows(self, shard: Shard, positions: list[int], update: int, validation: bool, work: Work) -> list[dict]:
        """The rows of the candidates of the prompts at these positions of the shard.

        Validations use the same seeds for every version of the policy. Every update uses different seeds.

        Args:
            update: index of the update; in a validation, the version of the policy.
        """
        config, online = self.config, self.config.online
        each = online.validation_candidates if validation else config.generate.candidates_per_prompt
        prompts, ids = ([of_shard[p] for p in positions] for of_shard in (shard.prompts, shard.prompt_ids))
        purpose = "online validation" if validation else f"online update {update}"
        seeds = [[derived_seed(config.seed, purpose, i, c) for c in range(each)] for i in ids]
        conditioning = self.base.encode_prompts(prompts)
        index = torch.arange(len(prompts)).repeat_interleave(each)
        recorded = () if validation else self.recorded_steps(update)
        sampled = self.sampler(conditioning, seeds, work, prompts=prompts, recorded=recorded)
        latents = sampled.latents.cpu().numpy()
        owner = index.tolist()
        columns = {
            "prompt_id": [ids[p] for p in owner],
            "prompt": [prompts[p] for p in owner],
            "category": [shard.categories[positions[p]] for p in owner],
            "candidate_index": list(range(each)) * len(prompts),
            "seed": [seed for of_prompt in seeds for seed in of_prompt],
            "delta_sq": sampled.delta_sq.cpu().tolist(),
            "cross": sampled.cross.cpu().tolist(),
            "update": [update] * len(owner),
            "latents_shape": [list(latents.shape[1:])] * len(owner),
        }
        finite = np.isfinite(latents.reshape(len(latents), -1)).all(1)
        columns["error"] = [None if ok else "the latents are not finite" for ok in finite]
        if not self.random or validation:
            columns |= self.scorer(prompts, conditioning, index, sampled, work)
        columns |= self._measured(sampled.latents, columns["prompt"], validation, columns, work)
        if not validation:
            columns["advantage"] = candidate_advantages(self.rewards, columns, config)
            half = latents.astype(np.float16).reshape(len(latents), -1)
            trained = [advantage is not None for advantage in columns["advantage"]]
            columns["latents"] = [row if kept else None for row, kept in zip(half, trained, strict=True)]
            if recorded:
                half = sampled.transitions.cpu().numpy().astype(np.float16).reshape(len(latents), -1)
                columns["transition_steps"] = [list(recorded)] * len(owner)
                columns["transitions"] = [row if kept else None for row, kept in zip(half, trained, strict=True)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def recorded_steps(self, update: int) -> tuple[int, ...]:
        """The sampling steps that are stored in an update: one in each of `online.stored_steps` equal parts of those
        that add noise, at log SNRs up to finetune.log_snr_max. Empty unless the method is dpok."""
        tuning, most = self.config.finetune, self.config.online.stored_steps
        if tuning.method != "dpok":
            return ()
        steps = self.sampler.plan.noisy(tuning.log_snr_max)
        if len(steps) > most:
            generator = torch.Generator().manual_seed(derived_seed(self.config.seed, "online steps", update))
            places = (torch.arange(most) + torch.rand(most, generator=generator)) / most
            steps = steps[(places * len(steps)).long().clamp(max=len(steps) - 1)]
        return tuple(steps.tolist())

    def _measured(self, latents, prompts: list[str], validation: bool, columns: dict, work: Work) -> dict[str, list]:
        """The columns of the metrics; in a validation also the first image of each prompt."""
        began, metrics = time.perf_counter(), self.metrics
        if validation:
            measuring = self.validation_metrics.items()
            metrics = {name: m for name, m in measuring if not m.reads_all or all(map(m.reads, prompts))}
        firsts = [i for i, number in enumerate(columns["candidate_index"]) if number == 0] if validation else []
        wanted = list(range(len(prompts))) if metrics else firsts
        if not wanted:
            return {}
        images = self.base.decode(latents[wanted])
        work.timed("decode", began)
        shown: list[dict | None] = [None] * len(prompts)
        for row in firsts:
            shown[row] = encode_png(images[wanted.index(row)])
        return {"image": shown} | (measure(metrics, images, prompts) if metrics else {})
