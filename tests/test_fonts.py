"""Fonts for names in any script: each character gets a font that has it, or is escaped."""

import imageio.v3 as imageio
import pytest
import torch
from matplotlib import font_manager

from vqvae import fonts, plots


@pytest.fixture
def installed(monkeypatch):
    """A function that makes these files the only fonts."""
    monkeypatch.setattr(fonts, "_files", {})

    def install(*files: str) -> None:
        fonts._files.clear()
        monkeypatch.setattr(fonts, "_candidates", lambda: files)

    return install


DEJAVU, STIX = (font_manager.findfont(name) for name in ("DejaVu Sans", "STIXGeneral"))


def test_characters_that_no_font_has_are_escaped(installed):
    installed()
    assert fonts.drawable("a 名 é\n") == "a \\u540d \\xe9\\n"
    assert fonts.runs(fonts.drawable("a 名")) == [(None, "a \\u540d")]
    installed("/nowhere.ttf", DEJAVU)
    assert fonts.drawable("a 名 é") == "a \\u540d é"


def test_each_character_gets_the_first_font_that_has_it(installed):
    only_stix = next(c for c in map(chr, font_of(STIX)) if ord(c) > 0x2000 and ord(c) not in font_of(DEJAVU))
    text = f"ab∑{only_stix}"
    installed(DEJAVU, STIX)
    assert fonts.drawable(text) == text
    assert fonts.runs(text) == [(None, "ab"), (DEJAVU, "∑"), (STIX, only_stix)]
    assert fonts.families(text) == ["DejaVu Sans", "STIXGeneral"]
    installed(STIX)
    assert fonts.runs(text) == [(None, "ab"), (STIX, f"∑{only_stix}")]


def font_of(file: str) -> dict[int, int]:
    """The character codes of a font."""
    return font_manager.get_font(file).get_charmap()


def test_text_of_other_fonts_leaves_ink_on_sheets_and_charts(tmp_path, installed, recwarn):
    installed(DEJAVU, STIX)
    inks = []
    for title in ("", "∑𝔸"):
        plots.image_grid(torch.ones(1, 3, 8, 8), tmp_path / "sheet.png", title=title)
        inks.append(int((imageio.imread(tmp_path / "sheet.png") < 128).sum()))
    assert inks[1] > inks[0] == 0
    plots.usage_chart(torch.tensor([[3, 0, 5]]), tmp_path / "usage.png", title="∑𝔸")
    assert not [str(w.message) for w in recwarn]


def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_found(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [STIX, "/nowhere.ttf"])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    fonts._candidates.cache_clear()
    try:
        assert fonts._candidates() == (STIX,)
    finally:
        fonts._candidates.cache_clear()
