"""Arrow schemas of a run's tables, with the meaning of each column."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pyarrow as pa

from mi_ray.alignment.metric import Column


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": meaning})


_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
# Hugging Face datasets needs this metadata of a table to decode the column `image`.
_FEATURES = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
_LATENTS = pa.list_(pa.float16())

SCORES = {
    "mitune": "MI-TUNE on-trajectory score, nats; as in the released code (no alpha_t), arXiv 2405.20759 alg. 2",
    "mitune_eq2": "MI-TUNE on-trajectory score, nats; with eq. 2's factor alpha_t, arXiv 2405.20759",
    "asd": "sum over the steps of ||conditional - unconditional prediction||^2, no weights (ASD / CFG-rejection)",
    "trajectory_banded": "on-trajectory score score.banded, only of the steps within score.log_snr_min..max, nats",
    "rfmi": "RFMI on-trajectory score of a flow, nats; with the conditional velocity, arXiv 2503.14358",
    "rfmi_guided": "the same with the guided velocity, as in the released code, nats",
    "flow_difference": "integral over the steps of (1 - t) / t ||conditional - unconditional velocity||^2 dt, nats",
    "pmi": "log p(x|y) - log p(x), signed i_s over the log SNR band, nats; arXiv 2310.07972 eq. 7",
    "pmi_orthogonal": "i_o: change of the prediction by the prompt over the same band, >= 0, nats; eq. 8",
    "pmi_contrastive": "log p(x|y) - log mean_j p(x|y_j); y_j: the nearest other prompts; same band, nats",
    "pmi_negatives": "log p(x|y) - logsumexp_j log p(x|y_j); y_j: hard negatives, the prompt with one change;"
    " same band, nats",
}


def score_columns(names: tuple[str, ...]) -> list[pa.Field]:
    """The column of each score. Scores estimated from noise samples also have a column for their standard error."""
    fields = []
    for name in names:
        fields.append(_field(f"score_{name}", pa.float32(), SCORES[name]))
        if name.startswith("pmi"):
            meaning = f"standard error of score_{name} over the noise samples, nats"
            fields.append(_field(f"score_{name}_se", pa.float32(), meaning))
    return fields


Metrics = Mapping[str, Sequence[Column]]  # {name of a metric in the configuration: its columns}
_NO_METRICS: Metrics = MappingProxyType({})
# Columns that readers of the tables add.
_RESERVED_NAMES = {"update", "advantage", "pmi", "by_category", "by_split", "round", "lot", "value", "judged"}


def _with_metrics(before: list[pa.Field], metrics: Metrics, after: list[pa.Field]) -> pa.Schema:
    """The schema of a table: the columns `before`, the columns of the metrics, the columns `after`.

    Raises:
        ValueError: with one line for each metric column whose name is already used.
    """
    taken = {field.name for field in (*before, *after)} | _RESERVED_NAMES
    faults = [
        f"{metric!r} declares the column {column.name!r}, but the tables already use this name: rename the column"
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
    """The metrics of a table, with their columns, in order. The schema may come from a file."""
    metrics: dict[str, tuple[Column, ...]] = {}
    for field in schema:
        texts = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
        if "metric" in texts:
            metric = texts.pop("metric")
            metrics[metric] = (*metrics.get(metric, ()), Column.from_metadata(field.name, texts))
    return metrics


def candidates_schema(score_names: tuple[str, ...], metrics: Metrics = _NO_METRICS) -> pa.Schema:
    """One row per candidate. A row with an `error` stands for a prompt or candidate that failed.

    Raises:
        ValueError: a metric declares a column whose name is already used.
    """
    curve = pa.list_(pa.float32())
    return _with_metrics(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "category of the prompt; null if its file has none"),
            _field("candidate_index", pa.int32(), "0 .. candidates_per_prompt - 1"),
            _field("seed", pa.int64(), "random seed of the candidate"),
            _field("delta_sq", curve, "per step: squared norm of the conditional minus the unconditional prediction"),
            _field("cross", curve, "per step: inner product of the conditional prediction and this difference"),
            *score_columns(score_names),
        ],
        metrics,
        [
            _field(
                "pruned_after", pa.int32(), "number of steps after which the candidate was pruned; null: not pruned"
            ),
            _field("prune_score", pa.float32(), "score prune.by at the candidate's last cut; null: no pruning"),
            _field("rank", pa.int32(), "rank within the prompt by the score of the selection; 0 is best"),
            _field("kept", pa.bool_(), "true if selected for fine-tuning"),
            _field("latents", _LATENTS, "clean latents, flattened; only of candidates that a selection keeps"),
            _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
            _field("image", _IMAGE, "encoded as PNG; only of kept and preview candidates"),
            _field("error", pa.string(), "reason why there is no result"),
        ],
    )


def online_schema(score_names: tuple[str, ...], metrics: Metrics = _NO_METRICS) -> pa.Schema:
    """One row per candidate of an online run. Trained candidates have latents; some validation ones have images.

    Raises:
        ValueError: a metric declares a column whose name is already used.
    """
    version = _field(
        "update", pa.int32(), "update that trains on the candidate; in a validation: version of the policy"
    )
    advantage = _field(
        "advantage", pa.float32(), "advantage of the candidate within its prompt, -1 to 1; null: not trained"
    )
    steps = _field(
        "transition_steps", pa.list_(pa.int32()), "the K stored sampling steps, from 0; null: the method needs none"
    )
    transitions = _field(
        "transitions", _LATENTS, "K times the latents before a step, and the clean latents that it aimed at, flattened"
    )
    schema = candidates_schema(score_names, metrics)
    return pa.schema([*schema, version, advantage, steps, transitions], metadata=schema.metadata)


SELECTED = pa.schema(
    [
        _field("prompt_id", pa.string(), "hash of the prompt's text"),
        _field("prompt", pa.string(), "the prompt"),
        _field("candidate_index", pa.int32(), "index of the candidate"),
        _field("latents", _LATENTS, "clean latents, flattened"),
        _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
        _field("weight", pa.float32(), "weight of the row in the training loss"),
    ]
)


def evaluation_schema(metrics: Metrics = _NO_METRICS, features: Column | None = None) -> pa.Schema:
    """One row per image of one model.

    Args:
        features: the encoder of the features; None: the autoencoder of the model.

    Raises:
        ValueError: a metric declares a column whose name is already used.
    """
    features = features or Column("features", "image features by the model's autoencoder, for the quality measures")
    return _with_metrics(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "category of the prompt; null if its file has none"),
            _field(
                "split", pa.string(), "test (in distribution) or ood (out of distribution); null if the file has none"
            ),
            _field("guidance_scale", pa.float32(), "guidance_scale of the sampler; 1: no guidance; null: a real image"),
            _field("image_index", pa.int32(), "0 .. images_per_prompt - 1"),
            _field("seed", pa.int64(), "random seed of the image; the same for every model and guidance scale"),
            *score_columns(("pmi",)),
        ],
        metrics,
        [
            pa.field("features", pa.list_(pa.float32()), metadata=features.as_metadata()),
            _field("image", _IMAGE, "encoded as PNG"),
            _field("error", pa.string(), "reason why there is no result"),
        ],
    )


SCORED = pa.schema(
    [
        _field("key", pa.string(), "place of the pair: a file, a row or line of a file, a member of a tar"),
        _field("file", pa.string(), "the image's own file: a path, a URI or tar#member; null: it is inside a table"),
        _field("prompt", pa.string(), "the caption"),
        *score_columns(("pmi", "pmi_negatives")),
        _field(
            "score_margin", pa.float32(), "log p(x|y) minus the highest of log p(x|hard negative) and log p(x), nats"
        ),
        _field("score_margin_se", pa.float32(), "standard error of score_margin, nats"),
        _field(
            "posterior", pa.float32(), "posterior of the caption among itself and its hard negatives, with equal priors"
        ),
        _field(
            "contradicted_attribute",
            pa.string(),
            "color, shape, count, relation ...; null: no hard negative is clearly likelier",
        ),
        _field("contradicted_kind", pa.string(), "type of change in the likeliest hard negative"),
        _field("contradicted", pa.string(), "words of the caption that the image contradicts"),
        _field("instead", pa.string(), "words of the likeliest hard negative in their place; empty: none"),
        _field("instead_posterior", pa.float32(), "posterior of the likeliest hard negative"),
        _field(
            "words",
            pa.list_(pa.struct([("word", pa.string()), ("value", pa.float32()), ("standard_error", pa.float32())])),
            "per word: log p(x|y) - log p(x|y without the word), nats; empty if words is false",
        ),
        _field("image", _IMAGE, "small image as the model saw it; only of the best and worst pairs of a shard"),
        _field("remark", pa.string(), "how the pair was read, where it may surprise: the first of several lines ..."),
        _field("error", pa.string(), "reason why there is no score"),
    ],
    metadata=_FEATURES,
)
