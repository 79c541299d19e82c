"""The configuration of jobs/make_prompts.py."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mi_ray.config import MODEL
from mi_ray.config.paths import LocalOrUri, ModelPath, SharedPath
from mi_ray.config.section import Positive, Section

SUFFIXES = (".jsonl", ".parquet", ".txt")


class MorePromptsConfig(Section):
    """Make new prompts from your own list, by recombining its objects, attributes, counts and relations."""

    file: LocalOrUri | None = Field(
        None,
        description="your prompt list, in any form that prompts.file of a run may have; none: prompts of the shapes"
        " grammar",
    )
    out: SharedPath = Field(description="output file: .jsonl, .parquet or .txt; local, s3:// or gs://")
    count: Positive = Field(description="number of new prompts; if fewer can be made, an error tells how many")
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="random seed; the same seed and input give the same prompts"
    )
    exclude: tuple[LocalOrUri, ...] = Field(
        (),
        description="files of prompts that must not be made, such as those of the evaluation; case and word order are"
        " ignored",
    )
    phrases: str = Field(
        "auto",
        pattern="^(auto|shapes|text|spacy(:.+)?)$",
        description="method that parses the list: shapes (its grammar), text (a lexicon), spacy, spacy:MODEL; auto:"
        " shapes for prompts of the shapes grammar, else text",
    )
    split: Literal["train", "test", "ood"] = Field(
        "train", description="split of the shapes grammar; only for its prompts"
    )
    model: ModelPath | None = Field(
        None, description=f"model whose text encoder limits the length of new prompts; none: no limit: {MODEL}"
    )
    focus: LocalOrUri | None = Field(
        None,
        description="prompts that the model fails on; new prompts are made only from these: a file with prompt and"
        " optional weight, or a folder evaluation/<model> of a run; none: all prompts of the list",
    )
    focus_metric: str | None = Field(
        None,
        description="column of a focus table without weight, with values from 0 to 1; averaged by prompt; none: the"
        " first column of the first metric that the table declares",
    )
    focus_below: float = Field(
        1.0, gt=0, le=1, description="prompts with an average below this are used, each with the weight 1 - average"
    )

    @model_validator(mode="after")
    def _files(self):
        faults = []
        if not self.out.lower().endswith(SUFFIXES):
            faults.append(f"out is {self.out!r}; use the extension {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if self.out in (self.file, self.focus, *self.exclude):
            faults.append(
                f"out is {self.out!r}, but this file is also an input and would be overwritten; give another file"
            )
        if self.file is None and self.focus is None and self.phrases not in ("auto", "shapes"):
            faults.append(f"file is missing, but phrases {self.phrases!r} needs it; set --file LIST")
        if faults:
            raise ValueError("\n".join(faults))
        return self
