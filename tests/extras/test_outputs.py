"""Files that others can reach: permissions, what stands in a file's place, and lines that somebody has made up."""

import contextlib
import functools
import json
import os
import pathlib
import stat
import types

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

import concurrent_prompts
from concurrent_prompts import Error, Result, UsageError, as_prompts, main, open_journal
from concurrent_prompts.backends.api import Api
from concurrent_prompts.backends.bulk import PendingJobs

unix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and permissions as Unix has them")
NOWHERE = ("--base-url", "http://127.0.0.1:9/v1")  # with a call the exit status would be 3
FAILED = Error("http_500", "boom", 500, True)


def extra(name):
    """Return an extra's file, or skip the test if it is not there."""
    return pytest.importorskip(f"concurrent_prompts.extras.{name}")


def prepare(items):
    return [Api(None, base_url="http://test/v1").prepare(prompt) for prompt in as_prompts(items)]


def answer(path, items, **options):
    """Do a run that answers all that is open."""
    with open_journal(pathlib.Path(path), **options) as journal:
        for prompt in journal.left(prepare(items)):
            journal.append(Result(prompt, text="an answer", attempts=1))
        journal.finish()


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ---- Permissions ---------------------------------------------------------------------------------------------


@pytest.fixture
def created(monkeypatch):
    """Return the permissions that each file had when it was made, by its name."""
    modes, original = {}, os.open

    def spy(path, flags, *more, **options):
        new = flags & os.O_CREAT and not os.path.lexists(path)
        number = original(path, flags, *more, **options)
        if new:
            modes[os.path.basename(path)] = mode(number)
        return number

    monkeypatch.setattr(os, "open", spy)
    before = os.umask(0o022)
    yield modes
    os.umask(before)


@unix
def test_what_is_written_beside_the_results_is_never_readable_to_more(here, created, stand_in):
    pytest.importorskip("matplotlib")
    url = stand_in().url
    for name, items in (("out.csv.results.jsonl", ["gone", "What is one?"]), ("plain.jsonl", ["What is one?"])):
        pathlib.Path(name).touch(0o600)
        answer(name, items)
    more = ["--report", "r.json", "--plot", "p.svg", "--max-cost", "1", "--price", "1,1", "-p", "max_tokens=9"]
    assert main(["prompts.txt", "-o", "out.csv", "--overwrite", "--base-url", url, "-q", *more]) == 0
    answer("out.csv.results.jsonl", ["another"])
    PendingJobs(pathlib.Path("plain.jsonl"), "somebody").add({"a": 1})
    names = ["out.csv", "r.json", "p.svg", "out.csv.results.jsonl.spent", "out.csv.results.superseded.jsonl"]
    names += ["plain.jsonl.running", "out.csv.results.jsonl"]
    assert {name: mode(name) for name in names} == dict.fromkeys(names, 0o600)
    assert len(created) >= 6 and set(created.values()) == {0o600}, created


@unix
def test_a_results_file_that_is_made_anew_or_rescued_keeps_its_permissions(tmp_path, created):
    path, other = tmp_path / "r.jsonl", tmp_path / "other"
    path.touch(0o640)
    with open_journal(path) as journal:
        path.unlink()
        journal.attend()
        assert mode(path) == 0o640
        path.replace(other)
        path.mkdir()
    assert created == {"r.jsonl": 0o640, "r.rescued.jsonl": 0o640}


@unix
def test_a_side_file_that_was_readable_to_more_is_narrowed(tmp_path):
    path = tmp_path / "r.jsonl"
    answer(path, ["a"])
    path.chmod(0o600)
    for name in ("r.superseded.jsonl", "r.jsonl.spent", "r.jsonl.running"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o666)
    answer(path, ["b"])
    extra("budget").Budget(1.0).save(path)
    PendingJobs(path).add({})
    assert {mode(file) for file in tmp_path.iterdir()} == {0o600}


