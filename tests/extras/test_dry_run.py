"""Dry runs: what would be sent and cost, and that nothing is."""

import json
import sys
import types

import pytest

import concurrent_prompts
from concurrent_prompts import main
from concurrent_prompts.extras import demo, dry_run
from tests.helpers import completion, constant


@pytest.fixture
def offline(monkeypatch):
    """Let tiktoken be absent."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)


def dry(capsys, *arguments):
    status = main([*arguments, "--dry-run"])
    return status, capsys.readouterr().out


def test_a_dry_run_needs_no_key_and_writes_nothing(prompts, capsys, offline, tmp_path):
    before = sorted(tmp_path.iterdir())
    status, out = dry(capsys, prompts, "-p", "max_completion_tokens=100", "--rpm", "10", "--max-cost", "5")
    words = " ".join(out.split())
    assert status == 0 and sorted(tmp_path.iterdir()) == before
    assert "prompts 30 in " in words and "to send 30 " in words
    assert "tokens out at most 3,000" in words
    assert "out = at most $0.0015" in words and "prices of 2026-11-05" in words
    assert "at least 2 min 54 s at 10 requests/min" in words
    assert "--max-cost $5.00 suffices" in words
    assert "POST https://api.openai.com/v1/chat/completions" in out and '"max_completion_tokens": 100' in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_dry_run_shows_no_key(prompts, capsys, monkeypatch, offline):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Trace: sk-secret-0123456789\nCookie: a=secret-1; b=secret-2")
    status, out = dry(capsys, prompts, "--base-url", "https://example.org/v1?api-key=hidden-key-1&api-version=2")
    assert status == 0 and "secret" not in out and "hidden" not in out
    assert "Authorization: Bearer ***" in out and "?api-version=2&***" in out


def test_a_dry_run_groups_what_cannot_be_read(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"fine"\n' + "".join(f"{' ' * n}{{broken\n" for n in range(5)) + "[1]\n")
    status, out = dry(capsys, str(path))
    words = " ".join(out.split())
    assert status == 1 and "prompts 7 in" in words and "to send 1 " in words
    assert "5 x " in words and "line 2: not JSON" in words and "1 x " in words and "line 7: neither a text" in words


def test_a_dry_run_of_nothing_usable(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{broken\n")
    assert dry(capsys, str(path))[0] == 2
    path.write_text("")
    assert main([str(path), "--dry-run"]) == 2


def test_a_dry_run_knows_what_is_answered(prompts, backend, capsys, offline, tmp_path):
    answer, _ = constant(completion())
    main([prompts, *backend(answer), "-n", "20", "-m", "gpt-6-luna"])
    path = tmp_path / "prompts.results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": 21, "text": "cut o')  # another run is writing
    before = path.read_bytes()
    with path.open("ab") as other:
        assert concurrent_prompts.lock(other, path)
        status, out = dry(capsys, prompts, "-m", "gpt-6-luna", "--max-cost", "0.002")
    words = " ".join(out.split())
    assert status == 0 and path.read_bytes() == before
    assert "answered 20 in " in words and "to send 10 " in words
    assert "if they are like the answers so far" in words
    assert "may not suffice" in words


def test_a_dry_run_says_what_it_does_not_know(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out = dry(capsys, str(path), "-m", "llama", "-p", 'tools=[{"type":"function"}]', "--compare")
    words = " ".join(out.split())
    assert status == 0 and "unknown: no price for llama; give --price IN,OUT" in words
    assert "besides images, audio and files and tools and schemas: not counted" in words
    assert "in each of 2 runs" in words
    assert max(map(len, out.splitlines())) <= 80


def test_a_dry_run_starts_no_server(capsys, monkeypatch, offline):
    monkeypatch.setattr(demo, "demo_server", None)
    status, out = dry(capsys, "--demo")
    assert status == 0 and "made-up" in out


def test_tokens_are_counted_where_that_can_be(prompts, capsys, monkeypatch):
    module = types.ModuleType("tiktoken")
    encoding = types.SimpleNamespace(name="o200k_base", encode_ordinary=str.split)
    module.encoding_for_model = lambda model: {"gpt-4o": encoding}[model]
    module.get_encoding = lambda name: encoding
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    words = " ".join(dry(capsys, prompts, "-m", "openai/gpt-4o")[1].split())
    assert "tokens in about 270, counted by tiktoken (o200k_base)" in words  # 2 words, and 7 around each message
    assert "approximate for this model" in " ".join(dry(capsys, prompts, "-m", "llama")[1].split())


def test_a_slow_download_is_not_waited_for(prompts, capsys, monkeypatch):
    import threading

    end = threading.Event()
    module = types.ModuleType("tiktoken")
    module.encoding_for_model = lambda model: end.wait(60)
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    monkeypatch.setattr(dry_run, "ENCODING_TIMEOUT", 0.01)
    status, out = dry(capsys, prompts)
    end.set()
    assert status == 0 and "did not load in time" in " ".join(out.split())
