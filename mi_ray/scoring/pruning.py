"""Successive halving of the pool while it is sampled: what scores low on the way is not sampled to the end."""

import numpy as np
import torch
from torch import Tensor

from mi_ray.config import RunConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.scoring.sampler import Pool
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work


def cut_scorer(config: RunConfig, scorer: Scorer, pool: list[str]) -> Scorer:
    """The scorer of the cuts: as `scorer`, but by the one score and with the number of noise draws of the cuts."""
    names = {"names": (config.prune.by,), "num_samples": config.prune.num_samples}
    return Scorer(scorer.denoiser, config.score.model_copy(update=names), scorer.batch_size, config.seed, pool)


class Halving:
    """The cuts of the pools of P prompts, each of as many candidates. A candidate's fate depends on nothing but its
    own prompt's pool: not on batches, nor on the other prompts.

    Args:
        counts: {after so many steps: how many of a prompt's candidates go on}, as `PruneConfig.cuts` gives.
        carried: (N,) bool, candidates that go to the end whatever their scores, beside those that win their place: a
            control's, which must not depend on any score.
    """

    def __init__(
        self,
        counts: dict[int, int],
        scorer: Scorer,
        prompts: list[str],
        conditioning: Conditioning,
        carried: np.ndarray,
        work: Work,
    ):
        self.after, self._counts = tuple(counts), counts
        self._scorer, self._prompts, self._conditioning, self._work = scorer, prompts, conditioning, work
        self._carried = torch.from_numpy(carried)
        self.pruned_after = np.zeros(len(carried), np.int64)  # number of steps; 0: it was not
        self.scores = np.full(len(carried), np.nan)  # at the last cut that it faced

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        """Which of the candidates `rows` go on: the best of each prompt's, and the carried."""
        running = torch.from_numpy(self.pruned_after == 0)
        racing = rows[running[rows]]
        sampled = pool.so_far(racing, steps)
        columns = self._scorer(self._prompts, self._conditioning, pool.owner[racing], sampled, self._work)
        (by,) = self._scorer.config.names
        self.scores[racing.numpy()] = columns[f"score_{by}"]
        for prompt in range(len(self._prompts)):
            of_prompt = racing[pool.owner[racing] == prompt].numpy()
            worth = np.nan_to_num(self.scores[of_prompt], nan=-np.inf, posinf=-np.inf)
            order = np.argsort(-worth, kind="stable")
            self.pruned_after[of_prompt[order[self._counts[steps] :]]] = steps
        running = torch.from_numpy(self.pruned_after == 0)
        return rows[running[rows] | self._carried[rows]]

    @property
    def finished(self) -> np.ndarray:
        """(N,) bool: what was sampled to the end."""
        return (self.pruned_after == 0) | self._carried.numpy()

    def steps_done(self, whole: int) -> list[int]:
        """How many of the whole way's steps each candidate did."""
        return np.where(self.finished, whole, self.pruned_after).tolist()

    def columns(self) -> dict[str, list]:
        """pruned_after and prune_score, as the table of candidates holds them."""
        return {
            "pruned_after": [steps or None for steps in self.pruned_after.tolist()],
            "prune_score": self.scores.tolist(),
        }
