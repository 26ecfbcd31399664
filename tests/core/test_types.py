"""What a type checker finds in a program that uses the library: each mistake planted here, and nothing else."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PROGRAM = '''
from collections.abc import AsyncIterator
from concurrent_prompts import Limits, Reply, Result, as_completed, load_backend, run, run_concurrent, run_sequential

async def send(prompt: str) -> str:
    return prompt

async def whole(item: dict[str, str]) -> Reply:
    return Reply(item["prompt"], usage={"prompt_tokens": 1})

async def two(prompt: str, more: str) -> str:
    return prompt + more

def plain(prompt: str) -> str:
    return prompt

async def generated() -> AsyncIterator[str]:
    yield "a"

def sink(result: Result) -> None:
    print(result.id, result.as_row())

async def rights() -> None:
    """All of this is right."""
    found: list[Result] = await run_concurrent(generated(), send, concurrency=5, limits=Limits(rpm=5), progress=True)
    found += await run_sequential([{"prompt": "a"}], whole, output="o.jsonl", on_result=sink, retry=lambda failure: 5.0)
    stream = as_completed(iter("ab"), load_backend("stdlib"), concurrency="auto", return_exceptions=False)
    async for one in stream:
        print(one.text.upper(), one.error.message if one.error else "")
    await stream.aclose()

async def wrongs() -> None:
    await run_concurrent(["a"], send, concurency=5)  # mistake: a misspelt option
    await run_sequential(["a"], send, time_out=5)  # mistake: an option that is none
    await run_concurrent(["a"], send, timeout="5")  # mistake: a text
    await run_concurrent(["a"], plain)  # mistake: no coroutine function
    await run_concurrent(["a"], two)  # mistake: another argument
    await run_concurrent(5, send)  # mistake: no iterable
    for one in run_concurrent(["a"], send):  # mistake: not awaited
        pass
    async for result in as_completed(["a"], send, max_atempts=1):  # mistake: a misspelt option
        result.txt  # mistake: no such field
        result.error.status  # mistake: there may be no error
    await as_completed(["a"], send)  # mistake: nothing to await
    texts: list[str] = run(["a"], send)  # mistake: Results, not texts
    run(["a"], send, retry=lambda failure: [])  # mistake: no decision
    Limits(rmp=5)  # mistake: a misspelt option
'''
PLANTED = [number for number, line in enumerate(PROGRAM.splitlines(), 1) if "# mistake" in line]


def checker(name):
    """Return the command of a type checker; the test is skipped if it is not installed."""
    path = shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    return path or pytest.skip(f"no {name} here")


@pytest.mark.parametrize("name", ["mypy", "pyright"])
@pytest.mark.timeout(300)
def test_each_mistake_is_found_and_nothing_else(name, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [checker(name), "--config-file", "pyproject.toml", program]
    if name == "pyright":  # it takes a project's settings for the whole of it
        settings = f'{{"extraPaths": ["{ROOT}"], "typeCheckingMode": "strict", "include": ["program.py"]}}'
        (tmp_path / "pyrightconfig.json").write_text(settings.replace("\\", "/"))
        command = [checker(name), "-p", tmp_path]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    found = {int(number) for number in re.findall(r"program\.py:(\d+)(?::\d+)?(?: -)?:? error", ran.stdout)}
    assert found == set(PLANTED), ran.stdout + ran.stderr