@unix
def test_what_is_replaced_keeps_its_permissions_and_what_is_new_follows_the_umask(tmp_path, created):
    for name, before in (("private", 0o600), ("group", 0o664), ("new", None)):
        if before is not None:
            (tmp_path / name).touch()
            (tmp_path / name).chmod(before)
        with extra("files").replacing(tmp_path / name) as draft:
            draft.write(b"x")
    assert [mode(tmp_path / name) for name in ("private", "group", "new")] == [0o600, 0o664, 0o644]
    drafts = {name: mode for name, mode in created.items() if name.endswith(".tmp")}
    assert drafts == {".private.tmp": 0o600, ".group.tmp": 0o644, ".new.tmp": 0o644}


@unix
def test_merged_shards_are_not_readable_to_more_than_they_are(here, stand_in):
    shards, url = [f"prompts.shard-{place}-of-2.results.jsonl" for place in (1, 2)], stand_in().url
    for place in (1, 2):
        assert main(["prompts.txt", "--shard", f"{place}/2", "-q", "--base-url", url]) == 0
    pathlib.Path(shards[1]).chmod(0o600)
    assert main(["prompts.txt", "--merge", *shards, "-o", "all.jsonl", "-q"]) == 0
    assert mode("all.jsonl") == 0o600


# ---- What stands in a file's place ---------------------------------------------------------------------------


def a_link(path):
    pathlib.Path("victim").write_text("precious")
    path.symlink_to("victim")


@functools.cache
def terminal():
    """Return the path of a device that nobody can replace, not even root."""
    return os.ttyname(os.openpty()[1])


KINDS = {
    "a pipe": os.mkfifo if hasattr(os, "mkfifo") else None,
    "a directory": os.mkdir,
    "a link": a_link,
    "a link that leads nowhere": lambda path: path.symlink_to("nothing"),
    "a device": lambda path: path.symlink_to(terminal()),
}
SPENT = ("--max-cost", "1", "--price", "1,1")
SIDE = {
    "superseded": ("prompts.results.superseded.jsonl", []),
    "rescued": ("prompts.results.rescued.jsonl", []),
    "spent": ("prompts.results.jsonl.spent", SPENT),
    "running": ("prompts.results.jsonl.running", []),
}
NAMED = {
    "input": ("p.txt", ["p.txt"]),
    "schema": ("s.json", ["prompts.txt", "--schema", "s.json"]),
    "results": ("r.jsonl", ["prompts.txt", "-o", "r.jsonl"]),
    "results of a table": ("t.csv.results.jsonl", ["prompts.txt", "-o", "t.csv"]),
    "table": ("t.csv", ["prompts.txt", "-o", "t.csv", "--overwrite"]),
    "report": ("r.json", ["prompts.txt", "--report", "r.json"]),
    "plot": ("p.svg", ["prompts.txt", "--plot", "p.svg"]),
    "requests": ("b.jsonl", ["prompts.txt", "--to-batch", "b.jsonl", "--overwrite"]),
    "merged": ("m.jsonl", ["prompts.txt", "--merge", "s.shard-1-of-1.jsonl", "-o", "m.jsonl", "--overwrite"]),
    "shard": ("s.shard-1-of-1.jsonl", ["prompts.txt", "--merge", "s.shard-1-of-1.jsonl", "-o", "m.jsonl"]),
}


def need(arguments):
    """Skip the test if an extra that the arguments ask for, or its library, is not there."""
    files = {"--schema": "schema", "--report": "report", "--plot": "plot", "--to-batch": "to_batch",
             "--merge": "shards", "--max-cost": "budget", "t.csv": "table"}  # fmt: skip
    for word in files.keys() & {*arguments}:
        extra(files[word])
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")


