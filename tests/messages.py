"""List every text that a user may see, so that a review shows each wording that changes: `tests/messages.txt`.

    python -m tests.messages            write the list anew
    python -m tests.messages --check    print how the sources differ from the list; exit status 1 if they do

A text is a string in the sources that holds two words: a message, a hint, a warning, a line of the report, the help of
an option. What f-strings fill in is {…}. Docstrings (the manuals of --help NAME), patterns, and what the stand-in
server says in the words of other servers are left out. There are no line numbers: a text may move within its file.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "messages.txt"
SOURCES = "*.py", "backends/*.py", "extras/*.py"
# Tables of what servers say, and the stand-in's imitation of it: no words of ours.
OTHERS = {"backends/meanings.py"}
OTHERS |= {f"extras/stand_in_{part}.py" for part in ("answers", "batches", "dialects", "http", "limits", "streams")}
PATTERNS = {"compile", "match", "fullmatch", "search", "sub", "split", "finditer", "findall", "forms"}
WORDS = re.compile(r"[^\W\d_]{2,}[,;:.)']* [\w({'\"-]|[\w)}'\"][,;:.]* [^\W\d_]{2,}")
HOLE = "{…}"


def text_of(node: ast.AST) -> str:
    """Return a string, an f-string or a sum of them with its holes marked; "" for everything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return f"{left or HOLE}{right or HOLE}" if left or right else ""
    return ""


def holes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions that fill the holes of a text."""
    if isinstance(node, ast.JoinedStr):
        yield from (part.value for part in node.values if isinstance(part, ast.FormattedValue))
    elif isinstance(node, ast.BinOp):
        for side in (node.left, node.right):
            yield from holes(side) if text_of(side) else [side]


def passed_over(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children that hold no text for the user: docstrings, patterns, tables of words, annotations."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        yield node.value
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATTERNS:
        yield from node.args[:1]
        yield node.func  # "a table of words".split()
    elif isinstance(node, ast.AnnAssign | ast.arg) and node.annotation:
        yield node.annotation
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
        yield node.returns


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts of two words or more in a node of the syntax tree."""
    if text := text_of(node):
        yield from [text] * bool(WORDS.search(text) and text.count("\n") < 3)  # more lines are a program or a page
        below = holes(node)
    else:
        over = {id(one) for one in passed_over(node)}
        below = (child for child in ast.iter_child_nodes(node) if id(child) not in over)
    for one in below:
        yield from texts(one)


def listed() -> str:
    """Return the list as the sources have it."""
    lines = []
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        found = sorted({repr(text)[1:-1] for text in texts(ast.parse(path.read_text("utf-8")))})
        if name not in OTHERS and found:
            lines += [f"# {name}", *found, ""]
    return "\n".join(lines)


def differences() -> list[str]:
    """Return the lines in which the list and the sources differ, "-" and "+" before them."""
    kept = LIST.read_text("utf-8").splitlines() if LIST.exists() else []
    changes = difflib.unified_diff(kept, listed().splitlines(), "tests/messages.txt", "the sources", lineterm="", n=0)
    return [line for line in changes if not line.startswith("@@")]


def main(argv: list[str]) -> int:
    """Write the list, or check it; return the exit status."""
    if argv == ["--check"]:
        print(*(changed := differences()), sep="\n")
        return bool(changed)
    LIST.write_text(listed(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
