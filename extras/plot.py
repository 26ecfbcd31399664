"""Pictures of a run, drawn with matplotlib from its results file alone.

    python -m concurrent_prompts.extras.plot RESULTS.jsonl [MORE.jsonl ...] -o FILE.png|svg|html

Above is the waterfall: a bar for each prompt, from when it began to wait to its end, in the order in which they
started. Below are the calls in flight, the answers a second and the latencies. Several runs share one time axis, each
from its own 0. Where nothing was going on for long (run yesterday, continued today), that is cut out of the axis.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import html
import importlib.util
import io
import itertools
import logging
import math
import os
import re
import sys
import time
import warnings
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import core
from .files import open_regular, replacing, unwritable
from .plot_page import as_page
from .ran import times, title
from .tally import WAITS

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Spans = tuple[NDArray[np.int64], Floats, Floats]  # which prompt, from when, until when

SUFFIXES = (".png", ".svg", ".html")
WIDTH, DPI = 10.0, 120  # inches, dots an inch
BARS = 300  # prompts with a bar of their own; more are drawn in groups
RUNS = 10  # drawn at the most
COLUMNS = 1000  # of the time axis, if there are too many events to draw each
SHOWN = ("error", "attempts", "latency", "started", "slot_wait", "limit_wait", "retry_wait", "lost", "tries", "limit")
CLOCKS = ("started", "slot_wait", "limit_wait", "retry_wait", "lost", "latency")
LATEST = 32_503_680_000  # the year 3000: later times are errors
WAIT, BACKOFF, LOST, FAILED, ANSWER = range(5)
NAMES = ("waiting", "back-off", "failed attempt", "failed for good", "answered")
COLOURS = ("#E4E4E4", "#E69F00", "#D55E00", "#000000", "#005A94")  # distinct for the colour-blind, and in grey
LINES = ("#4D4D4D", "#008B66", "#B5548A", "#2E86C1", "#9A7D0A")  # of runs; the sixth is the first, dashed
STYLE: Any = {
    "text.parse_math": False,  # a title may have a $
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "concurrent_prompts",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--plot", metavar="FILE", help="picture of what ran when: .png, .svg or .html; needs matplotlib")


def create(args: argparse.Namespace) -> Plot | None:
    """Return what draws the picture, or None without --plot."""
    return Plot(args) if args.plot else None


class Plot:
    """The picture of a run, or of all runs of a comparison."""

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            check(args.plot)
        except ValueError as problem:
            raise core.UsageError(f"--plot: {problem}") from None
        args.writes.append(("--plot", args.plot))
        self._args = args
        self._clocks: list[list[dict[str, Any]]] = []  # of each run, the times that no results file holds

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Begin another run."""
        self._clocks.append([])
        self._unkept = run.path is None
        yield

    def on_result(self, result: core.Result) -> None:
        """Keep the times that no results file holds: for standard output, comparisons and Batch lines."""
        if result.done and (self._unkept or result.prompt.kind == "batch"):
            row = result.as_row()
            self._clocks[-1].append({name: row[name] for name in SHOWN if name in row})

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Draw the picture, and yield the line that names its file."""
        path, sink = self._args.plot, ran[0].run.journal
        kept = read(ran[0].run.path) if ran[0].run.path else ()
        earlier = sink and (sink.kept or sink.kept_errors)
        names = [self._args.name if earlier else title(one) for one in ran]
        try:
            rows = (itertools.chain(kept, clocks) for clocks in self._clocks)
            keys = core.sibling("backends", "keys")
            with keys.PublicEnvironment(self._args.api_key_env):  # matplotlib asks fc-list for fonts
                draw(path, [*zip(names, rows, strict=True)], self._args.journal)
            yield f"picture in {path}"
        except ValueError as failure:  # there is nothing to be seen yet
            yield f"no picture: {failure}"
        except OSError as failure:
            raise core.disk_error(path, failure) from None


def check(path: str) -> None:
    """Raise ValueError, in a sentence that says what to do, if no picture can be written to `path`."""
    if not path.lower().endswith(SUFFIXES):
        raise ValueError(f"{clean(path)}: a picture's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if why := unwritable(path):
        raise ValueError(f"{clean(why)}; name another file")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib: pip install matplotlib")


def read(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a results file; torn and damaged lines are skipped.

    Raises OSError where the file cannot be read.
    """
    with open_regular(path) as file:
        for line in file:
            if isinstance(row := core.parse_json(line), dict):
                yield row


