"""The page of a run: its content, which no name can break."""

from html.parser import HTMLParser

import pytest

from vqvae import page
from vqvae.errors import printable

ODD = ["<script>alert(1)</script>", "\"><img onerror='x'>", "a & b &amp; c", "名前 é", "it's", "a\nb", "\udcff\u202e"]
TAGS = "html head meta title style body main section dl dt dd nav a h1 h2 p img table tr th td small ul li".split()


class Reader(HTMLParser):
    """Collects the content that a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.words.append(data)


def text_of(name: str = "run") -> str:
    plots = [page.Shown("a.png", name, "Read it.", (1000, 500)), page.Shown("b.gif", "B", name, (300, 300))]
    tables = [
        page.Table("Metrics", ("metric", name), [("mse", name, ("1 ± 0.1",)), (name, "", (name,))], numbers=True),
        page.Table(f"Settings {name}", ("setting", "value"), [("name", "", (name,))]),
    ]
    return page.html(name, [("run", name)], plots, [("c.png", name)], tables)


@pytest.mark.parametrize("name", ODD)
def test_any_name_is_text_and_nothing_else(name):
    text = text_of(name)
    text.encode("utf-8")
    seen = Reader(text)
    plain = Reader(text_of())
    assert seen.tags == plain.tags
    assert [(tag, key) for tag, key, _ in seen.attributes] == [(tag, key) for tag, key, _ in plain.attributes]
    shown = printable(name)
    assert " ".join(seen.words).count(shown) >= 8
    assert ("img", "alt", f"B of {shown}") in seen.attributes


def test_the_page_is_static_and_loads_only_its_plots():
    seen = Reader(text_of())
    assert set(seen.tags) == set(TAGS)
    sources = [value for _, key, value in seen.attributes if key in ("src", "href")]
    assert [value for value in sources if not value.startswith("#")] == ["a.png", "a.png", "b.gif", "b.gif"]
    assert "http" not in text_of()
    assert "url(" not in page.STYLE
    assert "@import" not in page.STYLE
    assert not any(key.startswith("on") for _, key, _ in seen.attributes)


def test_links_within_the_page_lead_to_its_sections():
    seen = Reader(text_of("A run: 1"))
    anchors = [value for _, key, value in seen.attributes if key == "id"]
    links = [value[1:] for _, key, value in seen.attributes if key == "href" and value.startswith("#")]
    assert links == anchors
    assert len(set(anchors)) == 4


def test_every_plot_has_a_heading_a_sentence_a_size_and_a_text_for_those_who_do_not_see_it():
    text = text_of("My run")
    assert 'src="a.png" alt="My run of My run" width="1000" height="500"' in text
    for words in ("<h2>B</h2>", "<p>Read it.</p>", 'alt="B of My run" width="300" height="300"'):
        assert words in text


def test_it_fits_a_telephone():
    text = text_of()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "max-width: 100%" in page.STYLE
    assert 'style="min-width: 600px"' in text, "a wide plot scrolls in its box, and its text stays readable"


def test_a_page_without_plots_that_were_left_out_has_no_list_of_them():
    assert "do not apply" in text_of()
    assert "do not apply" not in page.html("run", [], [], [], [])
