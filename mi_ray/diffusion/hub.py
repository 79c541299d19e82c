"""Names of models on the hub, and digests of model folders. Imports no torch."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_PIECES, _PIECE = 64, 4096  # of a file, evenly from its beginning to its end, and bytes of each


def hub_id(text: str) -> tuple[str, str | None] | None:
    """owner/name and the branch, tag or commit of owner/name@revision, if there is one; None: the text has another
    form."""
    found = _ID.fullmatch(text)
    return found and (found[1], found[2])


def files_digest(folder: Path, names: Iterable[str]) -> str:
    """A hash, 16 hexadecimal digits, of the names and sizes of files and of some of their bytes. It is fast.

    Any training changes nearly every weight. So a few thousand bytes of each file distinguish two models.

    Args:
        names: of the files in the folder; their order counts.
    """
    digest = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{name} {size}\n".encode())
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