def draw(path: str, runs: Sequence[tuple[str, Iterable[Mapping[str, Any]]]], *like: str) -> None:
    """Draw the runs, each a title and its rows, into the file, which gets no wider permissions than those `like` it.

    Raises ValueError where there is nothing to draw or `check` has something to say, and OSError.
    """
    check(path)
    with quiet():
        found = [Run.of(title, rows) for title, rows in runs]
        if not any(len(run.begin) for run in found):
            batch = ": Batch output has no times" if any(run.batch for run in found) else ""
            raise ValueError(f"there is no call to draw{batch}; draw the results of a run that sent something")
        kind = path.lower().rpartition(".")[2]
        drawn = [run for run in found if len(run.begin)][:RUNS]
        picture = as_image(drawn, len(found), "svg" if kind == "html" else kind)
        with replacing(path, *like) as file:
            told = [(run.title, dict(figures(run))) for run in found]
            file.write(as_page(told, picture) if kind == "html" else picture)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep matplotlib's notes (a font cache was built, a font lacks a letter) from standard error.

    And keep it from failing over a backend for the screen that is not there, as a notebook's may be: none is needed.
    """
    log, backend = logging.getLogger("matplotlib"), os.environ.pop("MPLBACKEND", None)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not|constrained_layout not")
            yield
    finally:
        log.setLevel(level)
        os.environ |= {"MPLBACKEND": backend} if backend is not None else {}


# ---- What the rows say ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What is drawn of a run: seconds from its first start, pauses cut out, prompts in the order of their start."""

    title: str
    rows: int  # including those with nothing to draw
    batch: bool  # there were lines of Batch output
    started: float  # Unix time
    wall: float  # until the last end; above 0, since it is a divisor
    begin: Floats
    end: Floats
    answers: Floats  # their latencies, the shortest first
    failed: NDArray[np.bool_]
    limit: Floats  # calls a second, NaN if unknown
    waits: list[float]  # of all prompts together, as in WAITS
    spans: list[Spans]  # by state: WAIT, BACKOFF, ...
    calls: list[Floats]  # when each went out, and when it ended
    cuts: list[tuple[float, float]]  # where a pause was cut out, and its length
    notes: list[str]  # of each prompt, where each has a bar of its own

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, Any]]) -> Run:
        """Gather the rows."""
        import numpy as np

        flat, pieces, notes = array("d"), array("d"), list[str]()
        count, batch = gather(rows, flat, pieces, notes)
        table = np.frombuffer(flat).reshape(-1, 9)
        order = np.argsort(table[:, 0], kind="stable")
        rank = np.argsort(order)
        table = table[order]
        started = float(table[:1, 0].sum())
        begin = table[:, 0] - started
        end = begin + table[:, 1:6].sum(axis=1)
        cuts = cut_pauses(begin, end)
        spans = states(begin, end, table, np.frombuffer(pieces).reshape(-1, 4), rank)
        _, *calls = map(np.concatenate, zip(*spans[LOST:], strict=True))
        failed, wall = table[:, 6] > 0, max(0.001, float(end.max(initial=0)))
        notes = [notes[place] for place in order] if len(order) <= BARS else []
        return cls(clean(title), count, batch, started, wall, begin, end, np.sort(table[~failed, 5]), failed,
                   table[:, 8].copy(), table[:, 1:5].sum(axis=0).tolist(), spans, calls, cuts, notes)  # fmt: skip


def gather(rows: Iterable[Mapping[str, Any]], flat: array[float], pieces: array[float], notes: list[str],
           ) -> tuple[int, bool]:  # fmt: skip
    """Add the times of each row that has any; return how many rows there were, and whether any was Batch output.

    `flat` gets nine numbers: the clocks, whether it failed, whether its attempts are known, and the limit.
    """
    count, batch = 0, False
    for count, row in enumerate(rows, 1):  # noqa: B007 - wanted after the loop
        clocks = clocks_of(row)
        if clocks is None:
            batch = batch or "custom_id" in row
            continue
        number, tries, limit = len(flat) // 9, row.get("tries"), row.get("limit")
        known = tries is not None and retried(number, tries, clocks, pieces)
        rate = limit / 60 if is_seconds(limit) and limit else math.nan
        flat.extend((*clocks, row.get("error") is not None, known, rate))
        if number < BARS:
            notes.append(note(row, clocks))
    return count, batch


