"""What a type checker finds in a program that uses the library: each mistake planted here, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.test_installed import install

PROGRAM = '''
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent_prompts import (
    Limits, Reply, Result, as_completed, load_backend, read_prompts, run, run_concurrent, run_sequential)

async def send(prompt: str) -> str:
    return prompt

async def whole(item: dict[str, str]) -> Reply:
    return Reply(item["prompt"], usage={"prompt_tokens": 1})

async def count(prompt: object) -> int:
    return 1

async def either(prompt: str) -> Reply | bytes:
    return Reply(b"") if prompt else b""

async def maybe(prompt: str) -> str | None:
    return prompt or None

class Sender:
    async def __call__(self, prompt: str) -> list[float]:
        return []

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
    found: list[Result[str]] = await run_concurrent(generated(), send, concurrency=5, limits=Limits(rpm=5))
    found += await run_sequential([{"prompt": "a"}], whole, output="o.jsonl", on_result=sink, retry=lambda failure: 5.0)
    plainly: list[Result] = [*found, *run(["a"], count)]
    print(plainly, sum(result.text for result in run([1, 2], count)), [result.text.upper() for result in found])
    print([result.text.hex() for result in run(("a", "b"), either)], [one.text or "" for one in run(["a"], maybe)])
    print([one.text[0] + 1.5 for one in await run_sequential((text for text in "ab"), Sender())])
    print([one.text.upper() for one in await run_concurrent(read_prompts("p.jsonl"), send)])
    mixed: list[str | dict[str, str]] = ["a", {"prompt": "b"}]
    print([result.text + 1 for result in run(mixed, count)])
    stream = as_completed(iter("ab"), load_backend("stdlib"), concurrency="auto", return_exceptions=False)
    async for one in stream:
        print(one.text.upper(), one.error.message if one.error else "")
    await stream.aclose()
    numbers: AsyncGenerator[Result[int], None] = as_completed(["a"], count)
    print([result.text + 1 async for result in numbers])

async def wrongs() -> None:
    await run_concurrent(["a"], send, concurency=5)  # mistake: a misspelt option
    await run_sequential(["a"], send, time_out=5)  # mistake: an option that is none
    await run_concurrent(["a"], send, timeout="5")  # mistake: a text
    await run_concurrent(["a"], plain)  # mistake: no coroutine function
    await run_concurrent(["a"], two)  # mistake: another argument
    await run_concurrent(5, send)  # mistake: no iterable
    await run_concurrent([1, 2], send)  # mistake: not the item that `send` takes
    await run_sequential(["a"], whole)  # mistake: not the item that `send` takes
    run([{"prompt": 1}], whole)  # mistake: not the item that `send` takes
    run(generated(), whole)  # mistake: not the item that `send` takes
    print([one.text.upper() for one in run(["a"], count)])  # mistake: not what `send` returns
    print([one.text + 1 for one in run(["a"], send)])  # mistake: not what `send` returns
    bytes_: list[Result[bytes]] = await run_sequential(["a"], send)  # mistake: not what `send` returns
    print([one.text.upper() for one in run(["a"], maybe)])  # mistake: not always what `send` returns
    for one in run_concurrent(["a"], send):  # mistake: not awaited
        pass
    for result in as_completed(["a"], send):  # mistake: not asynchronous
        pass
    async for result in as_completed([1], send):  # mistake: not the item that `send` takes
        pass
    async for result in as_completed(["a"], send, max_atempts=1):  # mistake: a misspelt option
        result.txt  # mistake: no such field
        result.error.status  # mistake: there may be no error
    async for counted in as_completed(["a"], count):
        text: str = counted.text  # mistake: not what `send` returns
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
def test_each_mistake_is_found_and_nothing_else_nor_in_a_copied_file(name, tmp_path):
    command = checker(name)
    python, _ = install("bdist_wheel", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    shutil.copy(ROOT / "concurrent_prompts.py", tmp_path / "_prompts.py")
    settings = {"strict": ["program.py"], "include": ["*.py"]}  # pyright's strictest is not for the module itself
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    words = ["-p", tmp_path, "--pythonpath", python]
    if name == "mypy":
        words = ["--strict", "--python-executable", python, "program.py", "_prompts.py"]
    ran = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    found = re.findall(r"(\w+)\.py:(\d+)(?::\d+)?(?: -)?:? (?:error|warning)", ran.stdout)
    assert {*found} == {("program", str(number)) for number in PLANTED}, ran.stdout + ran.stderr
