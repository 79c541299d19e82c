"""How other scores of the same candidates compare with the selection of their run."""

import numpy as np
import pandas as pd

from mi_ray.alignment.metric import Column
from mi_ray.report.statistics import PromptAverage, prompt_aucs


class Comparison:
    """For every score: how often its best candidate is that of the run, and the AUC within prompts for each metric."""

    def __init__(self, names: tuple[str, ...], truths: list[Column]):
        self.pools, self.same, self.truths = 0, dict.fromkeys(names, 0), truths
        self.aucs = {name: [PromptAverage() for _ in truths] for name in names}

    def add(self, candidates: pd.DataFrame):
        """Add the complete pools of new prompts, from all rounds."""
        pools = candidates.groupby(["round", "prompt_id"])
        chosen = candidates.loc[pools["rank"].idxmin(), "candidate_index"].to_numpy()
        self.pools += len(pools)
        for name, aucs in self.aucs.items():
            column = f"score_{name}"
            values = candidates[column].replace([np.inf, -np.inf], np.nan).fillna(-np.inf)
            first = candidates.assign(value=values).loc[lambda c: c.groupby(["round", "prompt_id"])["value"].idxmax()]
            self.same[name] += int((first["candidate_index"] == chosen).sum())
            for truth, average in zip(self.truths, aucs, strict=True):
                average.add(prompt_aucs(candidates, column, truth), "auc")

    def table(self) -> pd.DataFrame:
        rows = []
        for name, aucs in self.aucs.items():
            same = self.same[name] / self.pools if self.pools else None
            row = {"score": name, "prompts": self.pools, "same first choice": same}
            for truth, average in zip(self.truths, aucs, strict=True):
                row[f"AUC within prompts, {truth.name}"] = (average.result() or {"value": None})["value"]
            rows.append(row)
        return pd.DataFrame(rows)
