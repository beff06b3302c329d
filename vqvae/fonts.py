"""Fonts for names in any script, chosen among those that are installed.

A character that no font has is shown escaped, as in a Python literal: `\\u540d` instead of an empty box.
"""

import contextlib
from functools import cache
from itertools import groupby

from vqvae.errors import printable

ODD = ("Last Resort", "STIXNonUnicode", "STIXSize", "cm")  # fonts with boxes or with wrong glyphs
_files: dict[str, str | None] = {}  # character -> file of a font that has it


def drawable(text: str) -> str:
    """The text, with the characters escaped that no font has and those that break lines or reorder text."""
    text = printable(text)
    files = _find(text)
    return "".join(c if c.isascii() or files[c] else c.encode("unicode_escape").decode() for c in text)


def runs(text: str) -> list[tuple[str | None, str]]:
    """A drawable text as pieces of one font each: its file, None where any font will do, and the piece."""
    files = _find(text)
    return [(file, "".join(piece)) for file, piece in groupby(text, lambda c: None if c.isascii() else files[c])]


def families(text: str) -> list[str]:
    """Names of the fonts that matplotlib needs for a drawable text, its default first."""
    from matplotlib.font_manager import get_font

    files = dict.fromkeys(file for file in _find(text).values() if file)
    return list(dict.fromkeys(["DejaVu Sans", *(get_font(file).family_name for file in files)]))


def _find(text: str) -> dict[str, str | None]:
    """The files for the characters of a text that are not ASCII. Opens each font at most once."""
    characters = {c for c in text if not c.isascii()}
    missing = characters - set(_files)
    if missing:
        from matplotlib.ft2font import FT2Font

        found: dict[str, str] = {}
        for file in _candidates():
            try:
                font = FT2Font(file)
                usable = not _is_bitmap(font)
            except (OSError, RuntimeError):  # removed, or damaged
                continue
            if usable:
                found |= {c: file for c in missing - set(found) if font.get_char_index(ord(c))}
            if len(found) == len(missing):
                break
        _files.update({c: found.get(c) for c in missing})
    return {c: _files[c] for c in characters}


@cache
def _candidates() -> tuple[str, ...]:
    """Files of all installed fonts: matplotlib's default first, then regular sans-serif ones."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for file in set(findSystemFonts()) - known:  # installed since matplotlib made its list
        with contextlib.suppress(Exception):  # a file that is no font raises anything
            fontManager.addfont(file)

    def rank(font) -> tuple:
        weight = font.weight if isinstance(font.weight, int) else 400
        plain = "Sans" in font.name or "Gothic" in font.name or "Hei" in font.name
        return font.name != "DejaVu Sans", font.style != "normal", abs(weight - 400), not plain, font.name, font.fname

    return tuple(font.fname for font in sorted(fontManager.ttflist, key=rank) if not font.name.startswith(ODD))


def _is_bitmap(font) -> bool:
    """Whether a font has glyphs of one size, as fonts of colored emoji have."""
    return font.num_fixed_sizes > 0