def is_seconds(value: Any) -> bool:
    """Return whether a value is a time: a finite number, not a bool."""
    return type(value) in (int, float) and 0 <= value < LATEST


def clocks_of(row: Mapping[str, Any]) -> list[float] | None:
    """Return the times of a row, or None if nothing was sent or they are no times."""
    numbers: list[Any] = [row.get(name) for name in ("attempts", *CLOCKS)]
    return numbers[1:] if all(map(is_seconds, numbers)) and numbers[0] >= 1 else None


def note(row: Mapping[str, Any], clocks: Sequence[float]) -> str:
    """Return the text that a bar shows under the pointer."""
    parts = [f"sent {row['attempts']:.0f} times"] if row["attempts"] > 1 else []
    waits = zip(WAITS.values(), clocks[1:5], strict=True)
    parts += [f"{core.duration(wait)} {words}" for words, wait in waits if wait >= 0.0005]
    parts += [f"latency {core.duration(clocks[5])}"]
    if (error := row.get("error")) is not None:
        parts += [f"failed: {error.get('type') if isinstance(error, Mapping) else error}"]
    return f"{clean(str(row.get('id')), 60)}: {clean(', '.join(parts))}"


def retried(number: int, tries: Any, clocks: Sequence[float], pieces: array[float]) -> bool:
    """Add the spans of a prompt with several attempts: (number, state, from, until); False if `tries` holds no times.

    After a failed attempt comes the back-off, then the wait for the next; only their sums are known, so that each gap
    is shared out as all of them together.
    """
    latency, span = clocks[5], sum(clocks[1:])
    try:
        ends = [(offset, offset + seconds) for offset, seconds in tries if is_seconds(offset) and is_seconds(seconds)]
    except (TypeError, ValueError):
        return False
    last = max(span - latency, 0.0)
    edges = [0.0, *itertools.chain.from_iterable(ends), last]
    if len(ends) != len(tries) or any(two < one - 0.001 for one, two in itertools.pairwise(edges)):
        return False
    edges = list(itertools.accumulate((min(edge, last) for edge in edges), max))
    gaps = sum(two - one for one, two in zip(edges[2::2], edges[3::2], strict=True))
    share = min(1.0, clocks[3] / gaps) if gaps else 0.0
    pieces.extend((number, WAIT, 0.0, edges[1]))
    for place in range(1, len(edges) - 1, 2):
        begin, end, again = edges[place : place + 3]
        rested = end + share * (again - end)
        pieces.extend((number, LOST, begin, end, number, BACKOFF, end, rested, number, WAIT, rested, again))
    return True


def cut_pauses(begin: Floats, end: Floats) -> list[tuple[float, float]]:
    """Cut long idle pauses out of the times; return where they were and how long."""
    import numpy as np

    if not len(begin):
        return []
    reach = np.maximum.accumulate(end)
    idle = np.maximum(begin[1:] - reach[:-1], 0.0)
    least = max(10.0, 0.05 * float(reach[-1] - idle.sum()))
    pause = np.concatenate([[0.0], np.where(idle > least, idle, 0.0)])
    shift = np.cumsum(pause)
    begin -= shift
    end -= shift
    return [(float(begin[place]), float(pause[place])) for place in np.flatnonzero(pause)]


def states(begin: Floats, end: Floats, table: Floats, pieces: Floats, rank: NDArray[np.int64]) -> list[Spans]:
    """Return when which prompt was in which state.

    Where it is not known when an attempt failed, its time comes right after the waits.
    """
    import numpy as np

    row, failed, known = np.arange(len(begin)), table[:, 6] > 0, table[:, 7] > 0
    waited = begin + table[:, 1] + table[:, 2]
    lost = waited + table[:, 4]
    called = np.maximum(end - table[:, 5], begin)
    who = rank[pieces[:, 0].astype(np.int64)]
    shift = begin[who]
    found = []
    for state, since, until, which in (
        (WAIT, begin, waited, ~known),
        (BACKOFF, lost, called, ~known),
        (LOST, waited, lost, ~known),
        (FAILED, called, end, failed),
        (ANSWER, called, end, ~failed),
    ):
        which = which & ((until > since) | (state >= FAILED))
        piece = (pieces[:, 1] == state) & (pieces[:, 3] > pieces[:, 2])
        found.append((
            np.concatenate([row[which], who[piece]]),
            np.concatenate([since[which], (pieces[:, 2] + shift)[piece]]),
            np.concatenate([until[which], (pieces[:, 3] + shift)[piece]]),
        ))  # fmt: skip
    return found


