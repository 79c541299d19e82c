"""Scores of flow models on a tiny Stable Diffusion 3: equal to the released code, refused where undefined."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_families import flux, stable_diffusion_3

from mi_ray.config import FLOW_SCORES, RunConfig, SamplerConfig, ScoreConfig
from mi_ray.config.section import ConfigError
from mi_ray.diffusion.denoisers import load_denoiser
from mi_ray.scoring.sampler import Sampler
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.suitability import check_pairs, check_suitability, distillation_warning
from mi_ray.scoring.work import Work

PROMPTS, SCALE, STEPS = ["a red circle", "a blue star"], 3.0, 8


def saved(build, folder: Path) -> str:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return saved(stable_diffusion_3, tmp_path_factory.mktemp("flow"))


@pytest.fixture
def denoiser(folder):
    return load_denoiser(folder, device="cpu")


def run_config(path, **sections) -> RunConfig:
    sampler = {"solver": "ddim", "num_inference_steps": STEPS, "guidance_scale": SCALE}
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "prompts": {"file": "unused"},
            "model": {"path": str(path), "height": 64, "width": 64},
            "sampler": sampler,
            **sections,
        }
    )


@torch.no_grad()
def test_scores_of_a_flow_are_the_sums_over_its_velocities(denoiser):
    """RFMI's released code for SD3: (1 - t) / t <v, v_c - v_u>, with v the conditional or the guided velocity."""
    names = (*FLOW_SCORES, "asd", "trajectory_banded", "pmi")
    config = ScoreConfig(names=names, banded="rfmi", log_snr_min=-2.0, log_snr_max=2.0, num_samples=4)
    calls, predict = [], denoiser.predict
    denoiser.predict = lambda x_t, t, c: calls.append((t[0].item() / 1000, predict(x_t, t, c))) or calls[-1][1]
    sampler_config = SamplerConfig(solver="ddim", num_inference_steps=STEPS, guidance_scale=SCALE)
    conditioning = denoiser.encode_prompts(PROMPTS)
    sampled = Sampler(denoiser, sampler_config, 8)(conditioning, [[1], [2]], Work())
    denoiser.predict = predict
    scorer = Scorer(denoiser, config, 8, 0, PROMPTS)
    columns = scorer(PROMPTS, conditioning, torch.arange(2), sampled, Work())

    assert len(calls) == STEPS
    plain, guided, banded, distance, unweighted = [], [], [], [], 0
    for t, velocity in calls:
        conditional, unconditional = velocity.double().flatten(1).chunk(2)
        delta = conditional - unconditional
        unweighted = unweighted + delta.square().sum(1)
        if 0.05 < t < 1:
            weight = (1 - t) / t
            followed = unconditional + SCALE * delta
            plain.append(weight * (conditional * delta).sum(1))
            guided.append(weight * (followed * (followed - unconditional)).sum(1))
            distance.append((t, weight * delta.square().sum(1)))
            inside = -2 <= 2 * torch.tensor((1 - t) / t).log() <= 2
            banded.append(plain[-1] * inside)
    assert len(plain) == STEPS - 2  # the first step is pure noise, and the last one has t below 0.05
    close = {"rtol": 1e-4, "atol": 1e-5}
    found = {name: torch.tensor(columns[f"score_{name}"], dtype=torch.float64) for name in names}
    torch.testing.assert_close(found["rfmi"], torch.stack(plain).mean(0), **close)
    torch.testing.assert_close(found["rfmi_guided"], torch.stack(guided).mean(0), **close)
    torch.testing.assert_close(found["trajectory_banded"], torch.stack(banded).mean(0), **close)
    torch.testing.assert_close(found["asd"], unweighted, **close)
    times = [t for t, _ in distance]
    edges = [1.0, *((a + b) / 2 for a, b in pairwise(times)), 0.05]
    integral = sum(value * (edges[i] - edges[i + 1]) for i, (_, value) in enumerate(distance))
    torch.testing.assert_close(found["flow_difference"], integral, **close)
    assert found["pmi"].isfinite().all()
    assert len({tuple(values.tolist()) for values in found.values()}) == len(names)


