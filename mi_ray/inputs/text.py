"""Text of the user's files: the rules for encodings, lines and control characters of prompts and captions.

- Encodings: UTF-8 with or without a byte order mark; UTF-16 and UTF-32 with one. A zero byte otherwise means binary.
- A name that ends in .gz is decompressed.
- A line ends with LF, CR LF or CR.
- Control characters, among them line ends inside a value, become spaces. Spaces at both ends are removed.
- A text file of an image holds one caption a line; the first line that is not blank is the caption.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from mi_ray import storage
from mi_ray.config import section
from mi_ray.config.section import LONGEST, split_query

_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
BINARY = "binary, or UTF-16 without a byte order mark; save it as UTF-8"
NOT_UTF8 = "not UTF-8; save it as UTF-8"
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ") | {0xFEFF: None}


class Line(NamedTuple):
    """A line of a text file. Offsets are in bytes of the file's text as UTF-8, after decompression."""

    number: int  # from 1
    start: int
    end: int  # after the line end
    content: bytes  # without the line end; cut if the line is too long
    whole: bool

    def decoded(self) -> str:
        """The line as text.

        Raises:
            ValueError: it is not text; the message completes the sentence "the line is ...".
        """
        return decode(self.content, mark=False)


def excerpt(value: Any, longest: int = LONGEST) -> str:
    """Like `section.excerpt`, but without control characters."""
    return clean(section.excerpt(value, longest))


def reason(error: Exception) -> str:
    return excerpt(error) or type(error).__name__


def clean(text: str) -> str:
    """A prompt or caption without control characters, byte order marks and spaces at its ends."""
    return text.translate(_CONTROLS).strip()


def is_storable(text: str) -> bool:
    """False if the text contains half a surrogate pair: JSON allows it, UTF-8 does not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def decode(content: bytes, mark: bool = True) -> str:
    """The text of a file.

    Args:
        mark: whether the content may begin with a byte order mark.

    Raises:
        ValueError: it is not text; the message completes the sentence "the file is ...".
    """
    encoding, length = _encoding(content) if mark else ("utf-8", 0)
    if encoding == "utf-8" and b"\0" in content:
        raise ValueError(BINARY)
    try:
        return content[length:].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(NOT_UTF8 if encoding == "utf-8" else f"not valid {encoding}; save it as UTF-8") from error


def captions_of(content: bytes) -> list[str]:
    """The captions of an image's text file, one a line, without blank lines.

    Raises:
        ValueError: as `decode`.
    """
    lines = decode(content).replace("\r", "\n").split("\n")
    return [line for line in map(clean, lines) if line]


def lines(uri: str, longest: int, start: int = 0, number: int = 1) -> Iterator[Line]:
    """The lines of a text file from an offset on; a line that is longer than `longest` bytes is cut.

    Args:
        start: offset of a line's first byte, as in `Line`.
        number: number of that line.
    """
    rest, dropped = b"", 0
    for chunk in _utf8(uri, start):
        pieces = (rest + chunk).splitlines(keepends=True)
        rest = pieces.pop() if pieces else b""  # it may go on, even after a CR
        for piece in pieces:
            yield (line := _line(number, start, piece, dropped, longest))
            number, start, dropped = number + 1, line.end, 0
        if len(rest) > longest:
            dropped += len(rest) - longest
            rest = rest[:longest]
    if rest:
        yield _line(number, start, rest, dropped, longest)


def shown_line(line: Line) -> tuple[str, str]:
    """A line as text, or as nearly as it can be shown, and its fault."""
    if not line.whole:
        longest = len(line.content)
        size = f"{longest >> 20} MiB" if longest >> 20 else f"{longest} bytes"
        return line.content[:500].decode(errors="replace"), f"longer than {size}; write one row per line"
    try:
        return line.decoded(), ""
    except ValueError as error:
        return line.content.decode(errors="replace"), str(error)


def _line(number: int, start: int, piece: bytes, dropped: int, longest: int) -> Line:
    content = piece.rstrip(b"\r\n")
    content = content.removeprefix(codecs.BOM_UTF8) if start == 0 else content
    whole = not dropped and len(content) <= longest
    return Line(number, start, start + dropped + len(piece), content[:longest], whole)


def _encoding(head: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark tells, and the mark's length."""
    return next(((name, len(mark)) for mark, name in _MARKS.items() if head.startswith(mark)), ("utf-8", 0))


def _utf8(uri: str, start: int) -> Iterator[bytes]:
    """The text of a file as UTF-8 from an offset on. Bytes that are not UTF-8 stay as they are."""
    packed = PurePosixPath(split_query(uri)[0]).suffix.lower() == ".gz"
    if not packed:
        encoding, _ = _encoding(next(storage.read_chunks(uri, 4), b""))
        if encoding == "utf-8":
            yield from storage.read_chunks(uri, start=start)
            return
    yield from _after(_transcoded(storage.unpacked_chunks(uri)), start)


def _transcoded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = next(chunks, b"")
    encoding, length = _encoding(first)
    if encoding == "utf-8":
        yield first
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    yield decoder.decode(first[length:]).encode()
    for chunk in chunks:
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", True).encode()


def _after(chunks: Iterable[bytes], start: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[start:]
        start = max(0, start - len(chunk))
