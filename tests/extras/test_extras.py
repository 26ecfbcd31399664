"""The extras' contract: the index and the files agree, only what is asked for is loaded, and none can do harm."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import UsageError, load_backend, main, run
from concurrent_prompts.backends import options
from concurrent_prompts.extras import INDEX, progress
from tests.helpers import ROOT, in_rows

PROGRAM = "concurrent_prompts.py: "
# What no flag loads: the contract, parts of other files, and what the core itself asks for
PARTS = ("__init__", "files", "inputs", "library", "limits", "outputs", "plot_page", "progress", "ran", "reading",
         "stand_in", "sweep", "tally", "wraps")  # fmt: skip
FILES = sorted(file.stem for file in (ROOT / "extras").glob("*.py") if not file.stem.startswith(PARTS))


def said(capsys):
    """Return standard error's lines, of which none may be a traceback's."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()


def python(*words, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=50)


# ---- The index -----------------------------------------------------------------------------------------------


def test_the_index_and_the_files_agree():
    assert sorted(INDEX) == FILES
    signs = [sign for own in INDEX.values() for sign in own if sign]
    assert len(signs) == len(set(signs)) and all(INDEX.values())


@in_rows("name", FILES)
def test_a_file_adds_the_flags_of_the_index_and_no_others(name):
    flags = []
    file = importlib.import_module(f"concurrent_prompts.extras.{name}")
    file.add_arguments(lambda *names, **_: flags.extend(names))
    core = [flag for action in options.build_parser()._actions for flag in action.option_strings]
    own = [sign for sign in INDEX[name] if sign.startswith("--")]
    assert flags == [flag for flag in own if flag not in core]
    assert file.__doc__ and callable(file.create)


