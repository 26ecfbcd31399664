"""What the report says of a run, from what was counted."""

from concurrent_prompts import Error, Prompt, Result
from concurrent_prompts.backends import console
from concurrent_prompts.extras.tally import Tally


def test_answers_that_are_not_whole_are_named_in_the_report():
    tally = Tally()
    reasons = ["length", "max_output_tokens", "content_filter", "STOP", "stop", None, "pause_turn", "tool_calls"]
    for number, reason in enumerate(reasons):
        tally.add(Result(Prompt(number, ""), "a", finish_reason=reason))
    thought = {"more": {"reasoning_content": "Hm."}}
    served, used_up = {"extra": {"service_tier": "flex"}}, {"tokens": (5, 9, 0, 9)}
    for more in ({}, served, used_up, {"extra": thought}, {"finish_reason": "length"} | used_up):
        tally.add(Result(Prompt(9, ""), "", **{"finish_reason": "stop"} | more))
    others = {"text": None, "extra": {"embedding": [1.0]}}, {"text": "", "extra": {"texts": ["", "b"]}}, {"text": None}
    for more in others:
        tally.add(Result(Prompt(9, ""), **more))
    assert sorted(tally.warnings()) == [
        "1 answered but ended by content_filter: see their text",
        "1 answered but ended by max_output_tokens: raise max_completion_tokens (-p)",
        "1 answered but ended by pause_turn: see their text",
        "2 answered but empty",
        "2 answered but empty: reasoning took all tokens; raise max_completion_tokens (-p), or ask for less reasoning",
        "2 answered but ended by length: raise max_completion_tokens (-p)",
    ]
    for number in range(1000):
        tally.add(Result(Prompt(9, ""), "a", finish_reason=f"r{number}"))
    assert len(tally.marked) <= tally.KINDS + 1, "a server may name as many as it likes"


def test_the_report_fits_into_80_columns(capsys):
    tally = Tally()
    waits = {"slot_wait": 5000.0, "limit_wait": 5000.0, "retry_wait": 5000.0, "lost": 5000.0}
    for number in range(200):
        usage = {"prompt_tokens": 10**6, "completion_tokens": 10**6, "prompt_tokens_details": {"cached_tokens": 10**6}}
        prompt = Prompt(number, "")
        tally.add(Result(prompt, attempts=9, latency=99.0, usage=usage, **waits))
    tally.wall = 1000.0
    console.say(*tally.figures(), indent="  ", width=80)
    lines = capsys.readouterr().err.splitlines()
    assert 60 < max(map(len, lines)) <= 80 and len(lines) > len(list(tally.figures()))


def test_kinds_of_failures_without_end_are_told_apart_up_to_a_point():
    tally = Tally()
    for number in range(1000):
        tally.note(Error(f"code_{number}", "m", 400))
    tally.note(Error("code_3", "m", 400))
    counts = {error.type: count for error, count in tally.failures()}
    assert len(counts) == tally.KINDS + 1 and counts["others"] == 1000 - tally.KINDS and counts["code_3"] == 2
