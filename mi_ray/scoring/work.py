"""The cost of an actor's work."""

import time
from dataclasses import dataclass, field


@dataclass
class Work:
    """Number of denoiser evaluations for sampling and for pointwise scores, number of times a batch was halved because
    it did not fit into memory, and seconds for each kind of work.
    """

    denoiser_evaluations: int = 0
    score_evaluations: int = 0
    batch_halvings: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, began: float):
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
