"""The tables, in Markdown, and the picture, an SVG with a ground of its own for any page."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from .runs import Run

WIDTH, LEFT, TOP, STEP, BAR = 860, 300, 86, 30, 19
SPAN = WIDTH - LEFT - 84  # of the longest bar
OURS = ("stdlib", "raw-aiohttp", "openai-sdk")


@dataclass
class Cell:
    """The values of the rounds, and what they should be; or the reason why there are none."""

    values: list[float]
    form: str
    most: float | None = None
    least: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if not self.values:
            return "-"
        low, median, high = (f"{at(self.values):{self.form}}" for at in (min, statistics.median, max))
        text = median + f" ({low}-{high})" * (low != high)
        shown = float(median.replace(",", ""))  # what is printed is what is judged
        if self.most is not None:
            text += f" ≤ {self.most:{self.form}} " + ("✓" if shown <= self.most else "✗")
        if self.least is not None:
            text += f" ≥ {self.least:{self.form}} " + ("✓" if shown >= self.least else "✗")
        return text


def cell(
    runs: Sequence[Run],
    of: Callable[[Run], float],
    base: Sequence[Run] = (),
    form: str = ".2f",
    most: float | None = None,
    least: float | None = None,
) -> Cell:
    """Return a figure of the runs or, with a base, its ratio to that of the base, round by round."""
    why = next((run.error for run in runs if run.error), "")
    if why or any(run.error for run in base):
        return Cell([], form, why=why)
    values = [of(one) / of(two) for one, two in zip(runs, base, strict=True)] if base else [of(run) for run in runs]
    return Cell(values, form, most, least)


@dataclass
class Table:
    """Rows of figures; a client without any is a line below, with the reason."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)

    def add(self, name: str, *cells: Cell) -> None:
        self.rows.append((name, list(cells)))

    def __str__(self) -> str:
        lines = [["", *self.columns]]
        lines += [[name, *map(str, cells)] for name, cells in self.rows if any(one.values for one in cells)]
        lines = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        texts = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
        whys = [f"- {name}: {whys[0]}" for name, cells in self.rows if (whys := [one.why for one in cells if one.why])]
        return "\n".join([f"{self.title}:", "", *texts, *[""] * bool(whys), *whys, ""])


def draw(bars: list[tuple[str, float]], facts: str) -> str:
    """Return the picture of requests a second by client, ours in colour, the fastest first."""
    bars = sorted(bars, key=lambda bar: -bar[1])
    height = TOP + STEP * len(bars) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#1f2328" role="img">',
        "<title>Requests per second on one core, by client</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        '<text x="20" y="34" font-size="19" font-weight="bold">Requests per second on one core</text>',
        '<text x="20" y="58" fill="#57606a">256 in flight, answered at once. In blue: '
        '<tspan fill="#0a63c9" font-weight="bold">concurrent_prompts</tspan>, whole job: retries, limits, journal'
        "</text>",
    ]
    for row, (name, value) in enumerate(bars):
        top, width = TOP + row * STEP, max(1.5, SPAN * value / bars[0][1])
        colour, weight = ("#0a63c9", "bold") if name.startswith(OURS) else ("#8c959f", "normal")
        lines += [
            f'<text x="{LEFT - 10}" y="{top + 15}" text-anchor="end" font-weight="{weight}">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{LEFT + width + 8:.1f}" y="{top + 15}" font-weight="{weight}">{value:,.0f}</text>',
        ]
    note = f'<text x="20" y="{height - 14}" font-size="11" fill="#57606a">{escape(facts)}</text>'
    return "\n".join([*lines, note, "</svg>", ""])
