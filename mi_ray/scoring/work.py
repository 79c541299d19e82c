"""What an actor's work costs."""

import time
from dataclasses import dataclass, field


@dataclass
class Work:
    """What was spent: denoiser evaluations of sampling and of pointwise scores, seconds inside each; and how often a
    batch did not fit into memory and was halved.
    """

    denoiser_evaluations: int = 0
    score_evaluations: int = 0
    batch_halvings: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, began: float):
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