def refused(arguments, name, kind, capsys):
    """Check that the command says in a sentence what stands there and what to do, before any call."""
    reachable = [] if {"--to-batch", "--merge"} & set(arguments) else [*NOWHERE, "-q"]
    assert main([*arguments, *reachable]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert name in said and kind in said and ("; " in said or ", or " in said), said
    assert not pathlib.Path("victim").exists() or pathlib.Path("victim").read_text() == "precious"


@unix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", SIDE)
def test_what_stands_in_the_place_of_a_side_file_is_refused(here, capsys, place, kind):
    name, more = SIDE[place]
    need(more)
    KINDS[kind](pathlib.Path(name))
    refused(["prompts.txt", *more], name, kind if kind in ("a pipe", "a directory") else "a link", capsys)
    assert pathlib.Path(name).is_symlink() or not pathlib.Path(name).is_file()


@unix
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a link"])  # which is followed, see below
@pytest.mark.parametrize("place", NAMED)
def test_what_stands_in_the_place_of_a_named_file_is_refused(here, capsys, place, kind):
    name, arguments = NAMED[place]
    need(arguments)
    if place == "merged":
        answer("s.shard-1-of-1.jsonl", ["What is one?", "What is two?", "What is three?"])
    KINDS[kind](pathlib.Path(name))
    refused(arguments, name, kind, capsys)


@unix
@pytest.mark.parametrize("name", ["r.json", "prompts.results.jsonl", "prompts.results.jsonl.spent", "b.jsonl", "p.svg"])
def test_a_directory_in_the_place_of_a_draft_is_refused(here, capsys, name):
    flags = {"r.json": "--report", "b.jsonl": "--to-batch", "p.svg": "--plot"}
    more = [flags[name], name] if name in flags else SPENT
    need(more)
    pathlib.Path(f".{name}.tmp").mkdir()
    refused(["prompts.txt", *more], f".{name}.tmp", "a directory; remove it", capsys)


@unix
def test_a_file_of_somebody_else_is_not_written_to(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    answer(path, ["a"])
    aside = tmp_path / "r.superseded.jsonl"
    aside.write_text("theirs\n")
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    files, outputs = extra("files"), extra("outputs")
    ask, owner = files.foreign, types.SimpleNamespace(st_uid=stranger)
    for module in files, outputs:
        monkeypatch.setattr(module, "foreign", lambda file, results: ask(file, owner))
    with pytest.raises(UsageError, match=r"r\.superseded\.jsonl is somebody else's file; remove it"):
        open_journal(path)
    with pytest.raises(OSError, match="somebody else's file; remove it"):
        files.open_beside(aside, path)
    assert aside.read_text() == "theirs\n"


@unix
def test_results_that_are_a_link_to_a_file_stay_one(tmp_path):
    there, path = tmp_path / "there", tmp_path / "r.jsonl"
    there.touch(0o600)
    path.symlink_to(there)
    answer(path, ["a"])
    answer(path, ["b"])
    assert path.is_symlink() and len(there.read_text().splitlines()) == 1
    assert mode(tmp_path / "r.superseded.jsonl") == mode(there) == 0o600


@unix
@pytest.mark.parametrize("kind", ["a pipe", "a link", "a link that leads nowhere"])
def test_what_is_put_there_in_mid_run_is_not_written_to(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.chdir(tmp_path)
    path, what = pathlib.Path("r.jsonl"), kind[:6]
    answer(path, ["a"])
    with open_journal(path) as journal:
        for prompt in journal.left(prepare(["b"])):
            journal.append(Result(prompt, text="an answer"))
        KINDS[kind](pathlib.Path("r.superseded.jsonl"))
        with pytest.raises(OSError, match=rf"r\.superseded\.jsonl is {what}; remove it"):
            journal.finish()
        assert len(path.read_bytes().splitlines()) == 2, "nothing is lost"
        KINDS[kind](pathlib.Path("r.rescued.jsonl"))
        path.unlink()
        os.mkfifo(path)
    assert f"r.rescued.jsonl is {what}; remove it" in caplog.text
    assert not pathlib.Path("nothing").exists()
    assert not pathlib.Path("victim").exists() or pathlib.Path("victim").read_text() == "precious"


# ---- Lines that somebody has made up -------------------------------------------------------------------------


KEY = concurrent_prompts.fingerprint(prepare(["a"])[0])
GOOD = Result(prepare(["a"])[0], text="yes", attempts=1).as_row()
FAILURE = Result(prepare(["a"])[0], error=FAILED, attempts=1).as_row()
BATCH_BODY = {"model": "m", "messages": []}
BATCH = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": BATCH_BODY}
GOOD_BATCH = json.loads(Result(prepare([BATCH])[0], attempts=1, http=(200, "r", {"choices": []})).as_line())
MADE_UP = {
    "a list as id": {"id": ["x"]},
    "a dict as id": {"id": {}},
    "a float as id": {"id": 1.5},
    "null as id": {"id": None},
    "true as id": {"id": True},
    "a dict as status": {"error": FAILED._asdict() | {"status": {}}},
    "a list as status": {"error": FAILED._asdict() | {"status": [1]}},
    "true as status": {"error": FAILED._asdict() | {"status": True}},
    "a list as type": {"error": FAILED._asdict() | {"type": []}},
    "a number as message": {"error": FAILED._asdict() | {"message": 5}},
    "a text as retryable": {"error": FAILED._asdict() | {"retryable": "no"}},
    "a text as error": {"error": "boom"},
    "a list as error": {"error": []},
    "false as error": {"error": False},
    "half an error": {"error": {"type": "x"}},
    "too much of an error": {"error": FAILED._asdict() | {"more": 1}},
    "a number as request": {"request": 7},
    "a list as request": {"request": [KEY]},
    "a short request": {"request": KEY[:23]},
    "a request with a line end": {"request": KEY + "\n"},
}
MADE_UP_BATCHES = {
    "a list as custom_id": {"custom_id": []},
    "a list as response": {"response": [1]},
    "a dict as status_code": {"response": {"status_code": {}}},
    "a text as status_code": {"response": {"status_code": "200"}},
    "a text as error": {"error": "boom"},
    "a list as code": {"error": {"code": [1], "message": "x"}},
    "a number as id": {"id": 5},
}


def lines():
    for name, changes in MADE_UP.items():
        yield pytest.param(GOOD | changes, id=name)
    for field in ("id", "text", "error", "request"):
        yield pytest.param({key: value for key, value in GOOD.items() if key != field}, id=f"no {field}")
    for name, changes in MADE_UP_BATCHES.items():
        yield pytest.param(GOOD_BATCH | changes, id=f"Batch: {name}")
    for field in ("id", "custom_id", "response", "error"):
        yield pytest.param({key: value for key, value in GOOD_BATCH.items() if key != field}, id=f"Batch: no {field}")


@pytest.mark.parametrize("row", [*lines()])
def test_a_line_that_is_made_up_is_refused_with_its_number(here, capsys, row):
    pathlib.Path("prompts.results.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    kept = pathlib.Path("prompts.results.jsonl").read_bytes()
    assert main(["prompts.txt", *NOWHERE]) == 2
    assert "prompts.results.jsonl line 2 is not a result; correct it" in capsys.readouterr().err
    assert pathlib.Path("prompts.results.jsonl").read_bytes() == kept


NUMBERS = ["1e999", "-1e999", "9" * 400, "9" * 5000, "NaN", "-0", "1.5", "1e300"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([KEY, [], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, *GOOD_BATCH, "x"]), inner),
    max_leaves=6,
)
DEEP = "[" * 990 + "]" * 990
TEXTS = VALUES.map(json.dumps) | st.sampled_from([*NUMBERS, DEEP, '{"status_code":' + "9" * 25 + "}"])


def as_object(fields):
    return "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in fields.items()) + "}"


@st.composite
def made_up(draw, good):
    """Return a line in which some fields of a sound one are something else."""
    fields = {name: json.dumps(value) for name, value in good.items()}
    names = [*good, "usage", "tries", "limit", "model", "texts", "reply", "attempts", "started", "latency"]
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        fields[name] = draw(TEXTS)
    for name in draw(st.lists(st.sampled_from(names), max_size=1)):
        fields.pop(name, None)
    return as_object(fields)


FAST = settings(
    derandomize=True, database=None, deadline=None, max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FAST
@given(
    lines=st.lists(made_up(GOOD) | made_up(FAILURE) | made_up(GOOD_BATCH) | TEXTS, min_size=1, max_size=2),
    place=st.integers(0, 3),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@example(lines=[json.dumps(GOOD)[:-1] + f',"x":{DEEP}}}'], place=0, flags=(False, True))
def test_no_line_whatever_makes_more_than_a_sentence(tmp_path, lines, place, flags):
    path, plot, tables = tmp_path / "r.jsonl", extra("plot"), extra("table")
    path.write_text("\n".join([*lines[:place], *[json.dumps(GOOD)] * (place < 3), *lines[place:]]) + "\n")
    (tmp_path / "r.superseded.jsonl").unlink(missing_ok=True)
    budget, price = extra("budget").Budget(1.0), extra("prices").as_price((1, 1))
    prompts = prepare(["a", {"prompt": "a", "x": 1}, BATCH])
    with contextlib.suppress(UsageError):
        with open_journal(path, retry_failed=flags[0]) as journal:
            budget.load(path, lambda row: price)
            journal.check(prompts, "p.txt")
            for prompt in journal.left(prompts):
                journal.append(Result(prompt, text="yes"))
            tally, table = extra("tally").Tally(lambda prompt: "m"), tables.Table(prompts)
            for error in journal.kept_errors:
                tally.note(error)
            assert [table.line(result) for result in tables.results_of(journal, prompts)]
            journal.finish(whole=flags[1])
        answers = [concurrent_prompts.parse_json(line) for line in path.read_bytes().splitlines()]
        assert not flags[1] or all(isinstance(row, dict) for row in answers), "what is damaged goes out in the end"
    plot.gather(plot.read(path), plot.array("d"), plot.array("d"), [])
    for line in lines:
        extra("shards").is_answer(line.encode(), prompts[0])


@FAST
@given(st.dictionaries(st.sampled_from(["spent", "most", "calls", "size"]), TEXTS) | TEXTS)
@example({"spent": "9" * 400, "most": "1", "calls": "1", "size": "1"})
@example({"spent": "1", "most": "1", "calls": "1e300", "size": "0"})
def test_an_account_that_somebody_made_up_is_damaged_or_taken(tmp_path, account):
    path = tmp_path / "r.jsonl"
    (tmp_path / "r.jsonl.spent").write_text(as_object(account) if isinstance(account, dict) else account)
    budget = extra("budget").Budget(1.0)
    budget.load(path)
    assert 0 <= budget.spent < float("inf") and budget.said()


NAMES = ["backend", "file", "names", "time", "instead", "batch", "done"]


@FAST
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), TEXTS).map(as_object) | TEXTS, max_size=3))
def test_notes_that_somebody_made_up_are_damaged_or_taken(tmp_path, lines):
    batches = pytest.importorskip("concurrent_prompts.backends.openai_batch")
    path = tmp_path / "r.jsonl"
    (tmp_path / "r.jsonl.running").write_text("\n".join(['{"backend":"openai-batch"}', *lines]) + "\n")
    with contextlib.suppress(UsageError, AttributeError, KeyError, TypeError, ValueError):
        noted, job = {}, types.SimpleNamespace(notes=PendingJobs(path, "openai-batch").kept)
        batches.Batches.read_notes(types.SimpleNamespace(job=job), noted)
        for file, batch in noted.items():
            assert isinstance(file, str) and isinstance(batch.id, str) and isinstance(batch.time, int | float)
            assert all(isinstance(name, str) for name in [*batch.names, *batch.moved])