def percentiles(ordered: Floats) -> dict[str, float]:
    """Return p50, p90 and p99, those for which there are enough answers."""
    count = len(ordered)
    shares = [share for share in (0.5, 0.9, 0.99) if count * (1 - share) >= 1 - 1e-9]
    return {f"p{100 * share:.0f}": float(ordered[math.ceil(count * share - 1e-9) - 1]) for share in shares}


def in_flight(begin: Floats, end: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return when the number of calls in flight changed, and to what.

    The clocks are cut off at the microsecond, so that one call may seem to end just after the next has begun: what
    overlaps by less than 10 of them does not count.
    """
    import numpy as np

    edges = np.concatenate([begin, np.maximum(begin, end - 1e-5)])
    steps = np.repeat(np.array([1, -1], np.int64), len(begin))
    order = np.argsort(edges, kind="stable")
    return edges[order], np.cumsum(steps[order])


def most_in_bins(edges: Floats, times: Floats, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most in flight between each two edges."""
    import numpy as np

    held = np.concatenate([[0], counts, [0]])  # held[i] is the count from times[i - 1] to times[i]
    first = np.searchsorted(times, edges[:-1], "right")
    last = np.searchsorted(times, edges[1:], "left") + 1
    return np.maximum.reduceat(held, np.stack([first, last], 1).ravel())[::2]


def coverage(group: NDArray[np.int64], groups: int, begin: Floats, end: Floats, columns: int, width: float) -> Floats:
    """Return how many of each group the spans cover in each column of that width, on average: groups x columns."""
    import numpy as np

    total = np.zeros(groups * (columns + 2))
    for at, sign in ((begin, 1.0), (end, -1.0)):
        place = np.clip(at / width, 0, columns)
        column = place.astype(np.int64)
        cell = group * (columns + 2) + column
        rest = place - column
        total += np.bincount(cell, sign * (1 - rest), len(total)) + np.bincount(cell + 1, sign * rest, len(total))
    return np.cumsum(total.reshape(groups, -1), axis=1)[:, :columns]


# ---- Words ---------------------------------------------------------------------------------------------------


def clean(text: str, most: int = 200) -> str:
    """Return what came from elsewhere as one line of at most so many characters, control characters escaped."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)


def day(run: Run) -> str:
    """Return when the run began."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))


def summary(run: Run) -> str:
    """Return a run in a sentence."""
    failed = f", {run.failed.sum():,} failed" if run.failed.any() else ""
    total = float(run.answers.sum())
    # Not "faster than one after another": latencies include the wait in the server's queue, which is empty that way.
    sums = f"latencies add up to {core.duration(total)}, {times(total / run.wall)} the time that it took"
    begin = f"{core.plural(len(run.begin), 'prompt')} in {core.duration(run.wall)}{failed}"
    return f"{begin}, {sums}" if total > 1.05 * run.wall else begin


def against(run: Run, first: Run) -> str:
    """Return the title of a run among several: its time, and how much faster than the first it gave as many answers."""
    text = f"{run.title}: {core.duration(run.wall)}"
    if len(run.begin) != len(first.begin):
        text += f" for {core.plural(len(run.begin), 'prompt')}"
    if run.failed.any():
        text += f", {run.failed.sum():,} failed"
    if len(run.answers) == len(first.answers) > 0 and first.wall > 1.05 * run.wall:
        text += f", {times(first.wall / run.wall)} faster"
    return text


# ---- The picture ---------------------------------------------------------------------------------------------


def as_image(runs: Sequence[Run], count: int, kind: str) -> bytes:
    """Return the picture of the runs as PNG or SVG; `count` is how many there would be."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        figure = lay_out(runs, count, notes=kind == "svg")
        buffer = io.BytesIO()
        title = ", ".join(run.title for run in runs)
        tags = {"Date": None, "Creator": None, "Title": title} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=tags)
    return with_notes(buffer.getvalue(), runs) if kind == "svg" else buffer.getvalue()


def lay_out(runs: Sequence[Run], count: int, notes: bool) -> Figure:
    """Return the figure."""
    from matplotlib.figure import Figure

    span = max(run.wall for run in runs)
    several = len(runs) > 1
    low = [1.0, 1.0, 0.2 + 0.17 * len(runs) if several else 1.4]
    low = low if any(len(run.answers) for run in runs) else low[:2]
    rest = sum(low) + 0.26 * len(runs) * several + 1.9
    least, most = (0.5, 2.4) if several else (1.2, 4.2 if len(runs[0].begin) <= BARS else 3.2)
    tall = [max(least, min(most, 0.13 * len(run.begin))) for run in runs]
    tall = [max(0.32, min(1.0, (11 - rest) / sum(tall)) * height) for height in tall]
    figure = Figure((WIDTH, sum(tall) + rest), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, hspace=0.02)  # type: ignore[union-attr, call-arg]
    axes = list(figure.subplots(len(tall) + len(low), 1, squeeze=False, height_ratios=[*tall, *low])[:, 0])
    for place, run in enumerate(runs):
        waterfall(axes[place], run, place, span, tall[place], notes)
        if several:
            axes[place].set_title(against(run, runs[0]), color=line_of(place)["color"], pad=3)
    flight(axes[len(runs)], runs, span)
    throughput(axes[len(runs) + 1], runs, span)
    if len(low) > 2:
        (compare_latencies if several else latencies)(axes[-1], runs)
    for one in axes[: len(runs) + 2]:
        time_axis(one, 0, span, "time since the start")
        if one is not axes[len(runs) + 1]:
            one.set_xlabel("")
            one.tick_params(labelbottom=False)
    head(axes[0], runs, count, span)
    return figure


def line_of(place: int) -> dict[str, Any]:
    """Return how the line of a run looks."""
    return {"color": LINES[place % len(LINES)], "linestyle": "--" if place >= len(LINES) else "-"}


def head(axes: Axes, runs: Sequence[Run], count: int, span: float) -> None:
    """Put the title, the summary and the legend above the first waterfall."""
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    sessions = f", {len(runs[0].cuts) + 1} sessions" if runs[0].cuts else ""
    title, text, above = f"{clean(runs[0].title, 60)}, {day(runs[0])}{sessions}", summary(runs[0]), 4
    if len(runs) > 1:
        most, least = (pick(len(run.begin) for run in runs) for pick in (max, min))
        title = f"{len(runs)} of {count} runs" if count > len(runs) else f"{len(runs)} runs"
        text = f"{core.plural(most, 'prompt')}{' each' if most == least else ' at most'}, {day(runs[0])}"
        above = 20
    seen = [state for state in range(5) if any((end - begin > span / 1000).any() or (state >= FAILED and len(row))
                                               for row, begin, end in (run.spans[state] for run in runs))]  # fmt: skip
    shift = ScaledTranslation(0, above / 72, axes.get_figure(root=True).dpi_scale_trans)  # type: ignore[union-attr]
    axes.legend(handles=[Patch(facecolor=COLOURS[state], label=NAMES[state]) for state in seen], title=text, ncols=5,
                loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=axes.transAxes + shift, alignment="left",
                borderpad=0, borderaxespad=0, handlelength=1.4, title_fontsize=9)  # fmt: skip
    axes.annotate(title, (0, 1), (0, above + 31), xycoords="axes fraction", textcoords="offset points",
                  weight="bold", size=11)  # fmt: skip


def scale(axes: Axes, label: str, top: float, whole: bool = True) -> None:
    """Scale the vertical axis from 0 to `top`, in few steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, top)
    axes.set_ylabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=whole))
    axes.yaxis.set_major_formatter("{x:,.0f}" if whole else "{x:,g}")


