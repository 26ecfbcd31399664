"""Who else is on the machine: modules that lie in the current folder, and what child processes are told."""

import json
import os
import subprocess
import sys

import pytest

from concurrent_prompts.backends import keys as keys_file
from tests.helpers import LIBRARIES, ROOT

KEY = "sk-never-to-be-seen-0123456789"
LAUNCHER = "import sys\nfrom concurrent_prompts import main\nsys.exit(main())\n"
ENTRIES = {"-m": ["-m", "concurrent_prompts"], "console script": [], "script": [str(ROOT / "concurrent_prompts.py")]}
MINE = """
import contextlib, json

@contextlib.asynccontextmanager
async def connect(base_url, headers, concurrency):
    async def post(path, body):
        return 200, {}, json.dumps({"choices": [{"message": {"content": "mine"}}]}).encode()

    yield post
"""
SECRETS = {
    "OPENAI_API_KEY": KEY,
    "OPENAI_ADMIN_KEY": "an-admin's-0123456789",
    "OPENAI_CUSTOM_HEADERS": "X-Access-Pass: pass-0123456789",
    "OPENAI_BASE_URL": "https://example.com/v1?key=query-0123456789",
    "HTTPS_PROXY": "http://someone:proxy-0123456789@127.0.0.1:9",
    "all_proxy": "http://someone:proxy-0123456789@127.0.0.1:9",
    "MY_OWN": "named-0123456789",
    "A_COPY": f"Bearer {KEY}",
}
OPEN = {"HTTP_PROXY": "http://127.0.0.1:9", "OPENAI_PROJECT_ID": "p-1", "AWS_REGION": "x", "SSH_AUTH_SOCK": "/s"}
WATCH = """
import json, os, sys

def watch(event, arguments):
    if event == "subprocess.Popen":
        environment = arguments[3] or os.environ
        with open({place!r}, "a") as file:
            file.write(json.dumps([arguments[1], dict(environment)]) + chr(10))

sys.addaudithook(watch)
"""


@pytest.fixture
def traps(set_traps, tmp_path):
    folder = tmp_path / "traps"
    folder.mkdir()
    (folder / "p.txt").write_text("one\ntwo\n")
    return folder, set_traps(folder)


@pytest.fixture
def secrets(monkeypatch):
    for name, value in (SECRETS | OPEN).items():
        monkeypatch.setenv(name, value)
    return SECRETS


def command_line(entry, folder, *arguments, path=(), **more):
    """Run the command in the folder, by `python -m`, the console script or the file; return the finished process."""
    launcher = folder.parent / "concurrent-prompts"
    launcher.write_text(LAUNCHER)
    start = ENTRIES[entry] or [str(launcher)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))} | more
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=50
    )


@pytest.mark.parametrize("entry", ["console script", "script"])
def test_nothing_that_lies_in_the_current_folder_is_imported(traps, stand_in, entry):
    folder, sprung = traps
    more = "-b", "stdlib", "--base-url", stand_in().url, "--report", "r.json"
    ran = command_line(entry, folder, "p.txt", "--compare", *more)
    assert (ran.returncode, sprung.exists()) == (0, False), ran.stderr
    assert json.loads((folder / "r.json").read_text())["runs"][-1]["answered"] == 2


def test_nor_by_minus_m_and_no_child_process_inherits_a_secret(traps, secrets, tmp_path):
    """Of these, `-m` alone has the folder in sys.path: so with all that may be imported, and the demo's server."""
    pytest.importorskip("concurrent_prompts.extras")
    folder, sprung = traps
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(place=str(tmp_path / "children")))
    names = [name for name, library in LIBRARIES.items() if found(library)]
    more = ["--demo", "--compare", "-b", ",".join(["stdlib", *names]), *["--plot", "p.svg"] * found("matplotlib")]
    more += ["--report", "r.json", "--api-key-env", "MY_OWN"]
    ran = command_line("-m", folder, "p.txt", *more, path=[tmp_path], MPLCONFIGDIR=str(tmp_path / "no-fonts-known-yet"))
    assert (ran.returncode, sprung.exists()) == (0, False), ran.stderr
    runs = json.loads((folder / "r.json").read_text())["runs"]
    assert {run["backend"] for run in runs} == {"stdlib", *names} and {run["answered"] for run in runs} == {2}
    children = [json.loads(line) for line in (tmp_path / "children").read_text().splitlines()]
    known = {*["uname"] * found("openai"), *["fc-list"] * found("matplotlib")} if sys.platform != "win32" else set()
    assert known < {command[0] for command, _ in children}
    assert any("extras.stand_in" in str(command) for command, _ in children)
    values = [value.rpartition(" ")[2] for value in SECRETS.values()]
    for command, environment in children:
        shown = "\n".join([*environment, *environment.values()])
        assert not [value for value in values if value in shown], command


def found(library):
    try:
        __import__(library)
    except ImportError:
        return False
    return True


def test_nor_by_the_tools_of_the_package(traps):
    pytest.importorskip("concurrent_prompts.extras")
    folder, sprung = traps
    (folder / "r.jsonl").write_text("")
    for module in ("concurrent_prompts.extras.plot", "concurrent_prompts.extras.stand_in"):
        command = [sys.executable, "-m", module, "--help"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)
        assert (ran.returncode, sprung.exists()) == (0, False), ran.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_backend_of_ones_own_in_the_current_folder_is_found(tmp_path, entry):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "p.txt").write_text("one\n")
    ran = command_line(entry, folder, "p.txt", "-b", "mine:connect", "--base-url", "http://127.0.0.1:1/v1")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((folder / "p.results.jsonl").read_text())["text"] == "mine"


def test_a_current_folder_that_is_the_modules_own_is_kept(tmp_path):
    pytest.importorskip("concurrent_prompts.extras")
    for name in ("concurrent_prompts.py", "backends", "extras"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = subprocess.run(
        [sys.executable, "-m", "concurrent_prompts", "--demo", "-n", "1", "-b", "stdlib", "-q"],
        cwd=tmp_path, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert ran.returncode == 0 and "made up" in ran.stdout, ran.stderr


# ---- The environment of child processes ----------------------------------------------------------------------


def test_the_variables_that_hold_secrets(secrets):
    assert keys_file.secret_variables("MY_OWN") == secrets.keys()


def test_secrets_come_back_when_the_last_has_started_its_process(secrets):
    before = dict(os.environ)
    public = keys_file.PublicEnvironment
    first, second = public(), public("MY_OWN")
    first.__enter__()
    assert before.keys() - os.environ.keys() == secrets.keys() - {"MY_OWN"}
    second.__enter__()
    first.__exit__()
    assert before.keys() - os.environ.keys() == secrets.keys()
    second.__exit__()
    assert dict(os.environ) == before