def test_scores_that_a_model_does_not_have_are_refused(folder, tiny_pipeline):
    with pytest.raises(ConfigError, match=r"mitune is not defined for a flow model; use rfmi") as error:
        check_suitability(run_config(folder))
    assert len(str(error.value).split("\n")) == 2  # mitune and mitune_eq2
    score, select = {"names": ["rfmi", "trajectory_banded"]}, {"by": "rfmi"}
    with pytest.raises(ConfigError, match="mitune is not defined for a flow model"):  # the default of score.banded
        check_suitability(run_config(folder, score=score, select=select))
    check_suitability(run_config(folder, score=score | {"banded": "rfmi"}, select=select))
    with pytest.raises(ConfigError, match=r"rfmi is not defined for a variance-preserving model; use mitune"):
        check_suitability(run_config(tiny_pipeline, score={"names": ["rfmi"]}, select=select))
    chosen = {"solver": "ddim", "num_inference_steps": STEPS, "guidance_scale": SCALE}
    chosen |= {"best_of": {"candidates": 2, "by": "mitune"}}
    for sections in ({"sampler": chosen}, {"evaluation": {"sampler": chosen}}):
        with pytest.raises(ConfigError, match=r"mitune is not defined for a flow model; use rfmi"):
            check_suitability(run_config(folder, score={"names": ["rfmi"]}, select=select, **sections))
    spaced = {"solver": "ddim", "num_inference_steps": STEPS, "guidance_scale": SCALE, "timestep_spacing": "leading"}
    with pytest.raises(ConfigError, match="timestep_spacing"):
        check_suitability(run_config(folder, score={"names": ["rfmi"]}, select=select, sampler=spaced))


def test_rewards_that_no_candidate_has_are_refused_before_the_start(tiny_pipeline):
    sections = {"score": {"names": ["mitune"]}, "select": {"by": "mitune"}, "finetune": {"method": "nft"}}
    with pytest.raises(ConfigError, match=r"^online\.rewards has 'mitun', but no candidate has this value: take one"):
        check_suitability(run_config(tiny_pipeline, online={"updates": 1, "rewards": ["mitun"]}, **sections))
    check_suitability(run_config(tiny_pipeline, online={"updates": 1, "rewards": ["mitune:2"]}, **sections))


def test_guidance_methods_that_a_family_does_not_have_are_refused(folder, tiny_pipeline):
    sampler = {"solver": "ddim", "num_inference_steps": STEPS, "guidance_scale": SCALE, "guidance_method": "semantic"}
    score, select = {"names": ["pmi"]}, {"by": "pmi"}
    check_suitability(run_config(tiny_pipeline, score=score, select=select, sampler=sampler))
    with pytest.raises(ConfigError, match=r"^sampler: guidance_method semantic .* is implemented only for"):
        check_suitability(run_config(folder, score=score, select=select, sampler=sampler))


def test_sampler_without_a_counted_step_is_refused(folder, tiny_pipeline):
    """Two steps of a flow are at t = 1 and t = 0.001, which RFMI drops: the mean over no step would be NaN."""
    few = {"solver": "ddim", "num_inference_steps": 2, "guidance_scale": SCALE}
    for names in (["rfmi", "flow_difference"], ["rfmi", "trajectory_banded"]):
        score, select = {"names": names, "banded": "rfmi"}, {"by": "rfmi"}
        with pytest.raises(ConfigError, match=r"rfmi does not count .* 2 leaves no other step") as error:
            check_suitability(run_config(folder, score=score, select=select, sampler=few))
        assert names[1] in str(error.value)
        check_suitability(run_config(folder, score=score, select=select, sampler=few | {"num_inference_steps": 3}))
    one = few | {"num_inference_steps": 1, "timestep_spacing": "leading"}
    with pytest.raises(ConfigError, match=r"mitune does not count .* 1 leaves no other step"):
        check_suitability(run_config(tiny_pipeline, score={"names": ["mitune"]}, select={"by": "mitune"}, sampler=one))


def test_a_distilled_model_is_warned_of_where_its_unconditional_prediction_counts(folder, tmp_path, caplog):
    path, select = saved(flux, tmp_path), {"by": "pmi_contrastive"}
    unguided = {"solver": "ddim", "num_inference_steps": STEPS, "guidance_scale": 1.0}
    config = run_config(path, score={"names": ["rfmi", "pmi_contrastive"]}, select=select)
    warning = distillation_warning(config)
    for word in ("FLUX.1 is distilled for its guidance", "score rfmi", "sampler.guidance_scale", "pmi_negatives"):
        assert word in warning
    assert "score pmi_contrastive" not in warning
    check_suitability(config)
    assert warning in caplog.text
    caplog.clear()
    check_pairs(path, (64, 64), config.score)
    assert "distilled" in caplog.text
    only = run_config(path, score={"names": ["pmi_contrastive"]}, select=select, sampler=unguided)
    assert distillation_warning(only) is None
    assert distillation_warning(run_config(folder, score={"names": ["rfmi"]}, select={"by": "rfmi"})) is None
