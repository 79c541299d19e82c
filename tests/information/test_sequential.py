"""Sequential choice from a pool: correct with the given confidence, with fewer evaluations in easy cases."""

import pytest
import torch

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.information.closed_form import SCHEDULE, JointGaussian
from mi_ray.information.pointwise import denoising_errors
from mi_ray.information.probes import Design, draw_probes
from mi_ray.information.sequential import choose

BAND = (-8.0, 8.0)
WORLD = JointGaussian(16, 0.6)
DESIGN = Design(loc=0.7, scale=1.5, levels="jittered", antithetic=True)
PER_ROUND, MOST = 16, 8


def pool_of(count: int, seed: int, spread: float = 1.0):
    """Candidates near one image, their branches, and their true scores in the band."""
    x, prompts = WORLD.draw(1, seed)
    x = x + spread * torch.randn(count, WORLD.dim, generator=torch.Generator().manual_seed(seed))
    branches = Conditioning.cat([prompts, WORLD.null])
    return x, branches, WORLD.pmi(x, prompts.expand(count), *BAND)


def chosen_from(x, branches, top_k, confidence=0.95, seed=0, max_rounds=MOST):
    def evaluate(number, rows):
        of_round = 1000 * seed + number
        probes = draw_probes([of_round], PER_ROUND, *BAND, (WORLD.dim,), DESIGN, level_seed=of_round)
        prompt, both = torch.zeros(len(rows), dtype=torch.long), torch.tensor([[0, 1]])
        return denoising_errors(WORLD.predict_epsilon, SCHEDULE, x[rows], prompt, branches, both, probes, 1024), probes

    return choose(evaluate, len(x), top_k, confidence, max_rounds)


def test_choice_reaches_its_confidence_with_fewer_evaluations():
    """Over 60 pools: separated choices are correct, with fewer evaluations than all rounds for all candidates."""
    claimed, wrong, spent, all_of_it = 0, 0, 0, 0
    for seed in range(60):
        x, branches, truth = pool_of(10, seed)
        choice = chosen_from(x, branches, 2, seed=seed)
        spent += choice.evaluations
        all_of_it += 10 * 2 * PER_ROUND * MOST
        if choice.separated:
            claimed += 1
            wrong += set(choice.chosen.tolist()) != set(truth.topk(2).indices.tolist())
    assert claimed >= 20
    assert wrong <= 0.05 * claimed + 1
    assert spent < 0.7 * all_of_it


def test_clear_pool_needs_one_round():
    x, branches, truth = pool_of(6, 1, spread=12.0)
    choice = chosen_from(x, branches, 3)
    assert choice.separated
    assert choice.chosen.tolist() == truth.topk(3).indices.tolist()
    assert choice.rounds.max() <= 2
    torch.testing.assert_close(choice.evaluations, int(2 * PER_ROUND * choice.rounds.sum()))
    assert ((choice.value - truth).abs() < 5 * choice.standard_error + 1).all()


def test_equal_candidates_need_all_rounds():
    x, branches, _ = pool_of(1, 2)
    choice = chosen_from(x.expand(4, -1), branches, 1)
    assert not choice.separated
    assert len(choice.chosen) == 1
    assert (choice.rounds == MOST).all()
    assert choice.evaluations == 4 * 2 * PER_ROUND * MOST


def test_bad_candidates_are_not_evaluated_again():
    x, branches, _ = pool_of(1, 3)
    pool = torch.cat([x, x, x + 3, x - 3])
    choice = chosen_from(pool, branches, 1)
    assert not choice.separated
    assert choice.rounds[:2].tolist() == [MOST, MOST]
    assert (choice.rounds[2:] < MOST).all()
    assert choice.chosen.item() in (0, 1)


def test_more_rounds_tighten_the_standard_errors():
    squared = {1: 0.0, 4: 0.0}
    for seed in range(12):
        x, branches, _ = pool_of(1, seed)
        for rounds in squared:
            choice = chosen_from(x.expand(2, -1), branches, 1, seed=seed, max_rounds=rounds)
            squared[rounds] += choice.standard_error[0].square().item()
    assert squared[4] == pytest.approx(squared[1] / 4, rel=0.5)


@pytest.mark.parametrize("top_k", [0, 4, 5])
def test_top_k_of_the_whole_pool_is_refused(top_k):
    x, branches, _ = pool_of(4, 0)
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        chosen_from(x, branches, top_k)
