"""The places in a prompt file that have a fault or need a remark, counted by kind; and the prompts read so far."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

_LINES_SHOWN = 5  # line numbers in a message
_EXAMPLES = 20  # kept of each kind
_EXAMPLE_LENGTH = 500  # characters
_KINDS = 20  # number of kinds with their own text; later ones are counted by the text before the colon


@dataclass
class Places:
    """The places of one kind: their number, and the first ones as (line, prompt, message)."""

    count: int = 0
    first: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, line: int, prompt: str, message: str):
        self.count += 1
        if len(self.first) < _EXAMPLES:
            shown = prompt[:_EXAMPLE_LENGTH].strip().encode(errors="replace").decode()
            self.first.append((line, shown, message))

    def skipped(self, kind: str) -> Iterator[dict]:
        """Rows {"prompt", "stage", "message"} of the first places; one row with a `count` stands for all others."""
        for _, prompt, message in self.first:
            yield {"prompt": prompt, "stage": "prompts", "message": message}
        if self.count > len(self.first):
            rest = f"{self.count - len(self.first)} more: {kind}"
            yield {"prompt": "", "stage": "prompts", "message": rest, "count": self.count - len(self.first)}

    def named(self, where: str) -> str:
        """The first places as the subject of a sentence: "lines 2, 4 are"."""
        lines = [line for line, _, _ in self.first[:_LINES_SHOWN]]
        shown = ", ".join(map(str, lines))
        more = f" and {self.count - len(lines)} more" if self.count > len(lines) else ""
        return f"{where} {shown} is" if self.count == 1 else f"{where}s {shown}{more} are"


class Kinds(dict[str, Places]):
    """Places by kind. A kind completes the sentence "the line is ...". The text after a semicolon is advice. The text
    after a colon is the user's data: after `_KINDS` kinds it is left out."""

    def add(self, where: str, line: int, prompt: str, kind: str):
        if kind not in self and len(self) >= _KINDS:
            kind = kind.partition(":")[0]
        message = f"{where} {line} is {kind.partition(';')[0]}"
        self.setdefault(kind, Places()).add(line, prompt, message)


class Seen:
    """The prompts so far, with the first line of each. They are kept in a file, so that memory does not grow."""

    def __init__(self):
        self.table = sqlite3.connect("")  # a private temporary file
        self.table.execute("PRAGMA journal_mode = OFF")
        self.table.execute("CREATE TABLE seen (id INTEGER PRIMARY KEY, line INTEGER)")

    def first_lines(self, ids: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """The first line of each of the next n prompts, (n,); for a new prompt its own line."""
        before = self.table.total_changes
        order = np.argsort(ids, kind="stable")  # sorted, so that nearby places on disk are written together
        rows = zip(ids[order].tolist(), lines[order].tolist(), strict=True)
        self.table.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)
        if self.table.total_changes - before == len(ids):
            return lines
        first = "SELECT line FROM seen WHERE id = ?"
        return np.array([self.table.execute(first, (i,)).fetchone()[0] for i in ids.tolist()], np.int64)
