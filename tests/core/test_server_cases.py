"""The cases of tests/server_cases.py in simulated time: what a run reaches that is told nothing of the server."""

import dataclasses
import random

import pytest

from tests import server_cases
from tests.helpers import virtual

pytest.importorskip("concurrent_prompts.extras.stand_in_limits")  # which test_limits needs
from tests.core.test_limits import LATENCY, SEEDS, Simulation, texts

# Where the goals are not reached yet: the span / ideal, the calls a prompt and the share refused that are.
REACHED = {
    "gate of 20/s, burst 0, 429": (1.35, 1.1, 0.06),
    "40 in 8 s, weighted, no headers, refused ones count": (1.4, 1.22, 0.18),
    "40 in 8 s, sliding, no headers": (1.35, 1.12, 0.1),
    "40 in 8 s, fixed, no headers": (1.3, 1.09, 0.08),
    "110 slots of 1.5 s, no headers": (1.55, 1.05, 0.0),
}
FEWER = {"100 in 1 s, sliding, no headers": 800}  # prompts, than in real time
LONG_WINDOWS = [  # minutes that began before the run, as many gateways count
    server_cases.window(100, 60, "fixed", 400),
    server_cases.window(20, 60, "fixed", 200),
    server_cases.window(100, 1, "fixed", 800),
]


async def measured(case, seed):
    """Run the case; return the span / ideal, the calls a prompt and the share refused."""
    random.seed(seed)  # the limiter draws, too
    server = Simulation(**LATENCY | case.server, seed=seed)
    flags = dict(zip(case.flags[::2], case.flags[1::2], strict=True))
    options = {name.strip("-"): float(value) for name, value in flags.items()}
    results, _ = await server.answer(texts(case.prompts, seed), **options)  # all of them
    latencies = [server.latencies[result.prompt.body] for result in sorted(results, key=lambda one: one.prompt.number)]
    best = case.ideal(latencies, server.came[0]) + case.pause
    return server.span / best, len(server.came) / case.prompts, server.share_rejected()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", server_cases.ALL, ids=lambda case: case.name)
@virtual
async def test_what_is_asked_of_a_case_is_reached(case, seed, caplog):
    case = dataclasses.replace(case, prompts=FEWER.get(case.name, case.prompts))
    span, calls, refused = await measured(case, seed)
    goals = case.within, case.calls, case.refused
    most = [max(pair) for pair in zip(goals, REACHED.get(case.name, goals), strict=True)]
    assert span <= most[0] + 0.005 and calls <= most[1] and refused <= most[2]
    assert "failed alike" not in caplog.text  # one of the first calls was let in


@pytest.mark.parametrize("case", LONG_WINDOWS, ids=lambda case: case.name)
@virtual
async def test_no_prompt_is_lost_while_a_window_is_learned(case):
    span, _, _ = await measured(case, 201)  # asserts that all are answered
    assert span <= case.within
