"""Variance of the estimators by probe design: python benchmarks/estimators.py [--model NAME] [--out FILE] [--check]"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from gates import Benchmark, Findings, Gate, main
from pydantic import Field, PositiveInt
from torch import Tensor

from mi_ray.config.paths import ModelPath
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.diffusion.schedules import NoiseSchedule
from mi_ray.information import pointwise
from mi_ray.information.closed_form import SCHEDULE, JointGaussian, LabelledMixture
from mi_ray.information.probes import Design, Probes, adaptive_logistic, draw_probes, effective_sample_size
from mi_ray.shapes.grammar import CATEGORIES, draw_scene, parse, sample_prompts
from mi_ray.shapes.scenes import render

BAND = (-10.0, 10.0)  # log SNR; contains nearly all of i_s of the closed forms
PILOT = 16  # number of probes of the pilot of the adaptive density
LONG = 512  # number of probes of the reference estimate for a model
SEED = 30_000


@dataclass(frozen=True)
class Case:
    """Image-prompt pairs whose i_s is estimated."""

    name: str
    predict_epsilon: pointwise.PredictEpsilon
    schedule: NoiseSchedule
    latents: Tensor  # (n, *latent_shape)
    prompts: Conditioning  # n rows
    null: Conditioning  # one row
    band: tuple[float, float]
    batch_size: int
    known: Tensor | None = None  # (n,) i_s of the band, in closed form

    def truth(self) -> tuple[Tensor, Tensor]:
        """The reference i_s of the band and its standard error, (n,) each: exact (error 0), or one long estimate."""
        if self.known is not None:
            return self.known, torch.zeros_like(self.known)
        seeds = [SEED - 1 - i for i in range(len(self.latents))]
        design = Design(levels="jittered", antithetic=True)
        probes = draw_probes(seeds, LONG, *self.band, self.latents.shape[1:], design, level_seed=SEED)
        return pointwise.integrate(self.gains(probes), probes)

    def gains(self, probes: Probes) -> Tensor:
        """The integrand of i_s, (n, K); the probes hold noise samples for each of the n pairs."""
        index = torch.arange(len(self.latents))
        branches = pointwise.beside(self.prompts, self.null)
        errors = pointwise.denoising_errors(
            self.predict_epsilon, self.schedule, self.latents, index, *branches, probes, self.batch_size
        )
        return 0.5 * (errors[:, 1] - errors[:, 0])

    def adaptive(self) -> Design:
        """MMG's logistic density, with location and scale from a pilot."""
        seeds = [SEED + i for i in range(len(self.latents))]
        probes = draw_probes(seeds, PILOT, *self.band, self.latents.shape[1:])
        index = torch.arange(len(self.latents))
        errors = pointwise.denoising_errors(
            self.predict_epsilon,
            self.schedule,
            self.latents,
            index,
            self.prompts,
            index[:, None],
            probes,
            self.batch_size,
        )
        loc, scale = adaptive_logistic(errors[:, 0], probes.log_snr, self.latents[0].numel())
        return Design(loc=loc, scale=scale, levels="random")


class EstimatorsBenchmark(Benchmark):
    """How does the choice of log SNRs and noise samples change the variance of the signed pointwise mutual information
    per denoiser evaluation?"""

    model: ModelPath | None = Field(
        None, description="a model instead of the closed forms: the embedded model (shapes) or a folder"
    )
    pairs: PositiveInt = Field(8, description="number of image-prompt pairs")
    replicates: PositiveInt = Field(100, description="number of independent estimates per pair, for the variance")
    num_samples: PositiveInt = Field(16, description="number of probes per estimate; each takes two evaluations")

    def answer(self) -> Findings:
        if self.num_samples < 8 or self.num_samples % 2:
            raise ValueError(f"num_samples: {self.num_samples} is invalid; give an even number of at least 8")
        if self.replicates < 2:
            raise ValueError(f"replicates: {self.replicates} is too few for a variance; give two or more")
        pairs, replicates = (2, 20) if self.smoke else (self.pairs, self.replicates)
        cases = [of_model(self.model, pairs)] if self.model else closed_forms(pairs)
        rows, gates = [], {}
        for case in cases:
            truth = case.truth()
            of_case = [
                {"world": case.name, "probes": name, **measure(case, truth, design, self.num_samples, replicates)}
                for name, design in designs(case).items()
            ]
            uniform = of_case[0]["variance x evaluations"]
            for row in of_case:
                row["times uniform's"] = row["variance x evaluations"] / uniform
            rows += of_case
            if not self.model:
                for name in ("logistic", "adaptive"):
                    (ratio,) = (row["times uniform's"] for row in of_case if row["probes"] == name)
                    gates[f"{case.name}: {name} / uniform"] = Gate(ratio, maximum=1.0)
                unbiased = [row["bias / error"] for row in of_case if "midpoints" not in row["probes"]]
                gates[f"{case.name}: bias / error"] = Gate(max(unbiased), maximum=4.0)
        return Findings(rows, gates)


