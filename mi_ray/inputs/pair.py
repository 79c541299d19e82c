"""A pair of image and caption, and how it is made from the values and files of an input."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from mi_ray import storage
from mi_ray.inputs import text
from mi_ray.inputs.records import CAPTION_COLUMNS, IMAGE_COLUMNS, as_caption, find_columns, first_value

CAPTION_SUFFIXES = ("txt", "caption")  # of text files beside an image; the first one that is not blank is read
_IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_LONGEST_PATH = 4096  # characters


@dataclass(frozen=True)
class Pair:
    """An encoded image and its caption, or the reason why one is missing."""

    key: str  # its place: a file, a row or line of a file, a member of a tar
    image: bytes | None = None
    prompt: str | None = None
    error: str | None = None
    file: str | None = None  # the image's own file: a path, a URI, or tar#member; None: the image is inside a table
    remark: str | None = None  # what the user should know about how it was read


@dataclass(frozen=True)
class Columns:
    """Names of the columns or keys. None means the usual names, each row's first one that has a value."""

    image: str | None = None
    caption: str | None = None

    def find(self, names: list[str]) -> tuple[list[str], list[str]]:
        """The columns of the image and those of the caption among `names`.

        Raises:
            ValueError: one is missing or ambiguous.
        """
        return (
            find_columns(names, self.image, IMAGE_COLUMNS, "--image-column"),
            find_columns(names, self.caption, CAPTION_COLUMNS, "--caption-column"),
        )


def pair_of(key: str, image: Any, caption: Any, folder: str) -> Pair:
    """A pair from the values of a table's row.

    Args:
        image: bytes, a path or URI, a base64 text, or Hugging Face's {bytes, path}.
        folder: where relative paths begin.
    """
    file, prompt = None, None
    try:
        prompt, remark = as_caption(caption)
        file, content = _image(image, folder)
        content = storage.read_bytes(file) if content is None else content
    except (OSError, ValueError) as error:
        if storage.is_transient(error):
            raise
        return Pair(key, None, prompt, _reason(error, file), file)
    return Pair(key, content, prompt, None, file, remark)


def _reason(error: OSError | ValueError, file: str | None) -> str:
    if file is None:
        return str(error)
    hint = "; write / instead of \\ in paths" if "\\" in file else ""
    if isinstance(error, FileNotFoundError):
        return f"the image does not exist: {text.excerpt(file)}{hint}"
    return f"the image cannot be read: {text.reason(error)}{hint}"


def _image(value: Any, folder: str) -> tuple[str | None, bytes | None]:
    """The image's own file, and its content if that is in the value.

    Raises:
        ValueError: the value is no image.
    """
    if isinstance(value, dict):
        path = value.get("path")
        if value.get("bytes"):
            return path if isinstance(path, str) and path else None, value["bytes"]
        value = path
    if isinstance(value, bytes) and value:
        return None, value
    if not isinstance(value, str | None | bytes):
        raise ValueError(f"the image is of the type {type(value).__name__}; give bytes, a path or base64")
    if not value:
        raise ValueError("there is no image")
    if (content := _from_base64(value)) is not None:
        return None, content
    if len(value) > _LONGEST_PATH:
        raise ValueError(f"the image is a text of {len(value)} characters, neither a path nor base64 of an image")
    if value.startswith(("http://", "https://")):
        raise ValueError(f"the image is on the web: {text.excerpt(value)}; download it, for example with img2dataset")
    return value if "://" in value or value.startswith("/") else storage.join(folder, value), None


def _from_base64(value: str) -> bytes | None:
    """The image in a data: URI or a base64 text; None: the text is something else.

    Raises:
        ValueError: a data: URI has no base64.
    """
    is_data, content = value.startswith("data:"), value
    if is_data:
        head, _, content = value.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("the image is a data: URI without base64")
    try:
        found = base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if is_data:
            raise ValueError(f"the image is not valid base64: {text.reason(error)}") from error
        return None
    return found if is_data or found.startswith(_IMAGE_STARTS) or found[4:8] == b"ftyp" else None


def caption_beside(files: dict[str, bytes], columns: Columns) -> tuple[str | None, str | None]:
    """The caption in the files beside an image, and a remark about it.

    Text files come before JSON, since tools that write new captions write them to text files. In each, a caption that
    is null or blank is not there.

    Args:
        files: content of each file by its suffix without the dot, in lower case.

    Returns:
        None without a file that could hold a caption; an empty text if all are blank.

    Raises:
        ValueError: the only caption cannot be read.
    """
    remarks, found = [], []
    wanted = (columns.caption.lower(),) if columns.caption else CAPTION_SUFFIXES
    suffixes = [suffix for suffix in wanted if suffix in files and suffix != "json"]
    for suffix in suffixes:
        try:
            captions = text.captions_of(files[suffix])
        except ValueError as error:
            raise ValueError(f"the caption file .{suffix} is {error}") from error
        if len(captions) > 1:
            remarks.append(f"the caption file has {len(captions)} lines; the first is read")
        found += [(f".{suffix}", caption) for caption in captions[:1]]
    if "json" in files:
        try:
            caption, remark = _json_caption(files["json"], columns)
        except ValueError as error:
            if not found:
                raise
            caption, remark = None, str(error)
        found += [("its JSON", caption)] if caption else []
        remarks += [remark] if remark else []
    for name, caption in found[1:]:
        if caption != found[0][1]:
            remarks.append(f"the captions in {found[0][0]} and {name} differ; the first is read")
    blank = "" if suffixes else None
    return (found[0][1] if found else blank), "; ".join(remarks) or None


def _json_caption(content: bytes, columns: Columns) -> tuple[str | None, str | None]:
    try:
        fields = json.loads(text.decode(content))
        if not isinstance(fields, dict):
            raise ValueError(f"it is a {type(fields).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the caption cannot be read from the JSON: {text.reason(error)}") from error
    try:
        names = find_columns(fields, columns.caption, CAPTION_COLUMNS, "--caption-column")
    except ValueError:
        return None, None
    return as_caption(first_value(fields, names))
