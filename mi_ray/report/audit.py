"""The audit page of scored pairs: the number of contradicted captions, their attributes, the worst and best pairs."""

import base64
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc
import yaml

from mi_ray.report.columns import decimal
from mi_ray.report.figures import BAD, COLORS, GOOD, INK, data_uri, styled_figure
from mi_ray.report.page import number, page_environment
from mi_ray.storage import join, read_table, write_bytes, write_json
from mi_ray.storage.tables import SCORED

SHOWN_ERRORS = 50
_PLAIN = [name for name in SCORED.names if name != "image"]


# ---------------------------------------------------------------------------------------------- numbers
def summarise_pairs(folder: str, names: list[str], rank_by: str, shown: int) -> tuple[dict, dict[str, list]]:
    """Summarise all parts of a folder, read one after the other.

    Args:
        names: names of the parts.
        shown: largest number of worst and of best pairs.

    Returns:
        The content of audit.json, and {"worst", "best"}: rows with images, in order.
    """
    column = f"score_{rank_by}"
    counts = {"scored": 0, "errors": 0, "contradicted": 0, "unjudged": 0}
    attributes, errors, remarks, values = Counter(), {}, {}, []
    worst, best = [], []
    for place, name in enumerate(names):
        table = read_table(join(folder, name), _PLAIN)
        for row in table.filter(pc.is_valid(table["error"])).select(["key", "prompt", "error"]).to_pylist():
            _count(errors, row, "error")
        for row in table.filter(pc.is_valid(table["remark"])).select(["key", "remark"]).to_pylist():
            _count(remarks, row, "remark")
        sound = table.filter(pc.is_null(table["error"]))
        counts["errors"] += len(table) - len(sound)
        counts["scored"] += len(sound)
        counts["unjudged"] += sound["posterior"].null_count
        contradicted = [name for name in sound["contradicted_attribute"].to_pylist() if name is not None]
        attributes.update(contradicted)
        counts["contradicted"] += len(contradicted)
        scores = sound[column].to_numpy(zero_copy_only=False).astype(np.float64)
        values.append(scores[np.isfinite(scores)])
        ends = [(score, place, row) for row, score in enumerate(scores) if np.isfinite(score)]
        worst = heapq.nsmallest(shown, worst + ends)
        best = heapq.nlargest(shown, best + ends)
    values = np.concatenate(values) if values else np.empty(0)
    reasons, remarks = (sorted(kinds.values(), key=lambda kind: -kind["count"]) for kinds in (errors, remarks))
    summary = {**counts, "rank_by": rank_by, "attributes": dict(attributes.most_common()), "reasons": reasons}
    summary["remarks"] = remarks
    summary["quantiles"] = {str(q): float(np.percentile(values, q)) for q in (5, 25, 50, 75, 95)} if len(values) else {}
    both = min(shown, -(-len(values) // 2))  # no pair is shown among the worst and the best
    ends = {"worst": worst[:both], "best": best[: min(shown, len(values) // 2)]}
    return summary | {"histogram": _histogram(values)}, {
        end: list(_rows(folder, names, places)) for end, places in ends.items()
    }


def _count(kinds: dict[str, dict], row: dict, column: str):
    """Count a row with those of the same kind of message; the first of a kind is kept."""
    known = kinds.setdefault(_kind_of_message(row[column]), {"count": 0, **row})
    known["count"] += 1


def _kind_of_message(message: str) -> str:
    """The message without numbers and without the text after a colon, so that similar messages are counted together."""
    return "".join(" " if c.isdigit() else c for c in message.partition(": ")[0])[:60]


def _rows(folder: str, names: list[str], places: list[tuple[float, int, int]]) -> Iterator[dict]:
    """The rows at these (score, part, row) places, in the same order. Each part is opened once."""
    found = {}
    for part in sorted({place for _, place, _ in places}):
        wanted = sorted(row for _, place, row in places if place == part)
        table = read_table(join(folder, names[part]))
        sound = table.filter(pc.is_null(table["error"]))
        found |= {(part, row): values for row, values in zip(wanted, sound.take(wanted).to_pylist(), strict=True)}
    return (found[part, row] for _, part, row in places)


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    if not len(values):
        return {"edges": [], "counts": []}
    low, high = np.percentile(values, [0.5, 99.5])
    width = ((high - low) or 1) / int(np.clip(np.sqrt(len(values)), 8, 60))
    edges = width * np.arange(np.floor(low / width), np.floor(high / width) + 2)  # zero is an edge if it is inside
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def verdict_lines(row: dict) -> list[str]:
    """The scores of a single pair, and what its image contradicts, for the terminal."""

    def nats(value: float, error: float | None) -> str:
        return f"{decimal(value)} ± {decimal(error)} nats"

    lines = [f"pmi            {nats(row['score_pmi'], row['score_pmi_se'])}"]
    if row["posterior"] is None:
        return [*lines, "pmi_negatives  none: no hard negative can be made from this prompt"]
    lines.append(f"pmi_negatives  {nats(row['score_pmi_negatives'], row['score_pmi_negatives_se'])}")
    if row["contradicted"] is None:
        return [*lines, f"contradicts    no clear contradiction (posterior of the prompt {row['posterior']:.2f})"]
    instead = f"the image shows {row['instead']!r}" if row["instead"] else "it is missing in the image"
    shown = f"{row['contradicted']!r}: {instead} (posterior {row['instead_posterior']:.2f})"
    return [*lines, f"contradicts    {shown}"]


# ---------------------------------------------------------------------------------------------- figures
def _histogram_plot(histogram: dict[str, list[float]], rank_by: str) -> str:
    edges, counts = np.array(histogram["edges"]), histogram["counts"]
    colors = [COLORS["tuned"]] * len(counts)
    if rank_by != "pmi":  # above zero, the caption is likelier than its alternatives
        colors = [GOOD if left + right > 0 else BAD for left, right in pairwise(edges)]
    with styled_figure(11, 2.4) as figure:
        axes = figure.subplots()
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colors, alpha=0.7)
        axes.axvline(0, color=INK, lw=0.8, alpha=0.5)
        axes.set_xlabel(f"{rank_by}, nats")
        axes.set_ylabel("pairs")
        return data_uri(figure)


# ---------------------------------------------------------------------------------------------- the page
def _card(row: dict) -> dict:
    """A row with the additional values for the template."""
    source = row["image"] and "data:image/png;base64," + base64.b64encode(row["image"]["bytes"]).decode()
    largest = max((abs(word["value"]) for word in row["words"] or []), default=1) or 1
    words = [word | {"share": 100 * abs(word["value"]) / largest} for word in row["words"] or []]
    return row | {"source": source, "words": words}


def _headline(summary: dict) -> tuple[str, str]:
    judged = summary["scored"] - summary["unjudged"]
    if not judged:
        return f"{summary['scored']:,} pairs scored", "No caption could be changed into a hard negative."
    share = 100 * summary["contradicted"] / judged
    title = f"{summary['contradicted']:,} of {judged:,} captions look wrong ({share:.1f} %)"
    verdict = "For these pairs a hard negative, the caption with one change, is clearly likelier than the caption."
    return title, verdict


def write_audit(
    run_dir: str, folder: str, names: list[str], config: dict, found: Sequence[str] = ()
) -> tuple[str, dict]:
    """Write audit/index.html and audit/audit.json of scored parts; the URI of the page, and the summary.

    Args:
        names: of the parts in `folder`.
        config: what the scores depend on, with rank_by and shown among it.
        found: lines that tell what the input holds and what of it is not read.
    """
    summary, ends = summarise_pairs(folder, names, config["rank_by"], config["shown"])
    summary["input"] = [*found]
    write_json(join(run_dir, "audit", "audit.json"), summary)
    title, verdict = _headline(summary)
    page = (
        page_environment(decimal, number)
        .get_template("audit.html.j2")
        .render(
            title=title,
            verdict=verdict,
            summary=summary,
            config=config,
            config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            histogram=_histogram_plot(summary["histogram"], config["rank_by"])
            if summary["histogram"]["counts"]
            else None,
            ends={end: [_card(row) for row in rows] for end, rows in ends.items()},
            shown_errors=SHOWN_ERRORS,
        )
    )
    uri = join(run_dir, "audit", "index.html")
    write_bytes(uri, page.encode())
    return uri, summary