def designs(case: Case) -> dict[str, Design]:
    """The designs to compare; the first is uniform with independent samples."""
    published = Design(loc=1.0, scale=2.0, levels="random")  # ITD, arXiv 2310.07972, of SD2.1
    densities = {"uniform": Design(levels="random"), "logistic": published, "adaptive": case.adaptive()}
    chosen = {}
    for name, density in densities.items():
        for levels in ("random", "midpoints", "jittered"):
            for antithetic in (False, True):
                parts = [name, *([levels] if levels != "random" else []), *(["antithetic"] if antithetic else [])]
                chosen[" + ".join(parts)] = Design(density.loc, density.scale, levels, antithetic)
    return chosen


def measure(
    case: Case, truth: tuple[Tensor, Tensor], design: Design, num_samples: int, replicates: int
) -> dict[str, float]:
    """Compare the estimates of a design with the reference values.

    Returns:
        Means over pairs: the variance over replicates and the squared error, both times evaluations; the estimated
        standard error over the true one; the bias in units of its standard error.
    """
    count, found = len(case.latents), []
    for replicate in range(replicates):
        seeds = [SEED + replicate * count + i for i in range(count)]
        probes = draw_probes(seeds, num_samples, *case.band, case.latents.shape[1:], design, level_seed=replicate)
        found.append(torch.stack(pointwise.integrate(case.gains(probes), probes)))
    value, claimed = torch.stack(found, 1).double()
    variance = value.var(0)
    bias = (value.mean(0) - truth[0]) / (variance / replicates + truth[1].square()).sqrt()
    return {
        "variance x evaluations": (variance.mean() * 2 * num_samples).item(),
        "squared error x evaluations": ((value - truth[0]).square().mean() * 2 * num_samples).item(),
        "claimed / true error": (claimed.square().mean() / variance.mean()).sqrt().item(),
        "effective samples": effective_sample_size(probes.weight),
        "bias / error": bias.square().mean().sqrt().item(),
    }


# ------------------------------------------------------------------------------------------ worlds
def closed_forms(pairs: int) -> list[Case]:
    cases = []
    for dim, correlation in ((2, 0.9), (16, 0.6), (64, 0.3)):
        world = JointGaussian(dim, correlation)
        x, prompts = world.draw(pairs)
        truth = world.pmi(x, prompts, *BAND)
        name = f"gaussian d={dim} rho={correlation}"
        cases.append(Case(name, world.predict_epsilon, SCHEDULE, x, prompts, world.null, BAND, 2**14, truth))
    world = LabelledMixture(4, 16, 0.5)
    x = torch.cat([world.draw(label % 4, 1, seed=label) for label in range(pairs)])
    labels = world.embed(*(label % 4 for label in range(pairs)))
    truth = torch.cat([world.pmi(x[[i]], i % 4) for i in range(pairs)])
    case = Case("mixture of 4, d=16", world.predict_epsilon, SCHEDULE, x, labels, world.null, BAND, 2**14, truth)
    return [*cases, case]


def of_model(path: str, pairs: int) -> Case:
    """Rendered images of the embedded world with their own prompts, over all log SNRs of the model's schedule."""
    try:
        denoiser = load_denoiser(path)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    rng = np.random.default_rng(SEED)
    texts = [sample_prompts(CATEGORIES[i % len(CATEGORIES)], "test", 1, rng)[0] for i in range(pairs)]
    images = np.stack([render(draw_scene(parse(text), rng)) for text in texts])
    prompts, null = denoiser.encode_prompts(texts), denoiser.encode_prompts([""])
    log_snr = denoiser.schedule.log_snr
    band = math.ceil(10 * log_snr[-1].item()) / 10, math.floor(10 * log_snr[0].item()) / 10
    latents = denoiser.encode_images(images)
    return Case(path, denoiser.predict_epsilon, denoiser.schedule, latents, prompts, null, band, 128)


if __name__ == "__main__":
    main(EstimatorsBenchmark)
