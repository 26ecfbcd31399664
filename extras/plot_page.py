"""The page of HTML around a picture of runs, with a table of their figures below."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
svg {{ max-width: 100%; height: auto }} div {{ overflow-x: auto }} table {{ border-collapse: collapse }}
th, td {{ padding: .15em 1em; text-align: right; border-bottom: 1px solid #ddd }} th:first-child {{ text-align: left }}
</style></head><body><h1>{title}</h1>
{picture}
<div><table><tr><th></th>{heads}</tr>
{lines}</table></div></body></html>
"""


def as_page(runs: Sequence[tuple[str, Mapping[str, str]]], svg: bytes) -> bytes:
    """Return the page; a run is its title and its figures, each with its name."""
    names = max((figures for _, figures in runs), key=len)
    heads = "".join(f"<th>{html.escape(title)}</th>" for title, _ in runs)
    lines = "".join(
        f"<tr><th>{name}</th>" + "".join(f"<td>{figures.get(name, '-')}</td>" for _, figures in runs) + "</tr>\n"
        for name in names
    )
    title = html.escape(runs[0][0] if len(runs) == 1 else f"{len(runs)} runs")
    picture = svg[svg.index(b"<svg") :].decode()
    return PAGE.format(title=title, picture=picture, heads=heads, lines=lines).encode()