@pytest.mark.parametrize("backend", ["{}", "[1]", "5", "null"])
def test_a_backend_that_is_no_name_is_damage(tmp_path, backend):
    (tmp_path / "r.jsonl.running").write_text(f'{{"backend":{backend}}}\n')
    with pytest.raises(UsageError, match=r"running is damaged; repair it, or remove it"):
        PendingJobs(tmp_path / "r.jsonl", "openai-batch")


# ---- Numbers ---------------------------------------------------------------------------------------------------


def asking(number, **more):
    """Return a line of Batch requests."""
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "x"}]} | more
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.parametrize("flags", [[], ["--max-cost", "1"], ["--max-cost", "1", "--price", "1,1"], ["--dry-run"]])
def test_a_number_beyond_all_numbers_costs_its_own_prompt_at_most(here, stand_in, capsys, flags):
    large = [10**400, 1e308, -(10**400)]
    lines = [asking(0)] + [asking(1, max_tokens=one, n=other) for one in large for other in (1, *large)] + [asking(2)]
    (here / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = concurrent_prompts.main(["p.jsonl", "-b", "stdlib", "--base-url", stand_in().url, *flags])
    said = capsys.readouterr().err
    assert "Error" not in said and "extra" not in said and status in (0, 1, 3)
    if not flags:
        rows = [json.loads(line) for line in (here / "p.results.jsonl").read_bytes().splitlines()]
        assert [rows[0]["error"], rows[-1]["error"], len(rows)] == [None, None, len(lines)]