def test_help_shows_a_group_for_each_file(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    groups = re.findall(r"^(\w+):\n  \S", capsys.readouterr().out, re.M)
    assert [name for name in groups if name in INDEX] == list(INDEX)


@in_rows("suffix", [sign for own in INDEX.values() for sign in own if sign.startswith(".")])
@in_rows("words", ["prompts{}", "prompts{}.gz", "p.txt -o out{}", "p.txt --output=OUT{}"])
def test_a_suffix_loads_its_file(suffix, words):
    files = concurrent_prompts.extras_folder().files_for(words.format(suffix).split())
    assert [own for own in INDEX if suffix in INDEX[own]] == [
        name for name in map(concurrent_prompts.extras.extra_name, files) if "" not in INDEX[name]]  # fmt: skip


LOADED = """
import atexit, sys
atexit.register(lambda: print("loaded:", *[name for name in sys.modules if ".extras" in name]))
import concurrent_prompts
sys.exit(concurrent_prompts.main(sys.argv[1:]))
"""


FILED = ["files", "outputs", "reading"]  # of every run


@pytest.mark.parametrize(("words", "loaded"), [
    (["p.txt", "-b", "stdlib", "-q"], [*FILED, "ran", "tally", *(name for name in INDEX if "" in INDEX[name])]),
    (["p.txt", "-b", "stdlib", "-q", "--report", "r.json"],
     [*FILED, "ran", "tally", *(name for name in INDEX if {"", "--report"} & {*INDEX[name]})]),
    (["--version"], None),
])  # fmt: skip
def test_only_what_is_asked_for_is_imported(tmp_path, stand_in, words, loaded):
    (tmp_path / "p.txt").write_text("one\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOADED}"
    ran = python("-c", code, *words, "--base-url", stand_in().url, cwd=tmp_path)
    expected = [] if loaded is None else ["", *(f".{name}" for name in loaded)]
    assert ran.returncode == 0, ran.stderr
    found = ran.stdout.splitlines()[-1].split()[1:]
    assert sorted(found) == sorted(f"concurrent_prompts.extras{name}" for name in expected)


# ---- What is not there ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """Return a function that runs the script from a copy that lacks some files."""
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "t.csv").write_text("prompt\none\n")
    for name in ("concurrent_prompts.py", "backends", "extras"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)

    def start(missing, *words):
        for name in missing:
            place = tmp_path / name
            (shutil.rmtree if place.is_dir() else os.remove)(place)
        return python(*words, cwd=tmp_path)

    return start


@pytest.mark.parametrize(("file", "words", "sentence"), [
    ("plot", "p.txt --plot x.png", "--plot needs extras/plot.py"),
    ("prices", "p.txt --max-cost=1", "--max-cost needs extras/prices.py"),
    ("table", "t.csv", ".csv needs extras/table.py"),
    ("table", "p.txt -o - --format csv", "--format csv needs extras/table.py"),
])  # fmt: skip
def test_a_flag_whose_file_is_missing_names_it(copied, file, words, sentence):
    ran = copied([f"extras/{file}.py"], "concurrent_prompts.py", *words.split())
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"{PROGRAM}{sentence}, which goes beside concurrent_prompts.py\n"


URL = "--base-url http://127.0.0.1:9/v1"


@pytest.mark.parametrize(("missing", "words", "sentence"), [
    ("extras", "p.txt -o answers.csv", "a .csv file needs the folder extras/"),
    ("extras", "p.txt --compare -c 1,4", "--compare needs the folder extras/, which"),
    ("backends/stdlib.py", "p.txt -b stdlib", "backend stdlib needs backends/stdlib.py"),
    ("backends", "p.txt -b stdlib", "the folder backends/ is missing; it goes beside"),
    ("backends/keys.py", "p.txt -b stdlib", "backends/keys.py is missing; it goes beside"),
])  # fmt: skip
def test_what_needs_a_file_that_is_missing_is_refused(copied, missing, words, sentence):
    ran = copied([missing], "concurrent_prompts.py", *f"{words} {URL}".split())
    assert ran.returncode == 2 and sentence in ran.stderr and len(ran.stderr.splitlines()) == 1, ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("missing", ["extras", "extras/__init__.py"])
def test_without_extras_the_main_job_runs(copied, stand_in, tmp_path, missing):
    url = stand_in().url
    ran = copied([missing], "concurrent_prompts.py", "p.txt", "-b", "stdlib", "--base-url", url)
    assert ran.returncode == 0 and "1 answered" in ran.stderr, ran.stderr
    ran = copied([], "concurrent_prompts.py", "p.txt", "--plot", "x.png")
    advice = "other options are in the folder extras/, which goes beside concurrent_prompts.py"
    assert ran.returncode == 2 and advice in ran.stderr and len(ran.stderr.splitlines()) == 1


ALONE = """
from concurrent_prompts import UsageError, run

async def send(prompt):
    return prompt.upper()

print(*(result.text for result in run(["one", "two"], send)))
for short in ({"max_cost": 1}, {"price": (1, 2)}):
    try:
        run(["one"], send, **short)
    except UsageError as problem:
        print(problem)
"""


def test_the_module_alone_answers_with_a_coroutine(copied):
    ran = copied(["extras", "backends"], "-c", ALONE)
    assert ran.returncode == 0 and ran.stdout.splitlines() == [
        "ONE TWO",
        "max_cost needs the folder extras/, which goes beside concurrent_prompts.py",
        "price needs the folder extras/, which goes beside concurrent_prompts.py",
    ]


# ---- A third party's -----------------------------------------------------------------------------------------


@pytest.fixture
def third(tmp_path, monkeypatch):
    """Return a function that saves a module where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def save(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    yield save
    for name in ("mine", "yours"):
        sys.modules.pop(name, None)


MINE = """
import contextlib

def add_arguments(option):
    option("--mine", action="store_true")

def create(args):
    return Mine()

class Mine:
"""
RAISING = {  # hook: the method, the exit status, and how many answers are paid and kept
    "command": ("def command(self): 1 / 0", 2, 0),
    "check": ("def check(self): 1 / 0", 2, 0),
    "select": ("def select(self, prompts): 1 / 0", 2, 0),
    "select, later": ("def select(self, prompts): yield next(iter(prompts)); 1 / 0", 3, 1),
    "count": ("def select(self, prompts): return prompts\n def count(self, lines): 1 / 0", 2, 0),
    "session": ("def session(self, run): 1 / 0", 2, 0),
    "session, enter": ("@contextlib.asynccontextmanager\n async def session(self, run): yield 1 / 0", 2, 0),
    "session, exit": ("@contextlib.asynccontextmanager\n async def session(self, run):\n  yield\n  1 / 0", 3, 3),
    "wrap": ("def wrap(self, attempt): 1 / 0", 2, 0),
    "wrap, before": ("def wrap(self, attempt):\n  async def call(prompt): 1 / 0\n  return call", 3, 0),
    "wrap, after": ("def wrap(self, attempt):\n  async def call(it): 1 / await attempt(it)\n  return call", 3, 1),
    "on_result": ("def on_result(self, result): 1 / 0", 3, 2),
    "status": ("def status(self, ran): 1 / 0", 3, 1),
    "report": ("def report(self, ran, status): 1 / 0", 3, 3),
    "report, later": ("def report(self, ran, status): yield 'a line'; 1 / 0", 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("case", RAISING)
def test_a_hook_that_raises_is_one_sentence_and_loses_nothing(here, stand_in, third, capsys, monkeypatch, case):
    monkeypatch.setattr(progress.Progress, "EVERY", 0.005)
    method, status, paid = RAISING[case]
    third("mine", f"{MINE} {method}\n")
    third("yours", MINE.replace("--mine", "--yours") + " def wrap(self, attempt): return attempt")
    server = stand_in(latency=0.02)
    command = ["prompts.txt", "-c", "1", "--base-url", server.url]
    assert main([*command, "--extra", "mine", "--extra=yours"]) == status
    lines = [line for line in said(capsys) if not line.startswith(("stopping (", "  1 x extra: "))]
    error = "TypeError: unsupported operand type(s)" if case == "wrap, after" else "ZeroDivisionError: division by zero"
    stopped = "stopped: " if status == 3 and not case.startswith("report") else ""
    (sentence,) = [line for line in lines if "extra mine" in line and "Error" in line]
    assert sentence.startswith(f"{PROGRAM}{stopped}extra mine, {case.partition(',')[0]}: {error}")
    rows = here / "prompts.results.jsonl"
    kept = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    assert sum(row["text"] is not None for row in kept) == server.stats.answered == paid
    assert ("a line" in "".join(lines)) == (case == "report, later")
    assert main([*command, "-q", "--retry-failed"]) == 0  # nothing stands in the way of the next run
    assert server.stats.answered == 3 + (case == "wrap, after")  # whose answer could not be looked at


@pytest.mark.parametrize(("text", "sentence"), [
    ("def add_arguments(option): 1 / 0\ndef create(args): pass",
     "extra mine, add_arguments: ZeroDivisionError: division by zero"),
    ("def add_arguments(option): pass\ndef create(args): 1 / 0",
     "extra mine, create: ZeroDivisionError: division by zero"),
    ("def add_arguments(option): option('--rpm')\ndef create(args): pass",
     "extra mine, add_arguments: ArgumentError: argument --rpm: conflicting option string: --rpm"),
    ("1 / 0", "--extra mine: ZeroDivisionError: division by zero"),
    ("import sys; sys.exit(1)", "--extra mine: SystemExit: 1"),
    ("def (", "--extra mine: SyntaxError: "),
    ("import nowhere_at_all", "--extra mine: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("", "--extra mine: AttributeError: module 'mine' has no attribute 'add_arguments'"),
    ("add_arguments = create = 1", "--extra mine: it needs the functions add_arguments and create"),
    (None, "--extra mine: ModuleNotFoundError: No module named 'mine'"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_one_sentence(here, stand_in, third, capsys, text, sentence):
    if text is not None:
        third("mine", text)
    server = stand_in()
    assert main(["prompts.txt", "--extra", "mine", "--base-url", server.url]) == 2
    (line,) = said(capsys)
    assert line.startswith(PROGRAM + sentence) and server.stats.requests == 0


@pytest.mark.parametrize(("words", "sentence"), [
    ("--extra mine --extra yours", "extra yours, add_arguments: ArgumentError: argument --mine: "),
    ("--to-batch x.jsonl --dry-run", "--to-batch only writes requests; leave out --dry-run"),
    ("--merge a.jsonl --to-batch x.jsonl", "--merge only merges results; leave out --to-batch"),
    ("--dry-run --report r.json", "--dry-run sends nothing that --report or --plot could show; leave them out"),
    ("--compare --shard 1/2", "--compare writes no results that could be merged; leave out --shard"),
    ("--compare --max-cost 1", "--compare sends every prompt several times and keeps no results; leave out --max-cost"),
])  # fmt: skip
def test_two_that_contradict_each_other_are_one_sentence(here, third, capsys, words, sentence):
    third("mine", MINE + " pass")
    third("yours", MINE + " pass")
    assert main(["prompts.txt", *words.split()]) == 2
    (line,) = said(capsys)
    assert line.startswith(PROGRAM + sentence) and sorted(path.name for path in here.glob("*.json*")) == []


def test_one_in_the_current_folder_is_found(tmp_path, stand_in):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "own.py").write_text(f"{MINE} def report(self, ran, status): yield 'mine was here'")
    words = "p.txt", "--extra", "own", "--mine", "-b", "stdlib", "--base-url", stand_in().url
    ran = python(ROOT / "concurrent_prompts.py", *words, cwd=tmp_path)
    assert ran.returncode == 0 and "  mine was here\n" in ran.stderr, ran.stderr


def test_the_one_to_blame_is_the_innermost_that_raised(here, stand_in, third, capsys):
    inner = " def wrap(self, attempt):\n  async def call(prompt): {}\n  return call"
    third("mine", MINE + inner.format("return await attempt(prompt)"))
    third("yours", MINE.replace("--mine", "--yours") + inner.format("raise ValueError('no')"))
    assert main(["prompts.txt", "-q", "--extra", "mine", "--extra", "yours", "--base-url", stand_in().url]) == 3
    assert f"{PROGRAM}stopped: extra yours, wrap: ValueError: no" in said(capsys)


# ---- In Python -----------------------------------------------------------------------------------------------


class Shouting:
    """Makes an answer louder, and counts what came."""

    came, ended = 0, False

    def wrap(self, attempt):
        async def loud(prompt):
            reply = await attempt(prompt)
            return reply._replace(text=reply.text.upper())

        return loud

    def on_result(self, result):
        self.came += 1


async def echo(prompt):
    return prompt


def test_extras_are_passed_as_they_are():
    extra = Shouting()
    assert [result.text for result in run(["one", "two"], echo, extras=[extra])] == ["ONE", "TWO"]
    assert extra.came == 2


def test_one_that_fails_costs_no_result(caplog):
    class Late(Shouting):
        def session(self, run):
            return self

        async def __aenter__(self):
            pass

        async def __aexit__(self, *failure):
            raise OSError("too late")

    with caplog.at_level(logging.ERROR):
        assert [result.text for result in run(["one"], echo, extras=[Late()])] == ["ONE"]
    assert "stopped: extra test_extras, session: OSError: too late" in caplog.text


def test_one_that_cannot_begin_leaves_nothing_open():
    class Early(Shouting):
        def wrap(self, attempt):
            raise ValueError("not today")

        async def __aenter__(self):
            pass

        async def __aexit__(self, kind, failure, _):
            self.ended = kind is UsageError

        def session(self, run):
            return self

    with pytest.raises(UsageError, match="extra test_extras, wrap: ValueError: not today"):
        run(["one"], echo, extras=[extra := Early()])
    assert extra.ended


def test_the_short_forms(stand_in):
    url, schema = stand_in().url, {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert {result.error.type for result in run(["?"] * 3, backend(url), max_cost=1e-9)} <= {"budget", "not_sent"}
    assert run(["?"], backend(url), max_cost=1)[0].error is None
    assert run(["?"], backend(url, model="unheard-of"), max_cost=1, price=(1, 2))[0].error is None
    with pytest.raises(UsageError, match="price"):
        run(["?"], backend(url, model="unheard-of"), max_cost=1)
    with pytest.raises(ValueError, match="price"):
        run(["?"], backend(url), price=(1, -2))
    assert isinstance(json.loads(run(["?"], backend(url, schema=schema))[0].text)["n"], int)


def backend(url, **settings):
    return load_backend("stdlib", base_url=url, **settings)


@in_rows(
    "words",
    [
        ["p.txt", "-t", "{prompt}.csv"],
        ["p.txt", "--template", "{prompt}.tsv"],
        ["p.txt", "--template={prompt}.csv"],
        ["p.txt", "-t{prompt}.csv"],
        ["p.txt", "-s", "Answer as in x.csv"],
        ["p.txt", "-p", 'user="a.csv'],
    ],
)
def test_a_text_that_ends_like_a_file_loads_nothing(words):
    files = concurrent_prompts.extras_folder().files_for(words)
    assert "table" not in [concurrent_prompts.extras_folder().extra_name(file) for file in files]


@in_rows(
    "words", [["-t", "{a}", "p.csv"], ["p.txt", "-o", "a.csv"], ["-o=a.tsv"], ["p.csv.gz"], ["-tx", "p.csv"]]
)
def test_a_file_by_its_suffix_is_loaded(words):
    files = concurrent_prompts.extras_folder().files_for(words)
    assert "table" in [concurrent_prompts.extras_folder().extra_name(file) for file in files]
