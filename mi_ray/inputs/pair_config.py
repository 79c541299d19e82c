"""The configuration of jobs/score.py."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mi_ray.config import HEIGHT, MODEL, WIDTH, Dtype, ResourcesConfig, ScoreConfig, without_revision
from mi_ray.config.paths import LocalOrUri, ModelPath, SharedPath, absolute, hashed_fields, shared
from mi_ray.config.section import Positive, Section, config_hash, split_query
from mi_ray.inputs.pair import Columns

Fit = Literal["exact", "crop"]


class PairScoreConfig(ScoreConfig):
    """How pairs are scored. For real images, less noisy levels are more informative than for generated images."""

    names: tuple[Literal["pmi", "pmi_negatives"], ...] = Field(
        ("pmi", "pmi_negatives"), description="both scores are always computed, and the margin"
    )
    # Chosen on 360 renders, 134 with a wrong caption: many negatives help most, and few of them need all noise samples.
    log_snr_min: float = Field(-5.4, description="lower end of the log SNR band")
    log_snr_max: float = Field(-0.4, description="upper end of the log SNR band")
    num_samples: Positive = Field(12, description="number of noise samples per pair")
    max_negatives: Positive = Field(24, description="maximum number of hard negatives (changed captions) per pair")
    shortlist: Positive | None = Field(
        6,
        description="number of hard negatives per pair that are evaluated with every noise sample: the most likely"
        " ones; none: all of them",
    )


class ScorePairsConfig(Section):
    """Score existing pairs of image and caption, and find wrong captions. Give many pairs (input) or a single pair."""

    input: SharedPath | None = Field(
        None,
        description="pairs: .parquet, .jsonl, .json, .csv, .tsv, a WebDataset .tar, a folder of these, or a folder of"
        " images with a .txt, .caption or .json for each; local, s3:// or gs://; none: a single pair",
    )
    run_dir: SharedPath | None = Field(
        None, description="folder of the results: local, s3:// or gs://; the same command continues the run"
    )
    keep: LocalOrUri | None = Field(
        None,
        description="output file: a copy of the input without the pairs whose image contradicts the caption, of the"
        " same type as the input (.jsonl for a folder of images); none: not written",
    )
    image: LocalOrUri | None = Field(None, description="a single image, instead of input; needs prompt")
    prompt: str | None = Field(None, description="caption of the single image")
    map: SharedPath | None = Field(
        None, description="output file for the map of the single pair; none: beside the image, ending in -map.png"
    )
    model: ModelPath = Field("shapes", description=MODEL)
    height: Positive | None = Field(None, description=HEIGHT)
    width: Positive | None = Field(None, description=WIDTH)
    dtype: Dtype = Field("auto", description="dtype of the denoiser; auto and fast as model.dtype of a run")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="random seed of the noise samples; a pair's noise depends on nothing else"
    )
    image_column: str | None = Field(None, description="column or key of the image or of its path; none: a usual name")
    caption_column: str | None = Field(None, description="column or key of the caption; none: a usual name")
    fit: Fit = Field(
        "exact", description="images with another size or mode: exact: an error row; crop: convert, scale and crop them"
    )
    overlong: Literal["error", "truncate"] = Field(
        "error", description="captions longer than the text encoder reads: error: an error row; truncate: cut them"
    )
    words: bool = Field(
        False, description="also score every word, by leaving it out; each word costs one evaluation per noise sample"
    )
    rank_by: Literal["margin", "pmi_negatives", "pmi"] = Field(
        "margin",
        description="score that orders the audit page, worst first; margin: log p(image | caption) minus the highest"
        " of log p(image | hard negative) and log p(image)",
    )
    shown: Positive = Field(
        24, description="number of best and of worst pairs on the audit page; each shard stores as many images"
    )
    pairs_per_shard: Positive = Field(
        256, description="number of pairs in one output file; a tar or a row group is never split"
    )
    score: PairScoreConfig = PairScoreConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _task(self):
        single = self.image is not None or self.prompt is not None
        if single == (self.input is not None):
            raise ValueError(
                "input and image are both set or both missing; set either input and run_dir, or image and prompt"
            )
        if single and (self.image is None or not (self.prompt or "").strip()):
            raise ValueError("image or prompt is missing, and a single pair needs both; set the missing one")
        if not single and self.run_dir is None:
            raise ValueError("run_dir is missing, and input needs it as the folder of the results; set --run-dir DIR")
        if single:
            shared(self.map_file)
        return self

    @property
    def map_file(self) -> str:
        """Output file for the map of the single pair. Without `map`: beside the image, or here for a remote image."""
        remote = "://" in self.image
        image = PurePosixPath(split_query(self.image)[0] if remote else self.image)
        return self.map or absolute(f"{image.stem if remote else image.with_suffix('')}-map.png")

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(height, width) in pixels. None: the model's own."""
        return self.height, self.width

    def results_config(self) -> dict:
        """The fields that the results depend on. A size that is not set is left out, as in `ModelConfig`."""
        unset = {name for name in ("height", "width") if getattr(self, name) is None}
        outputs = {"run_dir", "map", "keep"}
        results = self.model_dump(mode="json", exclude={*outputs, "resources", "image", "prompt", *unset})
        return results | {"model": without_revision(self.model)}  # run.json holds the commit

    def hash(self) -> str:
        """Hash of the `hashed_fields` of `results_config`, 12 hexadecimal digits."""
        return config_hash(hashed_fields(self.results_config()))
