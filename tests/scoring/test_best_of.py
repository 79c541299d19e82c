"""Best-of-N: the candidate with the best score, with and without pruning, and its cost."""

import pytest
import torch
from pydantic import ValidationError

from mi_ray.config import RunConfig
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.runs.cost import evaluations
from mi_ray.scoring.best_of import evaluation_samplers, sampler_of
from mi_ray.scoring.sampler import Sampler, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

PROMPTS = ["a red circle and a blue square", "a green star"]
SEEDS = [[1, 2], [3]]


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline):
    return load_denoiser(str(tiny_pipeline), device="cpu")


def config_for(folder, best_of=None, **sections) -> RunConfig:
    sampler = {"solver": "ddim", "num_inference_steps": 4, "guidance_scale": 3.0, "best_of": best_of or {}}
    least = {"run_dir": "unused", "prompts": {"file": "unused"}, "model": {"path": str(folder)}}
    score = {"names": ["pmi"], "num_samples": 2, "max_negatives": 2}
    rest = {"score": score, "select": {"by": "pmi"}, "sampler": sampler}
    return RunConfig.model_validate(least | rest | {"evaluation": {"sampler": sampler}} | sections)


@pytest.mark.parametrize("by", ["pmi", "pmi_negatives", "asd"])
def test_the_candidate_with_the_highest_score_is_used(denoiser, tiny_pipeline, by):
    config = config_for(tiny_pipeline, {"candidates": 3, "by": by})
    conditioning, work = denoiser.encode_prompts(PROMPTS), Work()
    best = sampler_of(config, config.sampler, denoiser, denoiser, 8)(conditioning, SEEDS, work, prompts=PROMPTS)
    pools = [[seed, derived_seed(seed, "best of", 1), derived_seed(seed, "best of", 2)] for seed in (1, 2, 3)]
    owner = [0, 0, 1]
    plain = Sampler(denoiser, config.sampler, 8)
    scorer = Scorer(denoiser, config.score.model_copy(update={"names": (by,)}), 8, config.seed, [])
    for image, (prompt, pool) in enumerate(zip(owner, pools, strict=True)):
        texts, one = [PROMPTS[prompt]], conditioning.rows(torch.tensor([prompt]))
        alone = plain(one, [pool], Work())
        scores = scorer(texts, one, torch.zeros(3, dtype=torch.long), alone, Work())[f"score_{by}"]
        winner = torch.tensor(scores).argmax()
        torch.testing.assert_close(best.latents[image], alone.latents[winner], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(best.delta_sq[image], alone.delta_sq[winner], rtol=1e-3, atol=1e-3)
    assert work.denoiser_evaluations == 3 * 3 * 4 * 2


def test_a_pruned_pool_costs_less(denoiser, tiny_pipeline):
    prune = {"by": "asd", "after": [0.5], "keep": [0.34]}
    config = config_for(tiny_pipeline, {"candidates": 6, "by": "pmi", "prune": prune})
    conditioning, work = denoiser.encode_prompts(PROMPTS), Work()
    sampler = evaluation_samplers(config, denoiser, denoiser, 8)[3.0]
    best = sampler(conditioning, SEEDS, work, prompts=PROMPTS)
    assert best.latents.shape[0] == 3
    assert best.delta_sq.isfinite().all()
    assert work.denoiser_evaluations == 3 * 2 * (6 * 2 + 3 * 2)
    assert work.score_evaluations == 3 * 3 * 2 * 2  # pmi of three survivors, two noise samples, two branches
    each = config.evaluation.images_per_prompt
    judged = 2 * config.score.num_samples
    per_image = (work.denoiser_evaluations + work.score_evaluations) // 3
    assert evaluations(config, 0, 5)["evaluate"] == 5 * each * 2 * (per_image + judged)


def test_without_best_of_the_sampler_is_the_plain_one(denoiser, tiny_pipeline):
    config = config_for(tiny_pipeline)
    assert type(sampler_of(config, config.sampler, denoiser, denoiser, 8)) is Sampler


def test_recorded_scores_need_both_branches_at_every_scale(tiny_pipeline):
    sampler = {"guidance_scale": 3.0, "best_of": {"candidates": 4, "by": "asd"}}
    with pytest.raises(ValidationError, match=r"evaluation\.sampler\.guidance_scale is 1, but asd needs both branches"):
        config_for(tiny_pipeline, evaluation={"sampler": sampler, "guidance_scales": [1]})


def test_wrong_settings_are_refused(tiny_pipeline):
    on = {"candidates": 4}
    for best_of, sections, message in (
        ({"candidates": 4, "by": "pmi_contrastive"}, {}, "use pmi_negatives"),
        ({"prune": {"by": "asd"}}, {}, "candidates is none"),
        (on, {"prune": {"by": "asd"}}, "cut by one of them only"),
        (on, {"online": {"updates": 1}, "finetune": {"method": "nft"}}, "learns from all its candidates"),
    ):
        with pytest.raises(ValidationError, match=message):
            config_for(tiny_pipeline, best_of, **sections)
