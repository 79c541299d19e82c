"""Published prompt sets: what a file says about a prompt besides its text.

- T2I-CompBench: `<category>_<part>.txt`. The name of the file is the category.
- GenEval: JSON lines with `tag`, `include` and `exclude`.
- GenEval 2: JSON lines with `vqa_list`, `skills` and `atom_count`.
- PartiPrompts: TSV with `Category` and `Challenge`. DiffusionDB: Parquet with `prompt`.
- DPG-Bench and DSG: CSV with one question a row; the rows of one `item_id` are one prompt.

The user brings the files. Any other table may have the same columns.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from mi_ray import storage
from mi_ray.config.section import split_query
from mi_ray.inputs import text
from mi_ray.inputs.records import Record

# The details of a prompt: columns that metrics read. Those in `JSON` hold a list; in CSV and TSV files they are JSON.
JSON = ("include", "exclude", "vqa_list", "skills", "parents")
DETAILS = (*JSON, "challenge", "relations")
_COMPBENCH = re.compile(
    r"(color|shape|texture|spatial|3d_spatial|non_spatial|numeracy|complex)"
    r"(?:_train|_val)?(?:_(seen|unseen)|_(spatial|action|spatialaction))?\.txt(?:\.gz)?",
    re.IGNORECASE,
)
_QUESTION_ROWS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")

Labels = tuple[Any, Any, str | None]  # category, split, details as JSON


class Prompt(str):
    """A prompt with its `details`: {column: value} of the columns `DETAILS` that its file has for it."""

    details: dict[str, Any]

    def __new__(cls, prompt: str, details: str | None = None):
        """A prompt with details in the form of the prompt table: a JSON object, or None."""
        made = super().__new__(cls, prompt)
        made.details = json.loads(details) if details else {}
        return made


def labels(fields: dict) -> Labels:
    """What the columns of a row say about its prompt; capitals do not matter. Details of another type are left out."""
    values = {name.casefold(): value for name, value in fields.items() if value is not None}
    found = {name: _parsed(name, values[name]) for name in DETAILS if name in values}
    details = {name: value for name, value in found.items() if value is not None}
    category = values.get("category")
    if category is None and "include" in details:
        category = values.get("tag")
    if category is None and "vqa_list" in details and "atom_count" in values:
        category = f"{values['atom_count']} atoms"  # objects, attributes, counts and relations: GenEval 2 reports by it
    return category, values.get("split"), _stored(details)


def labels_of_file(uri: str) -> Labels:
    """What the name of a text file says about its prompts."""
    named = _COMPBENCH.fullmatch(PurePosixPath(split_query(uri)[0]).name)
    if not named:
        return None, None, None
    category, seen, relations = named.groups()
    relations = relations if category.lower() == "complex" else None
    return category.lower(), seen, _stored({"relations": relations} if relations else {})


def matching(uri: str) -> list[str]:
    """The files that a name means, in order: all that match a name with `*`, otherwise the file itself.

    Raises:
        ValueError: no file matches.
    """
    path, query = split_query(uri)
    folder, slash, name = path.rpartition("/")
    if "*" not in name:
        return [uri]
    found = fnmatch.filter(storage.list_names(f"{folder}{slash}{'?' if query else ''}{query}"), name)
    if not found:
        raise ValueError("matches no file; correct the name")
    return [f"{folder}/{one}{'?' if query else ''}{query}" for one in found]


def text_lines(uri: str, longest: int) -> Iterator[tuple[text.Line, bool, Labels]]:
    """The lines of a text file, or of all files that match, numbered from the first line of the first file.

    Returns:
        (line, whether it is the first of its file, what the file's name says about its prompts).
    """
    before = 0
    for file in matching(uri):
        number, of_file = before, labels_of_file(file)
        for line in text.lines(file, longest):
            number = before + line.number
            yield line._replace(number=number), line.number == 1, of_file
        before = number


def joined(records: Iterable[Record], header: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a table. If each row is a question (DPG-Bench, DSG), consecutive rows of an item become one row."""
    if not set(_QUESTION_ROWS) <= set(header):
        yield from records
        return
    for item, rows in groupby(records, lambda record: record.fields and record.fields["item_id"]):
        first, *others = rows
        if item is None:
            yield from (first, *others)
            continue
        try:
            yield replace(first, fields=_with_questions([row.fields for row in (first, *others)]))
        except (ValueError, AttributeError) as error:
            fault = f"not a question ({text.reason(error)}); write a number as proposition_id, numbers as dependency"
            yield replace(first, fields=None, fault=fault)


def _with_questions(rows: list[dict]) -> dict:
    """The prompt of some questions: `parents` has, for each question, the positions of those that it depends on."""
    places = {int(row["proposition_id"]): place for place, row in enumerate(rows)}
    needed = [[int(number) for number in row["dependency"].split(",")] for row in rows]
    item = re.match(r"[A-Za-z_]*", rows[0]["item_id"])[0]
    return {
        "text": rows[0]["text"],
        "category": item.rstrip("_") or None,
        "vqa_list": [[row["question_natural_language"], "yes"] for row in rows],
        "skills": [row.get("category_broad") for row in rows],
        "parents": [[places[number] for number in numbers if number in places] for numbers in needed],
    }


def _parsed(name: str, value: Any) -> list | str | None:
    """The value of a detail; None if it has another type."""
    if name in JSON and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list if name in JSON else str) and value else None


def _stored(details: dict) -> str | None:
    return json.dumps(details, ensure_ascii=False, sort_keys=True) if details else None
