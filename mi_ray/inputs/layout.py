"""Which files of a folder or archive are the user's data, and what was found there, as it is told to the user."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow.fs as pafs
from PIL import features

from mi_ray import storage
from mi_ray.config.section import split_query
from mi_ray.inputs import text
from mi_ray.inputs.records import format_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff") + (
    (".avif",) if features.check("avif") else ()
)
SIDECARS = (".txt", ".caption", ".json")  # in this order, beside an image
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_LITTER = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
_SHOWN = 3  # names in a message

State = list[int | None]


def is_litter(name: str) -> bool:
    """Whether a relative path belongs to the system or to a tool: a dot file, or one in a folder such as __MACOSX."""
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "..")]
    return any(part.startswith(".") or part.lower() in _LITTER for part in parts)


def kind_of(name: str) -> str | None:
    """parquet, tar, image, or table (text form); None: a file that holds no pairs."""
    lower = (split_query(name)[0] if "://" in name else name).lower()
    if lower.endswith(_TARS):
        return "tar"
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(IMAGE_SUFFIXES):
        return "image"
    return "table" if format_of(name) else None


def folder_of(uri: str) -> str:
    """The folder of a file."""
    path, query = split_query(uri) if "://" in uri else (uri, "")
    folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    return f"{folder}?{query}" if query or ("://" in uri and "?" in folder) else folder


def state_of(info: pafs.FileInfo) -> State:
    """The state of a file, to notice changes: size, and time of the last change in nanoseconds."""
    return [info.size, info.mtime_ns]


def files_in(uri: str) -> tuple[dict[str, State], int]:
    """The states of a folder's files by their relative paths, sorted, without litter; the number of litter files."""
    system, path = storage.filesystem(uri)
    infos = system.get_file_info(pafs.FileSelector(path, recursive=True))
    files = [info for info in infos if info.type == pafs.FileType.File]
    names = {info.path.removeprefix(path).lstrip("/"): info for info in sorted(files, key=lambda info: info.path)}
    states = {name: state_of(info) for name, info in names.items() if not is_litter(name)}
    return states, len(names) - len(states)


def sidecars(images: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """For each image the files of the same name that may hold its caption; capitals matter only where both exist."""
    there, folded = set(), {}
    for name in names:
        if name.lower().endswith(SIDECARS):
            there.add(name)
            folded.setdefault(name.casefold(), name)
    found = {}
    for image in images:
        exact = [str(PurePosixPath(image).with_suffix(suffix)) for suffix in SIDECARS]
        both = [name if name in there else folded.get(name.casefold()) for name in exact]
        found[image] = [name for name in both if name]
    return found


@dataclass
class Found:
    """What an input holds, what of it is read, and what is passed over and why."""

    read: Counter = field(default_factory=Counter)  # {kind: number of files}
    columns: Counter = field(default_factory=Counter)  # {columns that are read: number of files}
    passed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # {reason: files}
    unread: Counter = field(default_factory=Counter)  # {suffix: number of files}
    litter: int = 0

    def took(self, kind: str, images: list[str], captions: list[str]):
        """A table is read."""
        self.read[kind] += 1
        self.columns[f"image from {_in_turn(images)}, caption from {_in_turn(captions)}"] += 1

    def leave(self, names: Iterable[str]):
        """These files are not read, because of their type."""
        self.unread.update(PurePosixPath(name).suffix.lower() or "without suffix" for name in names)

    def lines(self) -> list[str]:
        """The report, a line for each kind of thing."""
        lines = [", ".join(f"{kind}: {count}" for kind, count in self.read.items()) or "nothing"]
        lines += [f"{columns} ({count} file{'s' * (count > 1)})" for columns, count in self.columns.items()]
        for reason, names in self.passed.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"passed over: {', '.join(text.excerpt(n, 60) for n in names[:_SHOWN])}{more}: {reason}")
        if self.unread:
            counts = ", ".join(f"{count} {text.excerpt(suffix, 20)}" for suffix, count in self.unread.most_common(12))
            lines.append(f"not read because of their type: {counts}")
        if self.litter:
            lines.append(f"{self.litter} hidden or system files ignored")
        return lines


def _in_turn(columns: list[str]) -> str:
    return " or else ".join(f"`{text.excerpt(name, 40)}`" for name in columns)
