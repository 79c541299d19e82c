"""Successive halving of the pool during sampling: candidates with low intermediate scores are sampled no further."""

import numpy as np
import torch
from torch import Tensor

from mi_ray.config import RunConfig
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.scoring.sampler import Pool
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work


def cut_scorer(config: RunConfig, scorer: Scorer, pool: list[str]) -> Scorer:
    """The scorer of the cuts: as `scorer`, with the single score and the number of noise samples of `config.prune`."""
    names = {"names": (config.prune.by,), "num_samples": config.prune.num_samples}
    return Scorer(scorer.denoiser, config.score.model_copy(update=names), scorer.batch_size, config.seed, pool)


class Halving:
    """The cuts of the pools of P prompts, which all have the same number of candidates.

    Whether a candidate is pruned depends only on the pool of its own prompt, not on batches or other prompts.

    Args:
        counts: {number of steps: number of candidates of each prompt that continue}, from `PruneConfig.cuts`.
        carried: (N,) bool, candidates that are always sampled to the end, in addition to those that survive the cuts:
            the candidates of a control selection, which must not depend on a score.
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
        self.pruned_after = np.zeros(len(carried), np.int64)  # number of steps; 0: not pruned
        self.scores = np.full(len(carried), np.nan)  # score at the candidate's last cut

    def survivors(self, pool: Pool, rows: Tensor, steps: int) -> Tensor:
        """The candidates among `rows` that continue: the best of each prompt, and the carried ones."""
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
        """(N,) bool: the candidates that were sampled to the end."""
        return (self.pruned_after == 0) | self._carried.numpy()

    def steps_done(self, whole: int) -> list[int]:
        """Number of sampling steps of each candidate, out of `whole`."""
        return np.where(self.finished, whole, self.pruned_after).tolist()

    def columns(self) -> dict[str, list]:
        """The columns pruned_after and prune_score of the table of candidates."""
        return {
            "pruned_after": [steps or None for steps in self.pruned_after.tolist()],
            "prune_score": self.scores.tolist(),
        }
