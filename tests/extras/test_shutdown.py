"""A model's last days: the warning, and what it may cost."""

import asyncio
import datetime
import json
import pathlib

import pytest

import concurrent_prompts
from concurrent_prompts import load_backend, main
from concurrent_prompts.extras import shutdown
from tests.helpers import reply, scripted


@pytest.mark.parametrize(
    ("days", "said"),
    [
        *((days, "was to be shut down on") for days in (0, -30)),
        *((days, f"will be shut down in {days} day{'s' * (days > 1)}, on") for days in (1, 90)),
        *((days, None) for days in (91, "null", "soon")),
    ],
)
def test_a_model_that_is_to_be_shut_down(here, stand_in, capsys, days, said):
    date = str(datetime.date.today() + datetime.timedelta(days)) if isinstance(days, int) else days
    server = stand_in(shutdown=None if date == "null" else date, latency=0.03)
    assert main(["prompts.txt", "--base-url", server.url]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "shut down" in line]
    assert told == ([f"gpt-6-luna {said} {date}: choose another model (-m)"] if said else [])


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["-p", 'model="gpt-4o"'], "gpt-4o"),
        (["-m", "gpt-5"], "gpt-5"),
        (["batch.jsonl"], "gpt-4.1"),
        (["--compare"], "gpt-6-luna"),
    ],
)
def test_the_model_that_is_asked_is_looked_up_once(here, stand_in, capsys, arguments, model):
    body = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "x"}]}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    pathlib.Path("batch.jsonl").write_text(json.dumps(request))
    models = ("gpt-6-luna", "gpt-4o", "gpt-5", "gpt-4.1")
    server = stand_in(shutdown=str(datetime.date.today()), latency=0.03, models=models)
    source = [] if "batch.jsonl" in arguments else ["prompts.txt"]
    assert main([*source, *arguments, "--base-url", server.url, "-b", "stdlib"]) == 0
    told = [line.split()[0] for line in capsys.readouterr().err.splitlines() if "shut down" in line]
    assert told == [model]


@pytest.mark.parametrize("listing", [b"", b"[]", b"{}", b'{"data":[7]}', b'{"data":null}', b"<html>", b"\xff", None])
async def test_a_list_of_models_that_is_none_costs_nothing(caplog, listing):
    async with scripted(lambda head, body: reply(listing) if listing is not None else None) as (url, log):
        api = load_backend("stdlib", base_url=url)
        async with concurrent_prompts.Run(api) as run:
            await shutdown.warn_of_shutdown(run)
    assert len(log) == 1 and log[0][0].startswith(b"GET /v1/models ") and not caplog.records


def test_nobody_waits_for_the_list_of_models(here, stand_in, monkeypatch):
    ended = []

    async def never(run, path):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(path)

    monkeypatch.setattr(shutdown, "look_up", never)
    assert main(["prompts.txt", "--base-url", stand_in(latency=0.05).url]) == 0
    assert ended == ["/models"]
