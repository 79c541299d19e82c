"""Soft-TIFA of GenEval 2 (Kamath et al., 2025, arXiv 2512.16853), with the questions of a prompt set or of a file."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from mi_ray.alignment.chat_judge import ChatJudge
from mi_ray.alignment.metric import Column, Unusable, details_of
from mi_ray.shapes.grammar import LONG_PHRASE, ObjectSpec, noun_phrase, parse

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class SoftTifa(ChatJudge):
    """The means over a prompt's questions of the probability of the right answer.

    A question "How many ..." counts the spellings of its number: as given, with a capital, in digits, each also after a
    space. Any other question counts Yes, yes and both after a space, whatever its answer, as in the released code
    (a6e82d2). There, first tokens that two spellings share count twice; here once.

    The questions are the column `vqa_list` of the prompt set, a list of [question, answer], as in geneval2_data.jsonl.
    Those of DPG-Bench and DSG have the answer yes; what a question depends on is not used, so the value is no score of
    these benchmarks. A prompt of the shapes grammar without this column has the questions of `shape_questions`, which
    are ours.

    Args:
        argument: nothing, MODEL, FILE or FILE@MODEL. The file has the questions of prompts that have none: one JSON
            object per line with `prompt` and `vqa_list`.

    Raises:
        Unusable: the file is missing or has another form, or as `Judge`.
    """

    template = "{} Answer in one word."
    declared = (
        Column("soft_tifa_gm", "Soft-TIFA GM: geometric mean over questions", "share", 0, 1, nullable=True),
        Column("soft_tifa_am", "Soft-TIFA AM: arithmetic mean over questions", "share", 0, 1, nullable=True),
    )
    reads_only = (
        "prompts with questions: the column `vqa_list`, or soft-tifa@FILE with a file that has it (and prompts of the"
        " shapes grammar)"
    )
    file_questions: dict[str, list[tuple[str, str]]]  # of the file, by prompt

    def __init__(self, argument: str = ""):
        file, _, model = argument.partition("@")
        if not Path(file).is_file() and not file.endswith(".jsonl"):
            self.file_questions = {}
            super().__init__(argument)
            return
        if not Path(file).is_file():
            raise Unusable(
                f"needs a file of questions, and {file!r} is none: write soft-tifa@FILE or soft-tifa@FILE@MODEL"
            )
        content = Path(file).read_bytes()
        self.file_questions = _questions(file, content)
        super().__init__(model)
        source = f"; questions: {Path(file).name}, {hashlib.sha256(content).hexdigest()[:16]}"
        self.columns = tuple(replace(column, meaning=column.meaning + source) for column in self.columns)

    def reads(self, prompt: str) -> bool:
        return bool(self.questions(prompt))

    def questions(self, prompt: str) -> list[tuple[str, str]]:
        """The questions about a prompt with their answers: those of the file, else of the prompt set or the grammar."""
        given = details_of(prompt).get("vqa_list", ())
        pairs = [(str(pair[0]), str(pair[1])) for pair in given if isinstance(pair, list) and len(pair) == 2]
        return self.file_questions.get(prompt) or pairs or shape_questions(prompt)

    def measure(self, images: np.ndarray, prompts: list[str]) -> dict[str, list[float | None]]:
        asked = [(row, *pair) for row, prompt in enumerate(prompts) for pair in self.questions(prompt)]
        found: list[list[float]] = [[] for _ in prompts]
        if asked:
            owners, questions, answers = zip(*asked, strict=True)
            texts = [self.template.format(question) for question in questions]
            groups = [spellings(*pair) for pair in zip(questions, answers, strict=True)]
            for owner, p in zip(owners, self.probabilities(images[list(owners)], texts, groups), strict=True):
                found[owner].append(p)
        with np.errstate(divide="ignore"):  # a probability of 0 makes the geometric mean 0
            geometric = [float(np.exp(np.log(ps).mean())) if ps else None for ps in found]
        return {"soft_tifa_gm": geometric, "soft_tifa_am": [float(np.mean(ps)) if ps else None for ps in found]}


def shape_questions(prompt: str) -> list[tuple[str, str]]:
    """The questions about a prompt of the shapes grammar with their answers; none about another prompt.

    One about each kind of object with all its attributes, or about its number if the prompt says one, and one about the
    relation.
    """
    try:
        spec = parse(prompt)
    except ValueError:
        return []

    def name(each: ObjectSpec, many: bool) -> str:
        return noun_phrase(replace(each, count=1 + many), numeric=True).split(" ", 1)[1]  # without its number

    if spec.numeric:
        found = [(f"How many {name(each, True)} are there?", NUMBERS[each.count - 1]) for each in spec.objects]
    else:
        found = [(f"Is there {noun_phrase(each, numeric=False)}?", "Yes") for each in spec.objects]
    if spec.relation:
        first, second = (name(each, each.count > 1) for each in spec.objects[:2])
        verb = "Are" if spec.objects[0].count > 1 else "Is"
        found.append((f"{verb} the {first} {LONG_PHRASE[spec.relation]} the {second}?", "Yes"))
    return found


def spellings(question: str, answer: str) -> list[str]:
    """The spellings of the right answer to a question."""
    if not question.startswith("How many"):
        words = ["Yes", "yes"]
    else:
        words = [answer, answer.capitalize()]
        words += [str(NUMBERS.index(answer) + 1)] if answer in NUMBERS else []
    return [*words, *(f" {word}" for word in words)]


def _questions(file: str, content: bytes) -> dict[str, list[tuple[str, str]]]:
    """{prompt: [(question, answer)]} of a file."""
    found = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pairs = [(str(question), str(answer)) for question, answer in record["vqa_list"]]
            found[str(record["prompt"])] = pairs
        except (ValueError, KeyError, TypeError) as error:
            raise Unusable(
                f"cannot read line {number} of {file!r} ({type(error).__name__}: {error}): write one JSON object per"
                " line with prompt and vqa_list, a list of [question, answer]"
            ) from error
        if not pairs:
            raise Unusable(f"has no question for the prompt in line {number} of {file!r}: add one, or remove the line")
    return found
