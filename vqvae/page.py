"""The page of a run: one HTML file with its plots, how to read them, its metrics and its settings.

The page is static and loads nothing but the plots next to it. All text is escaped by the serializer, because names may
come from strangers.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from vqvae.errors import printable

STYLE = """
body { margin: 0; background: #f6f6f4; color: #1e1e1e; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
main { max-width: 1120px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.5rem; margin: .5rem 0 }
h2 { font-size: 1.15rem; margin: 0 0 .25rem }
section { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 16px; margin: 16px 0 }
section p { margin: 0 0 .75rem; max-width: 44rem }
.plot { display: block; overflow-x: auto }
img { display: block; max-width: 100%; height: auto }
nav a { margin-right: 1rem; white-space: nowrap }
a { color: #1a5a96 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0 }
dt, small, .note { color: #666 }
dd, td + td { margin: 0; overflow-wrap: anywhere }
small { display: block; line-height: 1.35; max-width: 38rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid #e6e6e6 }
.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal }
td.number { white-space: nowrap }
@media (max-width: 600px) {
  body { font-size: 15px }
  main { padding: 8px }
  section { padding: 10px; margin: 10px 0 }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: .4rem }
  td.number { white-space: normal }
  table { table-layout: fixed }
  th:first-child { width: 44% }
}
"""


class Shown(NamedTuple):
    """A plot on the page."""

    file: str  # its name, in the page's folder
    heading: str
    reading: str  # one sentence on how to read it
    size: tuple[int, int]  # width and height in pixels


class Table(NamedTuple):
    """A table whose first column has names, each with a note below it."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[str]]]  # name, note or "", the other cells
    numbers: bool = False  # whether the other cells are numbers


def html(
    title: str,
    facts: Sequence[tuple[str, str]],
    plots: Sequence[Shown],
    left_out: Sequence[tuple[str, str]],
    tables: Sequence[Table],
) -> str:
    """The page of a run.

    `facts` are pairs of a word and what is known, `left_out` are pairs of a plot that does not apply and the reason.
    """
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("title", title),
        _tag("style", STYLE),
    )
    main = _tag("main", _tag("h1", title))
    entries = [tag for word, text in facts for tag in (_tag("dt", word), _tag("dd", text))]
    main.append(_tag("section", _tag("dl", *entries)))
    anchors = [(plot.file, plot.heading) for plot in plots] + [(table.heading, table.heading) for table in tables]
    main.append(_tag("nav", *(_tag("a", heading, href=f"#{_anchor(name)}") for name, heading in anchors)))
    main.extend(_plot(plot, title) for plot in plots)
    main.extend(map(_table, tables))
    if left_out:
        reasons = [_tag("li", f"{file}: {reason}") for file, reason in left_out]
        main.append(_tag("section", _tag("h2", "Plots that do not apply"), _tag("ul", *reasons), class_="note"))
    root = _tag("html", head, _tag("body", main), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(root, encoding='unicode', method='html')}\n"


def _plot(plot: Shown, title: str) -> Element:
    width, height = plot.size
    # on a narrow screen a wide plot keeps its text readable, and scrolls in its box
    style = f"min-width: {min(width * 3 // 5, 900) if width > 720 else 0}px"
    alt = f"{plot.heading} of {title}"
    image = _tag("img", src=plot.file, alt=alt, width=str(width), height=str(height), style=style)
    link = _tag("a", image, href=plot.file, title="full size", class_="plot")
    return _tag("section", _tag("h2", plot.heading), _tag("p", plot.reading), link, id=_anchor(plot.file))


def _table(table: Table) -> Element:
    style = {"class_": "number"} if table.numbers else {}
    first, *others = table.columns
    header = _tag("tr", _tag("th", first), *(_tag("th", column, **style) for column in others))
    rows = [
        _tag("tr", _tag("td", name, *([_tag("small", note)] if note else [])), *(_tag("td", c, **style) for c in cells))
        for name, note, cells in table.rows
    ]
    return _tag("section", _tag("h2", table.heading), _tag("table", header, *rows), id=_anchor(table.heading))


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.partition(".")[0].lower())


def _tag(name: str, /, *children: str | Element, **attributes: str) -> Element:
    """An element; `class_` stands for `class`. Characters that control terminals or reorder text are escaped."""
    element = Element(name, {key.rstrip("_"): printable(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + printable(child)
        else:
            element.text = (element.text or "") + (child if name == "style" else printable(child))
    return element
