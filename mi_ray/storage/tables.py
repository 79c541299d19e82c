"""Arrow schemas of a run's tables, with what each column means."""

import pyarrow as pa


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": meaning})


_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])  # as Hugging Face datasets shows it
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


_METRICS = [
    _field("exact", pa.float32(), "oracle: 1 if everything said is right and nothing is extra"),
    _field("objects", pa.float32(), "oracle: share of the named objects present with all their attributes"),
    _field("attributes", pa.float32(), "oracle: share of the named shapes, colours and textures that are right"),
    _field("count", pa.float32(), "oracle: share of the named kinds whose number is right"),
    _field("relation", pa.float32(), "oracle: 1 if the named relation holds; null where none is named"),
]


def candidates_schema(score_names: tuple[str, ...]) -> pa.Schema:
    """One row a candidate; a row whose `error` is set stands for a prompt (or candidate) that failed."""
    curve = pa.list_(pa.float32())
    return pa.schema(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("candidate_index", pa.int32(), "0 .. candidates_per_prompt - 1"),
            _field("seed", pa.int64(), "of the candidate's own noise generator"),
            _field("delta_sq", curve, "per step: squared norm of conditional minus unconditional epsilon"),
            _field("cross", curve, "per step: inner product of conditional epsilon and that difference"),
            *score_columns(score_names),
            *_METRICS,
            _field("pruned_after", pa.int32(), "steps after which pruning took it out; null: it was not"),
            _field("prune_score", pa.float32(), "score prune.by at the last cut that it faced; null: no pruning"),
            _field("rank", pa.int32(), "within the prompt by the selecting score, 0 is best"),
            _field("kept", pa.bool_(), "selected for fine-tuning"),
            _field("latents", _LATENTS, "clean latents, flat; of what some selection keeps"),
            _field("latents_shape", pa.list_(pa.int32()), "shape of the latents"),
            _field("image", _IMAGE, "PNG; of what is kept or previewed"),
            _field("error", pa.string(), "why there is no result"),
        ]
    )


def online_schema(score_names: tuple[str, ...]) -> pa.Schema:
    """One row a candidate of an online update; latents of what is trained, images of some of the validations."""
    return pa.schema(
        [
            *candidates_schema(score_names),
            _field("update", pa.int32(), "the update that trains it, or the version of the policy that is validated"),
            _field("advantage", pa.float32(), "of the candidate within its prompt, -1 to 1; null: it is not trained"),
        ]
    )


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


def evaluation_schema() -> pa.Schema:
    """One row an image of one model."""
    return pa.schema(
        [
            _field("prompt_id", pa.string(), "hash of the prompt's text"),
            _field("prompt", pa.string(), "the prompt"),
            _field("category", pa.string(), "the prompt's category, if its file gives one"),
            _field("split", pa.string(), "test (in distribution) or ood, if the file says"),
            _field("image_index", pa.int32(), "0 .. images_per_prompt - 1"),
            _field("seed", pa.int64(), "of the image's own noise generator; the same for every model"),
            *score_columns(("pmi",)),
            *_METRICS,
            _field("features", pa.list_(pa.float32()), "of the image, for the quality measures"),
            _field("image", _IMAGE, "encoded as PNG"),
            _field("error", pa.string(), "why there is no result"),
        ]
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
    ]
)
