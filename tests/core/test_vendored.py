"""The module in somebody's package, under another name, and `main` called from Python."""

import asyncio
import gc
import importlib
import logging
import shutil
import signal
import subprocess
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import main
from tests.helpers import ROOT, reply, serving

USE = """
import sys
from mypkg._prompts import UsageError, load_backend, main, run
import backends

async def send(prompt):
    return prompt.upper()

print(run(["a"], send, output="o.jsonl")[0].text, backends.OWN)
try:
    api = load_backend("stdlib", base_url=sys.argv[1])
    print([one.text for one in run(["a", "b"], api)], main(["p.txt", "-q", "-b", "stdlib", "--base-url", sys.argv[1]]))
except UsageError as missing:
    print(missing)
print([name for name in sys.modules if name.startswith(("concurrent_prompts", "backends."))])
"""
LONE = "the folder backends/ is missing; it goes beside _prompts.py"


@pytest.mark.parametrize("folders", ["", "backends", "_backends", "backends extras", "_backends _extras"])
def test_a_copy_in_a_package_works_beside_a_projects_own_backends(tmp_path, folders):
    pytest.importorskip("concurrent_prompts.backends.stdlib")
    package = tmp_path / "mypkg"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "concurrent_prompts.py", package / "_prompts.py")
    for folder in folders.split():
        if not (source := ROOT / folder.removeprefix("_")).is_dir():
            pytest.skip(f"no {source.name} here")
        shutil.copytree(source, package / folder)
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("OWN = 'its own'\n")
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "use.py").write_text(USE)
    with serving(lambda head, body: reply()) as (url, log):
        command = [sys.executable, "-W", "error", "use.py", url]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    calls = "['hi', 'hi'] 0" if folders else LONE
    assert ran.stdout.splitlines() == ["A its own", calls, "[]"], ran.stderr
    assert not ran.stderr and len([head for head, _ in log if head.startswith(b"POST")]) == (3 if folders else 0)


def test_main_leaves_the_process_as_it_was(here):
    pytest.importorskip("concurrent_prompts.backends.stdlib")
    limits = pytest.importorskip("resource")
    log, before = logging.getLogger("concurrent_prompts"), limits.getrlimit(limits.RLIMIT_NOFILE)

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        streams = sys.stdout, sys.stderr, sys.stdout.errors
        return gc.get_threshold(), gc.get_freeze_count(), log.level, log.handlers[:], handlers, streams, [*sys.path]

    log.setLevel(logging.DEBUG)
    limits.setrlimit(limits.RLIMIT_NOFILE, (min(before[0], 900), before[1]))
    try:
        was = state(), limits.getrlimit(limits.RLIMIT_NOFILE)
        with serving(lambda head, body: reply()) as (url, _):
            for words, status in (["-v"], 0), (["--overwrite"], 0), (["--no-such"], 2):
                assert main(["prompts.txt", "-b", "stdlib", "--base-url", url, *words]) == status
        assert (state(), limits.getrlimit(limits.RLIMIT_NOFILE)) == was
    finally:
        log.setLevel(logging.NOTSET)
        limits.setrlimit(limits.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("own", ["", "_"])
def test_a_projects_own_folders_beside_the_copy_are_left_alone(tmp_path, monkeypatch, own):
    for folder in "backends", "extras":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
        for name in "evidence", "failures", "library", "limiter", "outputs", "reading", "rejections":
            (tmp_path / folder / f"{name}.py").write_text("raise SystemExit('not ours')")
    if own and (ROOT / "backends").is_dir():
        shutil.copytree(ROOT / "backends", tmp_path / "_backends")
    name = f"prompts_beside{own}"
    shutil.copy(ROOT / "concurrent_prompts.py", tmp_path / f"{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module(name)

    async def send(prompt):
        return prompt.upper()

    results = copy.run_loop(copy.run_concurrent(["a"], send, output=tmp_path / "o.jsonl"))
    assert results[0].text == "A" and bool(copy.meanings("failures")) == bool(own and (ROOT / "backends").is_dir())


def test_a_lone_copys_run_inside_a_running_loop_says_what_is_meant(monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "meanings", lambda *names: None)

    async def send(prompt):
        return prompt

    async def inside():
        with pytest.raises(concurrent_prompts.UsageError, match="write `await run_concurrent"):
            concurrent_prompts.run(["a"], send)

    asyncio.run(inside())
    assert concurrent_prompts.run(["a"], send)[0].text == "a"
