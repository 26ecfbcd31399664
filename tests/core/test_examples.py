"""The backends and the extra that docs/ shows, run as they stand there."""

import importlib
import json
import pathlib
import sys
import types

import pytest

from concurrent_prompts import main
from tests.helpers import ROOT

TEXT = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("backends.md", "extras.md"))


@pytest.fixture
def saved(here, monkeypatch):
    """Return a function that saves the code block after a sentence as a module in the current folder."""
    names = []

    def save(name, sentence):
        before, _, code = TEXT[TEXT.index(sentence) :].partition("```python\n")
        assert before.strip() == sentence
        (here / f"{name}.py").write_text(code.partition("```")[0])
        names.append(name)
        importlib.invalidate_caches()

    yield save
    for name in names:
        sys.modules.pop(name, None)


def rows(path="prompts.results.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# ---- An extra ------------------------------------------------------------------------------------------------


def test_the_extra_leaves_prompts_out(saved, here, stand_in, capsys):
    saved("skip", "One that leaves prompts out:")
    (here / "done.txt").write_text("2\n")
    server = stand_in()
    command = ["prompts.txt", "--extra", "skip", "--base-url", server.url]
    assert main([*command, "--skip", "done.txt"]) == 0
    assert [row["id"] for row in rows()] == [1, 3] and server.stats.requests == 2
    error = capsys.readouterr().err
    assert "2 answered" in error and "\n  1 left out by --skip\n" in error
    assert main(command) == 0  # without its flag it does nothing
    assert [row["id"] for row in rows()] == [1, 2, 3] and server.stats.requests == 3
    assert "left out" not in capsys.readouterr().err


def test_the_extra_refuses_a_file_that_is_not_there(saved, stand_in, capsys):
    saved("skip", "One that leaves prompts out:")
    assert main(["prompts.txt", "--extra", "skip", "--skip", "none.txt", "--base-url", stand_in().url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "concurrent_prompts.py: --skip none.txt: [Errno 2] No such file or directory: 'none.txt'"


def test_the_extra_shows_its_flag(saved, capsys):
    pytest.importorskip("concurrent_prompts.extras")
    saved("skip", "One that leaves prompts out:")
    with pytest.raises(SystemExit):
        main(["--extra", "skip", "--help"])
    assert "\nskip:\n  --skip FILE " in capsys.readouterr().out


# ---- Backends ------------------------------------------------------------------------------------------------


@pytest.fixture
def httpx(monkeypatch):
    """The library under the name that the text uses; httpx2, which comes with the openai SDK, has the same parts."""
    found = pytest.importorskip("httpx2")
    monkeypatch.setitem(sys.modules, "httpx", found)


def test_the_backend_answers_and_tries_again(saved, httpx, stand_in):
    saved("mine", "With httpx, for one:")
    server = stand_in(fault={"500": 0.3, "reset": 0.3}, seed=1)
    pathlib.Path("prompts.txt").write_text("".join(f"question {n}\n" for n in range(20)))
    assert main(["prompts.txt", "-b", "mine:connect", "--base-url", server.url, "-q"]) == 0
    assert [row["error"] for row in rows()] == [None] * 20
    assert server.stats.faults["500"] and server.stats.faults["reset"]


class LLM:
    """As much of vLLM as the text uses."""

    def __init__(self, model):
        self.model = model

    def chat(self, conversations, params, use_tqdm):
        assert len(conversations) == len(params) and use_tqdm is False
        return [self.answer(messages[-1]["content"], one["max_tokens"])
                for messages, one in zip(conversations, params, strict=True)]  # fmt: skip

    def answer(self, asked, most):
        text = f"{self.model}: {asked}"[:most]
        output = types.SimpleNamespace(text=text, token_ids=[1] * len(text), finish_reason="stop")
        return types.SimpleNamespace(outputs=[output], prompt_token_ids=[1, 2, 3])


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_the_bulk_backend_answers_in_this_process(saved, vllm, here, capsys):
    saved("mine", "With vLLM in this process, no server between:")
    assert main(["prompts.txt", "-b", "mine:submit", "-m", "m", "-p", "max_completion_tokens=12"]) == 0  # without a key
    assert [row["text"] for row in rows()] == ["m: What is o", "m: What is t", "m: What is t"]
    assert ("tokens 9 in, 36 out" if (ROOT / "extras").is_dir() else "3 answered") in capsys.readouterr().err
    lines = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
              "body": {"model": name, "messages": [{"role": "user", "content": "?"}]}} for name in "ab"]  # fmt: skip
    (here / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["two.jsonl", "-b", "mine:submit", "-q"]) == 2
    assert "this input names several models; make a file of each" in capsys.readouterr().err
