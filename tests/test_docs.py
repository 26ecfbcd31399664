"""README, CONTRIBUTING and docs/: their size, links and flags, and the commands that need no key and no network.

A `console` block is run as it stands, in one folder for each page. Numbers may differ, "..." stands for anything, and
a Python block whose first line is `# NAME.py` is saved under that name before.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import concurrent_prompts
from tests.helpers import ROOT, rows

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = {  # flags of other commands
    "sbatch": {"--array"},
    "dask": {"--host", "--no-dashboard", "--nthreads", "--tls-ca-file"},
    "pytest": {"--dist"},
    "tests.torture, benchmarks": {"--only", "--quick", "--requests", "--svg"},
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, kind):
    """Return the contents of a page's fenced blocks of that kind."""
    return [text for name, text in BLOCK.findall(page.read_text("utf-8")) if name == kind]


def prose(page):
    """Return a page without its fenced blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


def anchors(page):
    """Return what a link to a heading of the page may name, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- Size, links, flags --------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_lines_fit_into_120_columns(page):
    assert [line for line in page.read_text("utf-8").splitlines() if len(line) > 120] == []


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\((docs/[^)#]*)[)#]", (ROOT / "README.md").read_text("utf-8")))
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[2:]} - linked == set()


@each_page
def test_named_files_are_there(page):
    """`folder/file.py` in the text, and the files of tests that the page on security names."""
    text = page.read_text("utf-8")
    for name in re.findall(r"\b(?:backends|extras|tests|docs|benchmarks)/[\w/]+\.(?:py|md|svg)\b", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\btest_[a-z_]+", text):
        assert [*(ROOT / "tests").rglob(f"{name}.py")], name


@each_page
def test_flags_are_in_the_help(page):
    """`--help` is the reference; its words are tested elsewhere."""
    extras = pytest.importorskip("concurrent_prompts.extras")
    stand_in = pytest.importorskip("concurrent_prompts.extras.stand_in")
    options = pytest.importorskip("concurrent_prompts.backends.options")
    described = options.build_parser(extras.files_for(["--help"])).format_help()
    known = {*re.findall(r"--[a-z][\w-]*", described + stand_in.__doc__), "--skip", *set().union(*OTHERS.values())}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text("utf-8"))) - known == set()
    letters = {*re.findall(r"(?<!\S)-[a-zA-Z](?=[ ,])", described), "-9", "-P"}
    assert set(re.findall(r"(?<=`)-[a-zA-Z](?=[ `])", prose(page))) - letters == set()


def test_no_sentence_stands_in_two_places():
    seen = {}
    for page in PAGES:
        for paragraph in re.split(r"\n\n|\n(?=- |\|)", prose(page)):
            for sentence in re.split(r"(?<=[.:;]) ", " ".join(paragraph.split())):
                if len(sentence) > 60:
                    assert sentence not in seen, f"{page.name} and {seen[sentence]}: {sentence}"
                    seen[sentence] = page.name


# ---- What is said of inputs ----------------------------------------------------------------------------------


def test_the_readme_shows_a_prompt_of_each_form(here, stand_in):
    forms = re.findall(r"^\| `(\.\w+)`.*\| `(.*)` \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {suffix for suffix, _ in forms} == {".txt", ".jsonl", ".csv"}
    server = stand_in()
    for number, (suffix, example) in enumerate(forms):
        name = f"{number}{suffix}"
        (here / name).write_text(example.replace("⏎", "\n"), "utf-8")
        assert concurrent_prompts.main([name, "-b", "stdlib", "-q", "--base-url", server.url]) == 0, example
        (row,) = rows(f"{number}.results.jsonl")
        assert row["error"] is None
    assert server.stats.answered == len(forms)


def test_every_field_of_a_result_is_described(here, stand_in):
    described = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/results.md"))
    known = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| `.*", described, re.MULTILINE))))
    server = stand_in(fault={"500": 0.5}, rpm=60_000)
    command = ["prompts.txt", "-b", "stdlib", "-q", "--base-url", server.url, "-o"]
    assert concurrent_prompts.main([*command, "a.jsonl", "-p", "n=2"]) == 0
    assert concurrent_prompts.main([*command, "b.jsonl", "-e", "embeddings"]) == 0
    held = {field for row in [*rows("a.jsonl"), *rows("b.jsonl")] for field in row}
    assert held >= {"texts", "embedding", "tries", "limit"} and held - known == set()


# ---- Commands ------------------------------------------------------------------------------------------------


def commands(block):
    """Yield each command of a console block with what stands below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def pattern(output):
    """Return a regular expression for an output: numbers and the backend's name may be others, "..." is anything."""
    text = re.escape(output.rstrip()).replace(re.escape("..."), "(?s:.*)")
    text = re.sub(r"\d+(?:\\\.\d+)*(\\ m?s\b)?", lambda found: r"[\d.]+ m?s" if found[1] else r"[\d.]+", text)
    return re.compile(re.sub(r"\A(?:stdlib|raw\\-aiohttp)(?=\\ at)", "(?:stdlib|raw-aiohttp)", text) + r"\s*")


@pytest.mark.skipif(not shutil.which("sh"), reason="the commands are for a POSIX shell")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.name)
def test_commands_give_what_stands_below_them(page, tmp_path):
    pytest.importorskip("concurrent_prompts.extras")
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("concurrent_prompts.py", "backends", "extras"):
        (folder / name).symlink_to(ROOT / name)
    for text in blocks(page, "python"):
        if named := re.match(r"# (\w+\.py)\n", text):
            (folder / named[1]).write_text(text, "utf-8")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    pairs = [pair for block in blocks(page, "console") for pair in commands(block)]
    marked = "".join(f"{command}\nprintf '\\n\\036'\n" for command, _ in pairs)  # a record separator after each
    done = subprocess.run(["sh", "-c", f"exec 2>&1\n{marked}"], cwd=folder, env=environment, capture_output=True)
    outputs = done.stdout.decode("utf-8-sig").replace("\ufeff", "").split("\n\036")
    for (command, expected), output in zip(pairs, outputs, strict=False):
        assert pattern(expected).fullmatch(output.lstrip("\n")), f"$ {command}\n{output}"
    assert len(outputs) == len(pairs) + 1