def time_axis(axes: Axes, low: float, high: float, label: str) -> None:
    """Scale the axis from `low` to `high` in the unit of time that fits."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    units = ((86400, "days", 5 * 86400), (3600, "h", 3 * 3600), (60, "min", 180), (1, "s", 1), (0.001, "ms", 0))
    unit, name = next((unit, name) for unit, name, least in units if high >= least)
    nice = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    steps = {"min": (0.5, 1, 2, 5, 10, 20, 30), "h": (0.5, 1, 2, 3, 6, 12)}.get(name)
    step = min(step for step in steps or nice if high - low <= 10 * step * unit)
    axes.xaxis.set_major_locator(MultipleLocator(step * unit))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,g}"))
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{label} ({name})")


def waterfall(axes: Axes, run: Run, place: int, span: float, height: float, notes: bool) -> None:
    """Draw a bar for each prompt, or for each group if there are many."""
    from matplotlib.ticker import MaxNLocator

    count = len(run.begin)
    lines = min(count, BARS if count <= BARS else max(40, min(BARS, int(height * 80))))
    if count <= BARS:
        bars(axes, run, span / COLUMNS)
        if notes:
            hover(axes, run, place)
    else:
        shades(axes, run, lines, max(2, round(COLUMNS * run.wall / span)))
    axes.set_ylim(count + 0.5, 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(4 if height < 1 else 6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    each = f"\n({math.ceil(count / lines):,} a line)" if count > lines else ""
    axes.set_ylabel(f"prompts, by start{each}" if height >= 1 else f"prompts{each}" if height > 0.55 else "")
    mark_cuts(axes, run, span, labels=True)


def bars(axes: Axes, run: Run, least: float) -> None:
    """Draw a bar for each prompt, the bars of a state as one path, and a call at least so wide that it is seen."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    half = 0.5 if len(run.begin) > 60 else 0.4
    for state, (row, begin, end) in enumerate(run.spans):
        if len(row):
            end = end if state in (WAIT, BACKOFF) else np.maximum(end, begin + least)
            top, low = row + 1 - half, row + 1 + half
            corners = np.array([[begin, top], [end, top], [end, low], [begin, low], [begin, top]])
            codes = np.tile(np.array([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], Path.code_type), len(row))
            path = Path(corners.transpose(2, 0, 1).reshape(-1, 2), codes)
            axes.add_patch(PathPatch(path, facecolor=COLOURS[state], linewidth=0, snap=False))
    ends = [(run.end[row], row + 1) for row in np.flatnonzero(run.failed)]
    if ends:
        size = max(2.0, min(5.0, 250 / len(run.begin)))
        axes.plot(*zip(*ends, strict=True), "x", color=COLOURS[FAILED], markersize=size, clip_on=False)


