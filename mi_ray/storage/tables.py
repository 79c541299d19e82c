"""Arrow schemas of a run's tables, with what each column means."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pyarrow as pa

from mi_ray.alignment.metric import Column


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": meaning})


_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
# By this metadata of a table Hugging Face datasets decodes the column `image`.
_FEATURES = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
_LATENTS = pa.list_(pa.float16())

SCORES = {
    "mitune": "MI-TUNE on-trajectory score, nats; the released code's convention (no alpha_t), arXiv 2405.20759 alg. 2",
    "mitune_eq2": "MI-TUNE on-trajectory score, nats; with eq. 2's factor alpha_t, arXiv 2405.20759",
    "asd": "sum over the steps of ||conditional - unconditional prediction||^2, no weight (ASD / CFG-rejection)",
    "trajectory_banded": "the on-trajectory score score.banded, of the steps within score.log_snr_min..max, nats",
    "pmi": "log p(x|y) - log p(x), signed i_s over the band of log SNR, nats; arXiv 2310.07972 eq. 7",
    "pmi_orthogonal": "i_o: how much the prompt changes the prediction over the same band, >= 0, nats; eq. 8",
    "pmi_contrastive": "log p(x|y) - log mean_j p(x|y_j) over the nearest other prompts, same band, nats",
    "pmi_negatives": "log p(x|y) - logsumexp_j log p(x|y_j) over the prompt changed in one thing, same band, nats",
}


def score_columns(names: tuple[str, ...]) -> list[pa.Field]:
    """A score's column and, where it is estimated from noise draws, its standard error's."""
    fields = []
    for name in names:
        fields.append(_field(f"score_{name}", pa.float32(), SCORES[name]))
        if name.startswith("pmi"):
            meaning = f"standard error of score_{name} over the noise draws, nats"
            fields.append(_field(f"score_{name}_se", pa.float32(), meaning))
    return fields


Metrics = Mapping[str, Sequence[Column]]  # what each metric declares, by the name that the configuration gives it
_NO_METRICS: Metrics = MappingProxyType({})
_OF_READERS = {
    "update",
    "advantage",
    "pmi",
    "by_category",
    "by_split",
    "round",
    "lot",
    "value",
}  # names that readers of the tables add


def _with_metrics(before: list[pa.Field], metrics: Metrics, after: list[pa.Field]) -> pa.Schema:
    """A table's schema, a metric's columns in their place.

    Raises:
        ValueError: with one line for each column of a metric whose name is taken.
    """
    taken = {field.name for field in (*before, *after)} | _OF_READERS
    faults = [
        f"{metric!r} declares the column {column.name!r}, a name that the tables use themselves: rename it"
        for metric, columns in metrics.items()
        for column in columns
        if column.name in taken or column.name.startswith("score_")
    ]
    if faults:
        raise ValueError("\n".join(faults))
    measured = [
        pa.field(column.name, pa.float32(), metadata={**column.as_metadata(), "metric": metric})
        for metric, columns in metrics.items()
        for column in columns
    ]
    return pa.schema([*before, *measured, *after], metadata=_FEATURES)


def metric_columns(schema: pa.Schema) -> dict[str, tuple[Column, ...]]:
    """The metrics whose columns a table has, with what each declares, in order; of a file's schema too."""
    metrics: dict[str, tuple[Column, ...]] = {}
    for field in schema:
        texts = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
        if "metric" in texts:
            metric = texts.pop("metric")
            metrics[metric] = (*metrics.get(metric, ()), Column.from_metadata(field.name, texts))
    return metrics


