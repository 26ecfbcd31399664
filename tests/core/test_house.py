"""How the house is built: sizes that may only go down, who imports whom, and the names that are shared."""

import ast
import functools
import importlib
import sys

import pytest

import concurrent_prompts
from tests.helpers import ROOT, in_rows

CORE = ROOT / "concurrent_prompts.py"
FOLDERS = "backends", "extras"
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))

MOST_LINES, MOST_BYTES = 1_997, 94_995  # of the core: these only go down
MOST_LINES_OF_A_FILE = 800  # of backends and extras

# What the files of the two folders use of the core. A change here is a change for third parties, too.
PUBLIC = """
    AT_TIMES AUTO_CONCURRENCY Ask CONTENT_KEYS Call DEEPEST DEFAULT_ATTEMPTS DEFAULT_MODEL DEFAULT_TIMEOUT Error
    Evidence Http Journal LINE_START Limiter NEVER_THERE NOT_UTF8 NOT_WRITTEN NO_TOKENS Own PAUSE_CEILING PROBE
    PROGRAM Prompt PromptError RESULT_MOST Ran Record Reply Result Run STDIN TABLES UsageError __doc__ __loader__
    __name__ __version__ as_prompt_error beside beside_results best concurrently deliver disk_error dump duration
    encode_json extras_folder fingerprint flush hooked http_error in_short journaled keep line_at line_rows load
    lock log meanings new_runner no_service open_journal own_part own_prompt parse_json plural read_prompts
    recognised replacing result_in run_loop sequentially shallow short sibling text_of to_line token_counts
"""


@functools.cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def imports(path):
    """Return the modules that a file imports anywhere, relative ones with their dots."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} if node.module else {f"{module}{alias.name}" for alias in node.names}
    return found


def test_the_core_may_only_shrink():
    text = CORE.read_bytes()
    assert text.count(b"\n") <= MOST_LINES and len(text) <= MOST_BYTES


@in_rows("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_other_file_is_large(path):
    assert path.read_bytes().count(b"\n") <= MOST_LINES_OF_A_FILE


def test_the_core_imports_the_standard_library_alone():
    optional = {"orjson", "tqdm", "uvloop"}  # where they are used, if they are installed
    optional |= {"typing_extensions"}  # for type checkers, which bring it: never imported
    assert {name.partition(".")[0] for name in imports(CORE)} <= {*sys.stdlib_module_names, *optional}
    assert {name for name in imports(CORE) if name.startswith(".")} == set()


@in_rows("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_imports_its_own_folder_and_the_core_alone(path):
    ours = {name for name in imports(path) if name.startswith(".")}
    beside = {other.stem for other in path.parent.glob("*.py")} | {"core"}
    beside |= vars(importlib.import_module(f"concurrent_prompts.{path.parent.name}")).keys()
    assert ours <= {f".{name}" for name in beside}
    known = "concurrent_prompts", *FOLDERS
    assert not {name for name in imports(path) if name.partition(".")[0] in known} or path.stem == "__init__"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_imports_go_in_a_circle(folder):
    paths = {path.stem: path for path in FILES if path.parent.name == folder and path.stem != "__init__"}
    ahead = {name: {one.removeprefix(".") for one in imports(path)} & paths.keys() for name, path in paths.items()}
    while ahead:
        ends = {name for name, others in ahead.items() if not others}
        assert ends, f"a circle among {sorted(ahead)}"
        ahead = {name: others - ends for name, others in ahead.items() if name not in ends}


def test_what_a_worker_is_sent_stands_in_an_order_in_which_it_can_be_loaded():
    nodes = tree(ROOT / "backends" / "dask_cluster.py").body
    there = []
    for name in next(ast.literal_eval(node.value) for node in nodes if ast.unparse(node).startswith("FILES =")):
        wanted = {one.removeprefix(".") for one in imports(ROOT / "backends" / f"{name}.py") if one.startswith(".")}
        files = {path.stem for path in FILES if path.parent.name == "backends"} - {"__init__"}
        assert wanted & files <= set(there), name
        there.append(name)


def test_the_folders_use_public_names_of_the_core_alone():
    pytest.importorskip("concurrent_prompts.extras")
    used, core = set(), {"core", "this.core", "self._core", "job.core"}
    for path in FILES:
        for node in ast.walk(tree(path)):
            of = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(of, ast.Name | ast.Attribute) and ast.unparse(of) in core:
                used.add(node.attr)
    assert used == set(PUBLIC.split())
    assert all(hasattr(concurrent_prompts, name) for name in used)
    assert not [name for name in used if name.startswith("_") and not name.startswith("__")]


def test_all_names_are_there():
    assert all(hasattr(concurrent_prompts, name) for name in concurrent_prompts.__all__)