def hover(axes: Axes, run: Run, place: int) -> None:
    """Lay an invisible shape over each bar; with_notes() gives it the text that the pointer shows."""
    from matplotlib.patches import Rectangle

    for row, (begin, end) in enumerate(zip(run.begin, run.end, strict=True)):
        cover = Rectangle((begin, row + 0.5), max(end - begin, 1e-9), 1, fill=False, linewidth=0)
        cover.set_gid(f"prompt-{place}-{row}")
        cover.set_in_layout(False)
        axes.add_patch(cover)


def shades(axes: Axes, run: Run, lines: int, columns: int) -> None:
    """Draw a line for each group of prompts, in the mixed colours of what they were doing."""
    import numpy as np
    from matplotlib.colors import to_rgb

    count, width = len(run.begin), run.wall / columns
    shares = [coverage(row * lines // count, lines, begin, end, columns, width) for row, begin, end in run.spans]
    total = np.sum(shares, axis=0)
    mixed = sum(share[..., None] * np.array(to_rgb(COLOURS[state])) for state, share in enumerate(shares))
    image = np.dstack([mixed / np.maximum(total, 1e-12)[..., None], total])
    axes.imshow(np.clip(image, 0, 1), extent=(0, run.wall, count + 0.5, 0.5), aspect="auto",
                interpolation="none")  # fmt: skip


def mark_cuts(axes: Axes, run: Run, span: float, labels: bool = False) -> None:
    """Mark where a pause was cut out, with its length if there is room."""
    last = -math.inf
    for at, length in run.cuts:
        axes.axvline(at, color="black", linestyle=":", linewidth=1)
        if labels and at - last > 0.1 * span:
            last = at
            axes.annotate(f"{core.duration(length)} later", (at, 1), (2, -2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", va="top", size=8, ha="left" if at < 0.85 * span else "right",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})  # fmt: skip


def flight(axes: Axes, runs: Sequence[Run], span: float) -> None:
    """Draw the calls in flight over time; if there are too many, their mean, with pale least and most."""
    import numpy as np

    tops = []
    for place, run in enumerate(runs):
        begin, end = run.calls
        when, counts = in_flight(begin, end)
        many = len(when) > 2 * COLUMNS
        line = line_of(place) if len(runs) > 1 else {"color": COLOURS[ANSWER]}
        edges = np.linspace(0, run.wall, max(2, round(COLUMNS / (1 + many) * run.wall / span)) + 1)
        most = most_in_bins(edges, when, counts)
        if many:
            least = -most_in_bins(edges, when, -counts)
            axes.stairs(most, edges, baseline=least, fill=True, alpha=0.3, color=line["color"], linewidth=0)
            most = coverage(np.zeros(len(begin), np.int64), 1, begin, end, len(edges) - 1, float(edges[1]))[0]
        axes.stairs(most, edges, linewidth=1.2, **line)
        tops.append(int(counts.max(initial=1)))
    if len(runs) == 1:
        mark_cuts(axes, runs[0], span)
        text = f"mean, with the least and the most; at most {tops[0]:,}" if many else f"at most {tops[0]:,}"
        axes.set_title(text, loc="right", color=COLOURS[ANSWER], pad=2, size=8.5)
    scale(axes, "calls\nin flight", 1.08 * max(tops))


def throughput(axes: Axes, runs: Sequence[Run], span: float) -> None:
    """Draw the answers a second over time; of a single run also the failures, and the limit that was learned."""
    import numpy as np

    alone = runs[0] if len(runs) == 1 else None
    unit, name = next((unit, name) for unit, name in ((1, "a second"), (60, "a minute"), (3600, "an hour"))
                      if unit == 3600 or any(len(run.begin) * unit >= run.wall for run in runs))  # fmt: skip
    most = 0.0
    for place, run in enumerate(runs):
        edges = np.linspace(0, run.wall, max(5, min(60, len(run.begin) // 4)) + 1)
        line = {"color": COLOURS[ANSWER]} if alone else line_of(place)
        kinds = [(~run.failed, "answered", line), (run.failed, "failed for good", {"color": COLOURS[FAILED]})]
        for which, words, look in kinds if alone else kinds[:1]:
            if which.any():
                rate = unit * np.histogram(run.end[which], edges)[0] / edges[1]
                axes.stairs(rate, edges, linewidth=1.2, label=words, **look)
                most = max(most, float(rate.max()))
    if alone:
        most = limit_line(axes, alone, most, unit)
        mark_cuts(axes, alone, span)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0, borderaxespad=0.2)
    scale(axes, f"answers\n{name}", 1.12 * most or 1, whole=False)


def limit_line(axes: Axes, run: Run, most: float, unit: float) -> float:
    """Draw the known limit over time; return the highest value drawn."""
    import numpy as np

    known = np.flatnonzero(~np.isnan(run.limit))
    if not len(known):
        return most
    known = known[np.argsort(run.end[known], kind="stable")]
    when, limit = run.end[known], unit * run.limit[known]
    keep = np.unique(np.searchsorted(when, np.linspace(0, run.wall, COLUMNS), "right"))[1:] - 1  # the last in a column
    when, limit = np.append(when[keep], run.wall), np.append(limit[keep], limit[-1])
    label = f"limit of the server ({60 / unit * limit[-1]:,.0f} a minute)"
    if limit.min() > 3 * most > 0:  # it held nothing back, and its scale would flatten the answers
        axes.plot([], [], " ", label=f"{label}, far above")
        return most
    axes.step(when, limit, where="post", color=LINES[0], linestyle="--", linewidth=1.2, label=label)
    return max(most, float(limit.max()))


def latency_axis(axes: Axes, low: float, high: float) -> tuple[float, float, bool]:
    """Let the axis show latencies from `low` to `high`, in logarithms if they differ much; return the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (float(low), float(high)) if high > 1.001 * low else (0.5 * float(low), 1.5 * float(high))
    if high <= 10 * low:
        time_axis(axes, low, high, "latency of the answers")
        return low, high, False
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("latency of the answers")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{1000 * at:g} ms" if at < 1 else f"{at:,.0f} s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return low, high, True


def latencies(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw how the latencies of a run are distributed."""
    import numpy as np

    values = np.maximum(runs[0].answers, 1e-6)
    low, high, many = latency_axis(axes, values[0], values[-1])
    count = max(11, min(81, round(3 * len(values) ** (1 / 3)) | 1))
    edges = np.geomspace(low, high, count + 1) if many else np.linspace(low, high, count + 1)
    edges[0], edges[-1] = low, high  # to the last bit
    counts = np.histogram(values, edges)[0]
    axes.stairs(counts, edges, fill=True, color=COLOURS[ANSWER], alpha=0.35)
    for place, (name, value) in enumerate(percentiles(values).items()):
        axes.axvline(value, 0, 0.95 - 0.13 * place, color="black", linewidth=1)
        right = value > (math.sqrt(low * high) if many else (low + high) / 2)
        axes.annotate(f"{name} {core.duration(value)}", (value, 0.95 - 0.13 * place), (-3 if right else 3, 0),
                      xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
                      ha="right" if right else "left", size=8)  # fmt: skip
    scale(axes, "answers", 1.7 * counts.max())


def compare_latencies(axes: Axes, runs: Sequence[Run]) -> None:
    """Draw each run's latencies as a line from the least to the most, with the percentiles on it."""
    answers = {place: run.answers.clip(1e-6) for place, run in enumerate(runs) if len(run.answers)}
    low, high, many = latency_axis(axes, min(one[0] for one in answers.values()),
                                   max(one[-1] for one in answers.values()))  # fmt: skip
    room = 0.02 * (high - low)
    axes.set_xlim(*((low / 1.05, high * 1.05) if many else (low - room, high + room)))
    marks = {"p50": "o", "p90": "D", "p99": "|"}
    for place, one in answers.items():
        colour = line_of(place)["color"]
        axes.plot([one[0], one[-1]], [place, place], linewidth=1, marker=".", markersize=3, **line_of(place))
        for name, value in percentiles(one).items():
            axes.plot(value, place, marks[name], color=colour, markersize=5 if name != "p99" else 9)
    known = sorted(set().union(*(percentiles(one) for one in answers.values())))
    for name in known:
        axes.plot([], [], marks[name], color="black", markersize=5 if name != "p99" else 9, label=name)
    if known:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0, borderaxespad=0.2)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_yticks(range(len(runs)), [clean(run.title, 32) for run in runs])


# ---- The page ------------------------------------------------------------------------------------------------


def with_notes(svg: bytes, runs: Sequence[Run]) -> bytes:
    """Give each bar the text that the pointer shows."""

    def bar(match: re.Match[str]) -> str:
        run, row, left, top, right, bottom = match.groups()
        words = html.escape(runs[int(run)].notes[int(row)])
        corners = f"M{left} {top}H{right}V{bottom}H{left}z"
        return f'<path d="{corners}" fill="none" pointer-events="all"><title>{words}</title></path>'

    found = r'<g id="prompt-(\d+)-(\d+)">\s*<path d="M (\S+) (\S+)\s+L (\S+) \S+\s+L \S+ (\S+)[^>]*>\s*</g>'
    return re.sub(found, bar, svg.decode()).encode()


def figures(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the figures of a run, each with its name."""
    count, failed = len(run.begin), int(run.failed.sum())
    yield "prompts", f"{run.rows:,}"
    yield "answered", f"{count - failed:,}"
    yield "failed", f"{failed:,}"
    yield "without a call or times", f"{run.rows - count:,}"
    if count:
        answers = run.answers
        yield "began", day(run)
        yield "wall time", core.duration(run.wall)
        yield "sum of latencies", core.duration(float(answers.sum()))
        yield from ((f"latency {name}", core.duration(value)) for name, value in percentiles(answers).items())
        yield "most in flight", f"{in_flight(*run.calls)[1].max(initial=0):,}"
        waits = zip(WAITS.values(), run.waits, strict=True)
        yield from ((f"time {words}", core.duration(wait)) for words, wait in waits)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw results files."""
    parser = argparse.ArgumentParser(prog="python -m concurrent_prompts.extras.plot", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.jsonl", help="the results of each run to draw")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the picture: .png, .svg or .html")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    try:
        with core.sibling("backends", "keys").PublicEnvironment():  # matplotlib asks fc-list for fonts
            draw(args.output, [(os.path.basename(path), read(path)) for path in args.results])
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot use {clean(str(problem.filename or args.output))}: {problem.strerror or problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
