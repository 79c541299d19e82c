"""The configuration of making more prompts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mi_ray.config import MODEL
from mi_ray.config.paths import LocalOrUri, ModelPath, SharedPath
from mi_ray.config.section import Positive, Section

SUFFIXES = (".jsonl", ".parquet", ".txt")


class MorePromptsConfig(Section):
    """More prompts from a list of your own: its objects, attributes, counts and relations recombined."""

    file: LocalOrUri | None = Field(
        None,
        description="the list: .txt (one a line), .jsonl or .parquet (columns prompt, category); local, s3:// or gs://;"
        " none: all that the shapes grammar says",
    )
    out: SharedPath = Field(description="where the new prompts go: .jsonl, .parquet or .txt; local, s3:// or gs://")
    count: Positive = Field(description="number of new prompts; fewer are an error, which tells how many there are")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="the same seed and input give the same prompts")
    exclude: tuple[LocalOrUri, ...] = Field(
        (), description="prompt files, as those of the evaluation: none of theirs comes out, in whatever case or order"
    )
    phrases: str = Field(
        "auto",
        pattern="^(auto|shapes|text|spacy(:.+)?)$",
        description="who reads the list: shapes (its grammar), text (a lexicon), spacy, spacy:MODEL; auto: shapes for"
        " its prompts, else text",
    )
    split: Literal["train", "test", "ood"] = Field("train", description="of the shapes grammar, for its prompts only")
    model: ModelPath | None = Field(None, description=f"leave out what is longer than its text encoder reads: {MODEL}")
    focus: LocalOrUri | None = Field(
        None,
        description="prompts that the model fails on, from which alone it is drawn: a file with prompt and maybe"
        " weight, or a folder evaluation/<model> of a run",
    )
    focus_metric: str | None = Field(
        None,
        description="column between 0 and 1 of a focus table without weight, averaged by prompt; none: the first column"
        " of the first metric that the table declares",
    )
    focus_below: float = Field(
        1.0, gt=0, le=1, description="prompts with a lower average count, each by 1 less its average"
    )

    @model_validator(mode="after")
    def _files(self):
        faults = []
        if not self.out.lower().endswith(SUFFIXES):
            faults.append(f"out is {self.out!r}; give it the extension {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if self.out in (self.file, self.focus, *self.exclude):
            faults.append(f"out is {self.out!r}, which is read too and would be overwritten; give another name")
        if self.file is None and self.focus is None and self.phrases not in ("auto", "shapes"):
            faults.append(f"file is missing, and phrases {self.phrases!r} needs it; give --file LIST")
        if faults:
            raise ValueError("\n".join(faults))
        return self
