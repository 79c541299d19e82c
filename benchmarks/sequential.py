"""Noise samples in rounds: python benchmarks/sequential.py [--prompts N] [--top-k 1,4] [--out FILE.json] [--check]

The best candidates of a prompt are chosen by pmi. Either all candidates get the same number of noise samples, or
samples are added in rounds, and a candidate that is clearly among the best, or clearly not, gets no more of them
(`information/sequential.py`). Every denoising error is computed once; both choices use the same ones.
"""

from functools import partial

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, main
from pruning import lost_of
from pydantic import Field, PositiveInt
from selection import DEMO, PROMPTS, SETTINGS
from tqdm import tqdm

from mi_ray.alignment.metric import load_metrics
from mi_ray.config import SamplerConfig, ScoreConfig
from mi_ray.config.metrics import MetricName
from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.information import pointwise
from mi_ray.information.probes import Probes
from mi_ray.information.sequential import choose
from mi_ray.inputs.prompts import read_prompts
from mi_ray.scoring.machine import keep_memory
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.scorer import draw_probes_of
from mi_ray.scoring.work import Work

AIM, WITHIN = 1.5, 1.0  # target reduction of evaluations, and allowed loss in points


class SequentialBenchmark(Benchmark):
    """How many denoiser evaluations does a choice by pmi save if noise samples are added in rounds?"""

    model: ModelPath = Field("shapes", description="the embedded model (shapes) or a diffusers folder")
    prompts: PositiveInt = Field(60, description="number of prompts, from the demo's training prompts")
    candidates: PositiveInt = Field(8, description="number of candidates per prompt")
    top_k: tuple[PositiveInt, ...] = Field((1, 4), description="numbers of candidates to choose")
    confidences: tuple[float, ...] = Field((0.5, 0.8, 0.95), description="confidences of the choice in rounds")
    samples: PositiveInt = Field(8, description="number of noise samples in a round")
    rounds: PositiveInt = Field(6, description="highest number of rounds")
    sampler: SamplerConfig = SamplerConfig(solver="dpm++2m", num_inference_steps=20, guidance_scale=1.5)
    alignment: MetricName = Field(DEMO.evaluation.alignment[0], description="metric of the chosen images")
    dtype: str = Field("fast", description="dtype of the denoiser")
    batch_size: PositiveInt = Field(128, description="number of candidates in one denoiser batch")
    seed: int = Field(0, description="seed of the candidates and of the noise")

    def answer(self) -> Findings:
        if self.smoke:
            small = {"prompts": 3, "candidates": 4, "samples": 4, "rounds": 2, "top_k": (1,), "smoke": False}
            return self.model_copy(update=small).answer()
        if wrong := [k for k in self.top_k if k >= self.candidates]:
            raise ValueError(f"top_k: {wrong} is not below the number of candidates, {self.candidates}")
        worth, errors, probes = self._pool()
        results = []
        for top_k in self.top_k:
            choices = []
            for rounds in range(1, self.rounds + 1):
                chosen = [fixed(e[:rounds], p[:rounds], top_k) for e, p in zip(errors, probes, strict=True)]
                choices.append((f"{rounds * self.samples} samples", chosen, 2 * self.samples * rounds, None))
            everything = chosen  # with the samples of all rounds
            for confidence in self.confidences:
                found = [
                    choose(partial(stored, e, p), self.candidates, top_k, confidence, self.rounds)
                    for e, p in zip(errors, probes, strict=True)
                ]
                cost = np.mean([choice.evaluations for choice in found]) / self.candidates
                separated = float(np.mean([choice.separated for choice in found]))
                chosen = [choice.chosen.tolist() for choice in found]
                choices.append((f"in rounds, confidence {confidence:g}", chosen, float(cost), separated))
            results += [{"top_k": top_k} | row_of(worth, everything, *choice) for choice in choices]
        savings = [
            2 * self.samples * self.rounds / row["evaluations"]
            for row in results
            if row["separated"] is not None and row["points_lost"] <= WITHIN
        ]
        return Findings(results, {"times_fewer_within_a_point": Gate(max(savings, default=0.0), minimum=AIM)})

    @torch.inference_mode()
    def _pool(self) -> tuple[np.ndarray, list[list[torch.Tensor]], list[list[Probes]]]:
        """Per prompt: the metric of its candidates (P, N), their errors (N, 2, K) and the probes of every round."""
        texts = read_prompts(str(PROMPTS), field="prompts", limit=self.prompts)[0]["prompt"].to_pylist()
        keep_memory()
        denoiser = load_denoiser(self.model, self.dtype)
        metric = load_metrics([self.alignment])[self.alignment]
        sampler, column = Sampler(denoiser, self.sampler, self.batch_size), metric.columns[0]
        score = ScoreConfig(names=("pmi",), **SETTINGS["pmi"] | {"num_samples": self.samples})
        null = denoiser.encode_prompts([""])
        worth, errors, probes = [], [], []
        for text in tqdm(texts, unit="prompt"):
            conditioning = denoiser.encode_prompts([text])
            seeds = [[derived_seed(self.seed, text, c) for c in range(self.candidates)]]
            latents = sampler(conditioning, seeds, Work(), None, [text]).latents
            found = metric.measure(denoiser.decode(latents), [text] * self.candidates)[column.name]
            worth.append(column.sign * np.array(found, float))
            of_rounds = [
                draw_probes_of([text], score, derived_seed(self.seed, "round", number), denoiser)
                for number in range(self.rounds)
            ]
            prompt, both = torch.zeros(self.candidates, dtype=torch.long), pointwise.beside(conditioning, null)
            model = denoiser.predict_epsilon, denoiser.schedule, latents, prompt, *both
            errors.append([pointwise.denoising_errors(*model, p, 2 * self.batch_size).cpu() for p in of_rounds])
            probes.append(of_rounds)
        return np.array(worth), errors, probes


def row_of(
    worth: np.ndarray,
    everything: list[list[int]],
    choice: str,
    chosen: list[list[int]],
    evaluations: float,
    separated: float | None,
) -> dict:
    """A row of the table: the metric of the chosen images, and its loss against the choice with all samples."""
    mean, reference = (
        np.array([of_prompt[rows].mean() for of_prompt, rows in zip(worth, choices, strict=True)])
        for choices in (chosen, everything)
    )
    lost, half = lost_of(reference, mean)
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(everything, chosen, strict=True)]
    return {
        "choice": choice,
        "evaluations": evaluations,
        "percent": 100 * float(mean.mean()),
        "points_lost": float(lost),
        "half_interval": float(half),
        "same_choice": float(np.mean(same)),
        "separated": separated,
    }


def stored(
    errors: list[torch.Tensor], probes: list[Probes], number: int, rows: torch.Tensor
) -> tuple[torch.Tensor, Probes]:
    """What `choose` asks for, from the stored errors of all candidates."""
    return errors[number][rows], probes[number]


def fixed(errors: list[torch.Tensor], probes: list[Probes], top_k: int) -> list[int]:
    """The top_k candidates by pmi with all the noise samples of these rounds."""
    values = sum(pointwise.pmi(e[:, 0], e[:, 1], p).value for e, p in zip(errors, probes, strict=True))
    return values.topk(top_k).indices.tolist()


if __name__ == "__main__":
    main(SequentialBenchmark)
