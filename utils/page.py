"""A self-contained HTML file: headings, tables and embedded pictures; names are escaped."""

import base64
import html
import io

import numpy as np
from PIL import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1180px;
  padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.ahead { color: #00622f; } td.behind { color: #a33000; } td.unknown { color: #777; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 13px; }
.warning { background: #fff1d6; border-left: 4px solid #d08700; padding: .5em 1em; }
"""
CLASSES = {"ahead": "ahead", "behind": "behind", "cannot be told": "unknown"}


def page(title: str, parts: list[str]) -> str:
    """The whole file; `parts` are what the functions below return."""
    name = html.escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{name}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{name}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """kind: note, warning, or plain."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def table(markdown: list[str]) -> str:
    """The lines of a markdown table; verdicts are coloured besides being words."""
    head, _, *body = [line.strip().removeprefix("| ").removesuffix(" |") for line in markdown]
    rows = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head.split(" | "))]
    for line in body:
        cells = line.removesuffix(" |").split(" | ")
        kinds = [CLASSES.get(cell.strip(), "") for cell in cells]
        rows.append(
            "".join(f'<td class="{k}">{html.escape(c.strip())}</td>' for k, c in zip(kinds, cells))
        )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def picture(array: np.ndarray, caption: str) -> str:
    """(H, W, 3) uint8 inside the file."""
    Image.fromarray(array).save(buffer := io.BytesIO(), format="PNG", optimize=True)
    data, text = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