def candidates_schema(score_names: tuple[str, ...], metrics: Metrics = _NO_METRICS) -> pa.Schema:
    """One row a candidate; a row whose `error` is set stands for a prompt (or candidate) that failed.

    Raises:
        ValueError: a metric declares a column whose name is taken.
    """
    curve = pa.list_(pa.float32())
    return _with_metrics(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("candidate_index", pa.int32(), "0 .. candidates_per_prompt - 1"),
            _field("seed", pa.int64(), "of the candidate's own noise generator"),
            _field("delta_sq", curve, "per step: squared norm of conditional minus unconditional epsilon"),
            _field("cross", curve, "per step: inner product of conditional epsilon and that difference"),
            *score_columns(score_names),
        ],
        metrics,
        [
            _field("pruned_after", pa.int32(), "steps after which pruning took it out; null: it was not"),
            _field("prune_score", pa.float32(), "score prune.by at the last cut that it faced; null: no pruning"),
            _field("rank", pa.int32(), "within the prompt by the selecting score, 0 is best"),
            _field("kept", pa.bool_(), "selected for fine-tuning"),
            _field("latents", _LATENTS, "clean latents, flat; of what some selection keeps"),
            _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
            _field("image", _IMAGE, "PNG; of what is kept or previewed"),
            _field("error", pa.string(), "why there is no result"),
        ],
    )


def online_schema(score_names: tuple[str, ...], metrics: Metrics = _NO_METRICS) -> pa.Schema:
    """One row a candidate of an online update; latents of what is trained, images of some of the validations.

    Raises:
        ValueError: a metric declares a column whose name is taken.
    """
    version = _field("update", pa.int32(), "the update that trains it, or the version of the policy that is validated")
    advantage = _field("advantage", pa.float32(), "of the candidate within its prompt, -1 to 1; null: not trained")
    return candidates_schema(score_names, metrics).append(version).append(advantage)


SELECTED = pa.schema(
    [
        _field("prompt_id", pa.string(), "hash of the prompt's text"),
        _field("prompt", pa.string(), "the prompt"),
        _field("candidate_index", pa.int32(), "which candidate"),
        _field("latents", _LATENTS, "clean latents, flat"),
        _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
        _field("weight", pa.float32(), "of the row in the training loss"),
    ]
)


def evaluation_schema(metrics: Metrics = _NO_METRICS) -> pa.Schema:
    """One row an image of one model.

    Raises:
        ValueError: a metric declares a column whose name is taken.
    """
    return _with_metrics(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("split", pa.string(), "test (in distribution) or ood, if the file says"),
            _field("image_index", pa.int32(), "0 .. images_per_prompt - 1"),
            _field("seed", pa.int64(), "of the image's own noise generator; the same for every model"),
            *score_columns(("pmi",)),
        ],
        metrics,
        [
            _field("features", pa.list_(pa.float32()), "of the image, for the quality measures"),
            _field("image", _IMAGE, "encoded as PNG"),
            _field("error", pa.string(), "why there is no result"),
        ],
    )


SCORED = pa.schema(
    [
        _field("key", pa.string(), "where the pair lies: a file, a file's row or line, a tar's member"),
        _field("prompt", pa.string(), "the caption"),
        *score_columns(("pmi", "pmi_negatives")),
        _field("score_margin", pa.float32(), "log p(x|y) less the highest of its negatives' and log p(x), nats"),
        _field("score_margin_se", pa.float32(), "standard error of score_margin, nats"),
        _field("posterior", pa.float32(), "of the caption among itself and its negatives, all equally likely before"),
        _field(
            "contradicted_attribute",
            pa.string(),
            "color, shape, count, relation ...; null: no negative is clearly likelier",
        ),
        _field("contradicted_kind", pa.string(), "what sort of change the likeliest negative is"),
        _field("contradicted", pa.string(), "the caption's words that the image contradicts"),
        _field("instead", pa.string(), "what the likeliest negative says instead; empty: nothing"),
        _field("instead_posterior", pa.float32(), "of that negative"),
        _field(
            "words",
            pa.list_(pa.struct([("word", pa.string()), ("value", pa.float32()), ("standard_error", pa.float32())])),
            "of each word: log p(x|y) - log p(x|y without it), nats; empty if not asked for",
        ),
        _field("image", _IMAGE, "as the model saw it, small; of the shard's best and worst pairs"),
        _field("error", pa.string(), "why there is no score"),
    ],
    metadata=_FEATURES,
)
