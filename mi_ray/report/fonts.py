"""Fonts for the user's text in pictures: installed ones that have its characters."""

import sys
import unicodedata

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

_DEFAULT = "DejaVu Sans"  # comes with matplotlib
_NO_FONT = ("Last Resort",)  # draws a frame for each character


def families_for(text: str) -> list[str]:
    """Names of font families that have the characters of a text, the default first. Characters that no installed font
    has are drawn as frames; a message on the terminal names them."""
    lacking = {character for character in text if _is_drawn(character)}
    lacking -= _characters(font_manager.findfont(_DEFAULT))
    families = [_DEFAULT]
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name)):
        if not lacking:
            break
        if (
            font.name not in families
            and not font.name.startswith(_NO_FONT)
            and (has := lacking & _characters(font.fname))
        ):
            families.append(font.name)
            lacking -= has
    if lacking:
        shown = "".join(sorted(lacking)[:20])
        advice = "install one that has them, such as Noto Sans (fonts-noto-cjk, fonts-noto-core)"
        print(f"the picture has frames in place of {shown}: no installed font has them; {advice}", file=sys.stderr)
    return families


def _is_drawn(character: str) -> bool:
    """Whether a character has a shape of its own: no space, control character or mark that changes another one."""
    return unicodedata.category(character)[0] not in "CZM"


def _characters(path: str) -> set[str]:
    try:
        return set(map(chr, FT2Font(path).get_charmap()))
    except (RuntimeError, OSError, ValueError):  # such as a font of coloured pictures, which matplotlib cannot draw
        return set()
