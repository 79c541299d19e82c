"""The report on the candidates. Tables are read part by part, so memory does not grow with their number."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mi_ray.alignment.metric import Column
from mi_ray.report.columns import label
from mi_ray.report.statistics import PromptAverage, prompt_aucs, prompt_correlations, within_prompt_auc
from mi_ray.storage import ParquetRows, join, list_names, list_tables, read_table
from mi_ray.storage.tables import metric_columns

SAMPLED = 20_000  # smallest number of candidates in the distributions of scores, if there are as many
MAX_ERRORS = 1000  # number of different errors that are listed; further ones are counted by stage
VALIDATION = "validation-"  # prefix of the parts of an online run that are validations, not used for training
FURTHER_ERRORS = "further error rows: see the column `error` of the tables"


def numeric(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The frame with these columns as floats, infinities as NaN."""
    frame[columns] = frame[columns].astype(np.float64).replace([np.inf, -np.inf], np.nan)
    return frame


def round_numbers(run_dir: str) -> list[int]:
    numbers = [name.removeprefix("round-") for name in list_names(run_dir) if name.startswith("round-")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def present(results: dict) -> dict:
    return {name: result for name, result in results.items() if result is not None}


def count_error(errors: Counter, prompt: str, stage: str, message: str, count: int = 1):
    """Add to the counts of (prompt, stage, message)."""
    key = (prompt, stage, message)
    errors[key if key in errors or len(errors) < MAX_ERRORS else ("", stage, FURTHER_ERRORS)] += count


class Selection:
    """For the first column of each metric: the AUC and the rank correlation of each score and of each other metric,
    and the means of all and of the kept candidates."""

    def __init__(self, score_names: tuple[str, ...], truths: list[Column]):
        self.truths = truths
        self.columns = {truth.name: {n: f"score_{n}" for n in score_names} for truth in truths}  # {name: column}
        for truth in truths:
            self.columns[truth.name] |= {label(other): other.name for other in truths if other != truth}
        self.signs = {truth.name: truth.sign for truth in truths}
        self.aucs, self.correlations = (
            {truth: {name: PromptAverage() for name in names} for truth, names in self.columns.items()}
            for _ in range(2)
        )
        self.means = {f"{part}_{truth.name}": PromptAverage() for truth in truths for part in ("pool", "kept")}

    def add(self, candidates: pd.DataFrame):
        """Add the complete pools of new prompts, from all rounds."""
        kept = candidates[candidates["kept"].eq(True)]
        for truth in self.truths:
            for name, column in self.columns[truth.name].items():
                judged = candidates.assign(judged=self.signs.get(column, 1) * candidates[column])
                self.aucs[truth.name][name].add(prompt_aucs(judged, "judged", truth), "auc")
                self.correlations[truth.name][name].add(prompt_correlations(judged, "judged", truth), "correlation")
            self.means[f"pool_{truth.name}"].add(candidates, truth.name)
            self.means[f"kept_{truth.name}"].add(kept, truth.name)

    def result(self) -> dict:
        """{auc and correlation: {column: {score: result}}, pool_<column>, kept_<column>}; keys without a value are
        left out."""
        found: dict[str, dict] = {}
        for kind, averages in (("auc", self.aucs), ("correlation", self.correlations)):
            by_truth = {
                truth: present({name: within_prompt_auc(average) for name, average in of_truth.items()})
                for truth, of_truth in averages.items()
            }
            found[kind] = {truth: of_truth for truth, of_truth in by_truth.items() if of_truth}
        return found | present({name: average.result() for name, average in self.means.items()})


class Thinned:
    """A random sample of rows that are added frame by frame. If it exceeds twice `SAMPLED` rows, the share of sampled
    rows is halved."""

    def __init__(self):
        self.share, self.lots, self.rows = 1.0, np.random.default_rng(0), pd.DataFrame()

    def add(self, frame: pd.DataFrame):
        frame = frame.assign(lot=self.lots.random(len(frame)))
        frame = frame[frame["lot"] < self.share]
        self.rows = pd.concat([self.rows, frame], ignore_index=True) if len(self.rows) else frame
        while len(self.rows) > 2 * SAMPLED:
            self.share /= 2
            self.rows = self.rows[self.rows["lot"] < self.share]


@dataclass
class Pools:
    """Results of all rounds together; `selection` also has those of each round."""

    prompts: int = 0
    metrics: dict[str, tuple[Column, ...]] = field(default_factory=dict)  # metrics of the candidates
    selection: dict = field(default_factory=dict)
    distributions: dict = field(default_factory=dict)
    errors: Counter = field(default_factory=Counter)


def read_pools(run_dir: str, score_names: tuple[str, ...]) -> Pools:
    """The results of a run's candidates.

    All candidates of a prompt in a round are in one part, and this part has the same name in every round. A part is
    read from all rounds together, because values are averaged over the rounds of a prompt first. An online run has the
    candidates of all updates, without the validations; a prompt counts once for each update that uses it.
    """
    scores = [f"score_{name}" for name in score_names]
    folders = {number: join(run_dir, f"round-{number}", "candidates") for number in round_numbers(run_dir)}
    folders = folders or {0: join(run_dir, "online", "candidates")}
    names = {
        number: {name for name in list_tables(folder) if not name.startswith(VALIDATION)}
        for number, folder in folders.items()
    }
    metrics = next((declared_in(folder) for number, folder in folders.items() if names[number]), {})
    truths = [declared[0] for declared in metrics.values()]
    measured = [truth.name for truth in truths]
    columns = ["prompt_id", "prompt", *scores, *measured, "kept", "error"]
    pools, whole, thinned = Pools(metrics=metrics), Selection(score_names, truths), Thinned()
    by_round = {number: Selection(score_names, truths) for number in folders}
    sound_rounds: set[int] = set()
    for part in sorted(set().union(*names.values())):
        frames = [
            numeric(read_table(join(folder, part), columns).to_pandas(), [*scores, *measured]).assign(round=number)
            for number, folder in folders.items()
            if part in names[number]
        ]
        candidates = pd.concat(frames, ignore_index=True)
        pools.prompts += candidates["prompt_id"].nunique()
        for row in candidates[candidates["error"].notna()].itertuples():
            count_error(pools.errors, row.prompt, "generate", row.error)
        sound = candidates[candidates["error"].isna()]
        whole.add(sound)
        sound_rounds |= set(sound["round"])
        if len(folders) > 1:
            for number, of_round in sound.groupby("round"):
                by_round[number].add(of_round)
        level = sound.groupby(["round", "prompt_id"])[[*scores, *measured]].transform("mean")
        thinned.add((sound[scores] - level[scores]).assign(good=_good(sound, level, truths)))
    pools.selection = {**whole.result(), "rounds": len(sound_rounds)}
    if len(sound_rounds) > 1:
        pools.selection["by_round"] = [by_round[number].result() for number in sorted(sound_rounds)]
    if pools.prompts:
        pools.distributions = present({name: distribution(thinned.rows, name, *truths[:1]) for name in score_names})
    return pools


def declared_in(folder: str) -> dict[str, tuple[Column, ...]]:
    """The metrics of the tables in a folder, from the schema of the first table. Empty if there is no table."""
    return next((metric_columns(ParquetRows(join(folder, name)).schema) for name in list_tables(folder)), {})


def _good(candidates: pd.DataFrame, level: pd.DataFrame, truths: list[Column]) -> pd.Series:
    """1 if a candidate is good by the first metric, 0 if not, NaN if the value is missing.

    A yes/no metric is used directly. For other metrics a candidate is good if it is better than its prompt's mean.

    Args:
        level: the mean over the candidate's prompt and round, with the rows of `candidates`.
    """
    if not truths:
        return pd.Series(np.nan, candidates.index)
    truth, values = truths[0], candidates[truths[0].name]
    good = values == 1 if truth.unit == "yes/no" else truth.sign * (values - level[truth.name]) > 0
    return good.astype(float).where(values.notna())


def distribution(centred: pd.DataFrame, name: str, truth: Column | None = None) -> dict | None:
    """The histogram of a score minus its prompt's mean: {edges: (n + 1,), group: counts (n,)}. None without values.

    The groups are the good and the other candidates, or all if no metric measured them. The prompt's mean is subtracted
    because candidates are selected within a prompt.
    """
    values = centred[f"score_{name}"].dropna()
    if values.empty:
        return None
    low, high = np.percentile(values, [0.5, 99.5])
    bins = int(np.clip(np.sqrt(len(values)), 12, 40))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    good = centred["good"][values.index]
    if truth is None or good.isna().all():
        groups = {"all": good.isna()}
    elif truth.unit == "yes/no":
        groups = {label(truth): good == 1, f"not {label(truth)}": good == 0}
    else:
        groups = {f"better by {label(truth)}": good == 1, f"worse by {label(truth)}": good == 0}
    values = values.clip(edges[0], edges[-1])
    counts = {group: np.histogram(values[chosen], edges)[0].tolist() for group, chosen in groups.items()}
    return {"edges": edges.tolist(), **counts}
