"""The configuration of scoring existing pairs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mi_ray.config import HEIGHT, MODEL, WIDTH, ResourcesConfig, ScoreConfig, without_revision
from mi_ray.config.section import Positive, Section, config_hash
from mi_ray.inputs.pairs import Columns

Fit = Literal["exact", "crop"]


class PairScoreConfig(ScoreConfig):
    """How pairs are probed. Of real images the middle noise levels tell more than of a model's own."""

    names: tuple[Literal["pmi", "pmi_negatives"], ...] = Field(
        ("pmi", "pmi_negatives"), description="both are always computed, and the margin"
    )
    # Chosen on 360 renders of which 134 had a wrong caption: many negatives tell most, and few of them need all noises.
    log_snr_min: float = Field(-5.4, description="lower end of the band")
    log_snr_max: float = Field(-0.4, description="upper end of the band")
    num_samples: Positive = Field(12, description="noise draws a pair")
    max_negatives: Positive = Field(24, description="so many changed captions at most")
    shortlist: Positive | None = Field(
        6, description="so many of them, the likeliest for the image, meet all noise draws; none: all do"
    )


class ScorePairsConfig(Section):
    """Score pairs of image and caption that exist, and find the wrong ones: an input in a folder, or a single pair."""

    input: str | None = Field(
        None,
        description="pairs: .parquet, .jsonl, a WebDataset .tar, a folder of these, or one of images with .txt beside"
        " them or a metadata.jsonl; local, s3:// or gs://",
    )
    run_dir: str | None = Field(
        None, min_length=1, description="folder of the results, local, s3:// or gs://; the same command continues it"
    )
    image: str | None = Field(None, description="a single image, instead of input; with prompt")
    prompt: str | None = Field(None, description="the single image's prompt")
    map: str | None = Field(None, description="where the single pair's map goes; none: beside the image, -map.png")
    model: str = Field("shapes", description=MODEL)
    height: Positive | None = Field(None, description=HEIGHT)
    width: Positive | None = Field(None, description=WIDTH)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="of the denoiser")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the noise; a pair's scores depend on nothing else")
    image_column: str | None = Field(None, description="column or key of the image or its path; none: a usual name")
    caption_column: str | None = Field(None, description="column or key of the caption; none: a usual name")
    fit: Fit = Field(
        "exact", description="images of another size or mode: exact: an error row; crop: convert, scale and crop"
    )
    overlong: Literal["error", "truncate"] = Field(
        "error", description="captions longer than the text encoder reads: an error row, or cut"
    )
    words: bool = Field(False, description="score every word too, by leaving it out: one branch each")
    rank_by: Literal["margin", "pmi_negatives", "pmi"] = Field(
        "margin",
        description="the audit's order, worst first; margin: the lead over the likeliest change, or no caption",
    )
    shown: Positive = Field(24, description="best and worst pairs on the audit page, and kept as images by shard")
    pairs_per_shard: Positive = Field(256, description="pairs in one file; a tar or a row group is never cut")
    score: PairScoreConfig = PairScoreConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _task(self):
        single = self.image is not None or self.prompt is not None
        if single == (self.input is not None):
            raise ValueError("give either input with run_dir, or image with prompt")
        if single and (self.image is None or not (self.prompt or "").strip()):
            raise ValueError("a single pair needs both image and prompt; give the other one too")
        if not single and self.run_dir is None:
            raise ValueError("input needs run_dir, the folder of the results; give --run-dir DIR")
        return self

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width in pixels; None: the model's own."""
        return self.height, self.width

    def results_config(self) -> dict:
        """What the results depend on. A size that is not set is left out, as of `ModelConfig`."""
        unset = {name for name in ("height", "width") if getattr(self, name) is None}
        results = self.model_dump(mode="json", exclude={"run_dir", "resources", "image", "prompt", "map", *unset})
        return results | {"model": without_revision(self.model)}  # run.json holds the commit

    def hash(self) -> str:
        """Hash of `results_config`, 12 hexadecimal digits."""
        return config_hash(self.results_config())
