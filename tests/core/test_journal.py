"""The results file: appended, continued, put in order."""

import errno
import functools
import json
import os

import pytest

import concurrent_prompts
from concurrent_prompts import (
    Error,
    Journal,
    Result,
    UsageError,
    as_prompts,
    fingerprint,
    http_error,
    open_journal,
    read_prompts,
)
from concurrent_prompts.backends.api import Api, batch_row
from tests.helpers import in_rows

pytestmark = pytest.mark.usefixtures("codec")

FAILED = Error("http_500", "boom", 500, True)
careful = pytest.mark.skipif(not concurrent_prompts.meanings("outputs", "extras"), reason="extras/outputs.py is away")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "p.results.jsonl"


def prepare(items, **settings):
    return [Api(None, base_url="http://test/v1", **settings).prepare(prompt) for prompt in as_prompts(items)]


def result_of(prompt, text=None, error=None, **more):
    text = f"to {prompt.content}" if text is None else text
    return Result(prompt, text=None if error else text, error=error, attempts=1, **more)


def session(path, items, *, fail=(), answer=None, finish=True, settings=None, opened=open_journal, **options):
    """Do what a run does, last prompt first; return the contents of the prompts that it asked.

    `fail` are the contents that fail, `answer` how many are answered before the run is interrupted.
    """
    with opened(path, **options) as journal:
        asked = list(journal.left(prepare(items, **settings or {})))
        for prompt in asked[::-1][:answer]:
            failed = FAILED if prompt.content in fail else prompt.error
            journal.append(result_of(prompt, error=failed))
        if finish:
            journal.finish()
    return [prompt.content for prompt in asked]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def rows(path):
    assert not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]


def texts(path):
    return [row["text"] for row in rows(path)]


def superseded(path):
    (place,) = path.parent.glob("*superseded.jsonl")
    return texts(place)


# ---- Writing -------------------------------------------------------------------------------------------------


def test_a_line_is_there_as_soon_as_it_is_appended_and_in_order_at_the_end(path):
    first, second, third = prepare(["a", "b", "c"])
    with open_journal(path) as journal:
        assert list(journal.left([first, second, third])) == [first, second, third]
        for done, prompt in enumerate([third, first, second], 1):
            journal.append(result_of(prompt))
            assert len(rows(path)) == done
        assert texts(path) == ["to c", "to a", "to b"]
        journal.finish()
    assert texts(path) == ["to a", "to b", "to c"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@careful
def test_a_column_is_never_taken_for_a_field(path):
    (prompt,) = prepare([{"prompt": "a", "tries": "mine", "limit": 7, "request": "r"}])
    row = result_of(prompt).as_row()
    assert (row["input_tries"], row["input_limit"], row["input_request"]) == ("mine", 7, "r")
    assert not {"tries", "limit"} & {*row}
    now = prompt.id, concurrent_prompts.fingerprint(prompt), prompt.columns
    outputs = concurrent_prompts.sibling("extras", "outputs")
    again = json.loads(outputs.renewed(result_of(prompt).as_line(), now))
    assert again == row


def test_the_fields_of_a_line(path):
    (prompt,) = prepare([{"id": "x", "prompt": "a", "lang": "de", "text": "mine", "n": None}])
    with open_journal(path) as journal:
        list(journal.left([prompt]))
        journal.append(result_of(prompt, usage={"total_tokens": 3}, finish_reason="stop", model="m", latency=0.5))
    (row,) = rows(path)
    assert list(row)[:2] == ["id", "text"]
    assert {
        "id": "x", "text": "to a", "error": None, "attempts": 1, "latency": 0.5, "usage": {"total_tokens": 3},
        "finish_reason": "stop", "model": "m", "lang": "de", "input_text": "mine", "n": None,
    }.items() <= row.items()  # fmt: skip
    assert {"slot_wait", "limit_wait", "retry_wait"} <= row.keys()
    failed = result_of(prompt, error=FAILED).as_row()
    assert failed["error"] == {"type": "http_500", "message": "boom", "status": 500, "retryable": True}
    assert failed["text"] is None


ODD = {
    "half a surrogate pair in the answer": ({"prompt": "a"}, {"text": "\ud83d"}),
    "half a surrogate pair in a column": ({"prompt": "a", "x": "\ud83d"}, {}),
    "line separators": ({"prompt": "a\u2028b\x85c"}, {"text": "a\u2028b\r\nc"}),
    "not a number": ({"prompt": "a"}, {"extra": {"embedding": [0.5, float("nan"), float("inf")]}}),
    "no text": ({"prompt": "a"}, {"extra": {"embedding": [0.5]}}),
}


@pytest.mark.parametrize(("item", "answer"), ODD.values(), ids=ODD)
def test_odd_content_is_a_line_of_strict_json_and_is_recognised(path, item, answer):
    (prompt,) = prepare([item])
    with open_journal(path) as journal:
        list(journal.left([prompt]))
        journal.append(result_of(prompt, **answer))
    assert path.read_bytes().count(b"\n") == 1
    json.loads(path.read_bytes(), parse_constant=refuse)
    assert session(path, [item]) == []


def test_what_can_be_read_can_be_written(path, tmp_path):
    """Nesting near the interpreter's limit: it must not be refused only when the answer is paid for."""
    (tmp_path / "p.jsonl").write_text("".join(
        f'{{"prompt": "a", "x": {"[" * depth}{"]" * depth}}}\n' for depth in range(5, 1005, 5)
    ))  # fmt: skip

    def in_a_deeper_call(levels, result):
        return in_a_deeper_call(levels - 1, result) if levels else journal.append(result)

    prompts = prepare(read_prompts(tmp_path / "p.jsonl"))
    with open_journal(path) as journal:
        for prompt in journal.left(prompts):
            in_a_deeper_call(30, result_of(prompt, error=prompt.error))
        journal.finish()
    assert len(rows(path)) == 200 and 0 < sum(row["error"] is None for row in rows(path)) < 200


@pytest.mark.parametrize("short", [False, True], ids=["refused", "short"])
def test_a_full_disk_leaves_whole_lines(path, monkeypatch, short):
    class Disk:
        room = None  # how many bytes of a line it still takes; None: all of them

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *failure):
            self.file.close()

        def write(self, data):
            written = self.file.write(data[: self.room])
            if written == len(data):
                return written
            if not short or not written:
                raise OSError(errno.ENOSPC, "No space left on device")
            Disk.room -= written
            return written

    def open_on_disk(name, mode="r", **options):
        file = open(name, mode, **options)  # noqa: SIM115
        return file if mode == "rb" else Disk(file)

    for module in concurrent_prompts, concurrent_prompts.meanings("files", "extras"):
        if module:
            monkeypatch.setattr(module, "open", open_on_disk, raising=False)
    prompts = prepare(["a", "b", "c"])
    with open_journal(path) as journal:
        list(journal.left(prompts))
        journal.append(result_of(prompts[0]))
        for Disk.room in (0, 1, 40):
            before = path.read_bytes()
            with pytest.raises(OSError) as caught:
                journal.append(result_of(prompts[1]))
            assert caught.value.errno == errno.ENOSPC and path.read_bytes() == before
        Disk.room = None
        journal.append(result_of(prompts[2]))
    assert texts(path) == ["to a", "to c"]
    assert session(path, ["a", "b", "c"]) == ["b"]
    assert texts(path) == ["to a", "to b", "to c"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_finish_that_fails_loses_nothing(path, monkeypatch, broken):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="Input/output error"):
            session(path, ["a", "b"])
    assert texts(path) == ["to b", "to a"] and [file.name for file in path.parent.iterdir()] == [path.name]
    assert session(path, ["a", "b"]) == []
    assert texts(path) == ["to a", "to b"]


def test_a_run_of_only_the_first_prompts_keeps_the_other_answers(path):
    session(path, ["a", "b", "c"], fail=["c"])
    with open_journal(path) as journal:
        assert list(journal.left(prepare(["a"]))) == []
        journal.finish(whole=False)
    assert not list(path.parent.glob("*superseded*"))
    assert session(path, ["a", "b", "c"]) == []
    assert texts(path) == ["to a", "to b", None]


def test_overwrite_begins_anew(path):
    session(path, ["a", "b"])
    assert session(path, ["b"], overwrite=True) == ["b"]
    assert texts(path) == ["to b"] and not list(path.parent.glob("*superseded*"))


# ---- Continuing ----------------------------------------------------------------------------------------------


def named(*ids):
    return [{"id": one, "prompt": "a"} for one in ids]


CHANGES = {
    # first input, second input, what is asked, what is set aside
    "nothing": (["a", "b"], ["a", "b"], [], None),
    "one more": (["a"], ["a", "b"], ["b"], None),
    "one before": (["a", "b"], ["x", "a", "b"], ["x"], None),
    "one between": (["a", "b"], ["a", "x", "b"], ["x"], None),
    "one less": (["a", "b", "c"], ["a", "c"], [], ["to b"]),
    "one edited": (["a", "b", "c"], ["a", "x", "c"], ["x"], ["to b"]),
    "another order": (["a", "b", "c"], ["c", "a", "b"], [], None),
    "all else": (["a", "b"], ["x"], ["x"], ["to a", "to b"]),
    "duplicates": (["a", "b", "a"], ["a", "b", "a"], [], None),
    "a duplicate more": (["a", "a"], ["a", "a", "b", "a"], ["b", "a"], None),
    "a duplicate less": (["a", "a", "b"], ["a", "b"], [], ["to a"]),
    "nothing at all before": ([], ["a"], ["a"], None),
    "ids": (named(1, "1", "x"), named("x", 1, "1"), [], None),
    "an id changed": (named("x", "y"), named("x", "z"), ["a"], ["to a"]),
    "an id given": (["a"], named("x"), ["a"], ["to a"]),
    "an id's prompt edited": ([{"id": 1, "prompt": "a"}], [{"id": 1, "prompt": "b"}], ["b"], ["to a"]),
    "a column edited": ([{"prompt": "a", "x": 1}], [{"prompt": "a", "x": 2}], [], None),
    "columns renamed": ([{"prompt": "a", "x": 1, "y": 2}], [{"prompt": "a", "text": 3, "y": [4]}], [], None),
    "Batch's own names as columns": ([{"prompt": "a", "custom_id": 1}], [{"prompt": "a", "custom_id": 1}], [], None),
    "columns gone": ([{"prompt": "a", "x": 1}, "b"], ["a", {"prompt": "b", "request": 1}], [], None),
}


@pytest.mark.parametrize(("before", "after", "asked", "aside"), CHANGES.values(), ids=CHANGES)
def test_a_lone_copy_keeps_at_the_end_what_is_no_longer_asked(path, before, after, asked, aside):
    session(path, before, opened=Journal)
    for again in (asked, []):
        assert session(path, after, opened=Journal) == again
        assert texts(path) == [f"to {prompt.content}" for prompt in prepare(after)] + (aside or [])


@careful
@pytest.mark.parametrize(("before", "after", "asked", "aside"), CHANGES.values(), ids=CHANGES)
def test_continuing_with_a_changed_input(path, before, after, asked, aside):
    session(path, before)
    assert session(path, after) == asked
    prompts = prepare(after)
    assert texts(path) == [f"to {prompt.content}" for prompt in prompts]
    assert [row["id"] for row in rows(path)] == [prompt.id for prompt in prompts]
    assert [type(row["id"]) for row in rows(path)] == [type(prompt.id) for prompt in prompts]
    fresh = [result_of(prompt).as_row() for prompt in prompts]
    assert [list(row) for row in rows(path)] == [list(row) for row in fresh]
    assert [row["request"] for row in rows(path)] == [row["request"] for row in fresh]
    for row, whole in zip(rows(path), fresh, strict=True):
        columns = list(row)[list(row).index("request") :]
        assert {name: row[name] for name in columns} == {name: whole[name] for name in columns}
    assert (superseded(path) if aside else None) == aside
    assert session(path, after) == []


@careful
@pytest.mark.parametrize(
    "settings",
    [{"model": "other"}, {"params": {"n": 2}}, {"system": "s"}, {"endpoint": "responses"}, {"template": "{prompt}!"}],
    ids=str,
)
def test_whatever_changes_the_request_asks_anew(path, settings):
    session(path, ["a", "b"])
    assert session(path, ["a", "b"], settings=settings) == ["a", "b"]
    assert sorted(superseded(path)) == ["to a", "to b"] and len(rows(path)) == 2
    assert session(path, ["a", "b"], settings=settings) == []


def test_a_fingerprint_is_of_the_request_and_the_given_id_not_of_the_line():
    first, second, third, fourth = prepare(["a", "a", {"prompt": "a", "x": 1}, {"prompt": "a", "id": 1}])
    assert fingerprint(first) == fingerprint(second) != fingerprint(third)
    assert fingerprint(first)[:16] == fingerprint(third)[:16] != fingerprint(fourth)[:16]
    (answered,), (embedded,) = (prepare(["a"], endpoint=endpoint) for endpoint in ("responses", "embeddings"))
    assert answered.body == embedded.body and fingerprint(answered) != fingerprint(embedded)


def test_an_interrupted_run_goes_on(path):
    items = list("abcdef")
    assert session(path, items, answer=2, finish=False) == items
    assert session(path, items, answer=3, finish=False) == list("abcd")
    with open_journal(path) as journal:
        assert [prompt.content for prompt in journal.left(prepare(items))] == ["a"]
        assert journal.kept == 5
    assert session(path, items) == ["a"]
    assert texts(path) == [f"to {item}" for item in items]


def test_failed_rows_are_kept_or_asked_again(path):
    session(path, ["a", "b", "c"], fail=["b"])
    with open_journal(path) as journal:
        assert list(journal.left(prepare(["a", "b", "c"]))) == []
        assert (journal.kept, [error.type for error in journal.kept_errors]) == (2, ["http_500"])
    assert session(path, ["a", "b", "c"]) == []
    assert [row["error"] and row["error"]["type"] for row in rows(path)] == [None, "http_500", None]
    assert session(path, ["a", "b", "c"], retry_failed=True, fail=["b"]) == ["b"]
    assert session(path, ["a", "b", "c"], retry_failed=True) == ["b"]
    assert texts(path) == ["to a", "to b", "to c"] and not list(path.parent.glob("*superseded*"))


@pytest.mark.parametrize("retry_failed", [False, True])
def test_a_retry_that_was_answered_before_an_interruption_counts(path, retry_failed):
    session(path, ["a", "b"], fail=["a", "b"])
    assert session(path, ["a", "b"], retry_failed=True, answer=1, finish=False) == ["a", "b"]  # b is answered
    assert session(path, ["a", "b"], retry_failed=retry_failed, fail=["a"]) == (["a"] if retry_failed else [])
    assert texts(path) == [None, "to b"] and not list(path.parent.glob("*superseded*"))


def test_unreadable_lines_are_read_anew_and_stand_once(path):
    items = ["a", 17, "b"]
    session(path, items)
    for _ in range(2):
        assert session(path, items) == [17]
        assert [row["error"] and row["error"]["type"] for row in rows(path)] == [None, "unreadable", None]
    assert session(path, ["a", "mended", "b"]) == ["mended"]
    assert texts(path) == ["to a", "to mended", "to b"]


BATCH = [
    {"custom_id": one, "method": "POST", "url": "/v1/responses", "body": {"model": "m", "input": one}} for one in "xyz"
]


@pytest.mark.parametrize("items", [["ä"], ["ä", "b", "ć"], BATCH], ids=["one line", "three lines", "Batch"])
def test_a_last_line_cut_at_every_byte(path, items):
    session(path, items)
    whole = path.read_bytes()
    last = prepare(items)[-1].content
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert session(path, items, finish=cut % 99 == 0) == [last], whole[start:cut]
        assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_end_is_kept(path):
    session(path, ["a", "b"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert session(path, ["a", "b", "c"]) == ["c"]
    assert path.read_bytes().startswith(whole) and texts(path) == ["to a", "to b", "to c"]


# ---- Files that are not ours ---------------------------------------------------------------------------------

FOREIGN = {
    "text": b"my notes\nmore notes\n",
    "text without an end": b"my notes",
    "text, its last line without an end": b"my notes\nmore",
    "JSON": b'{"prompt": "a"}\n',
    "JSON without an end": b'{"prompt": "a"}',
    "JSON over lines": b'{\n  "id": 1\n}\n',
    "an array": b"[1, 2]\n",
    "a number": b"17\n",
    "a log": b'{"id": 1, "request": "GET /", "error": null}\n',
    "Batch requests": json.dumps(BATCH[0]).encode() + b"\n",
    "Batch results of OpenAI": b'{"id": "batch_req_6a0f", "custom_id": "x", "response": {"status_code": 200, '
    b'"request_id": "r", "body": {}}, "error": null}\n',
    "binary": b"\x00\x01\xff\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_holds_something_else_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match="-o"), open_journal(path):
        pass
    assert path.read_bytes() == content
    with open_journal(path, overwrite=True) as journal:
        (prompt,) = journal.left(prepare(["a"]))
        assert path.read_bytes() == content  # until there is something better
        journal.append(result_of(prompt))
    assert texts(path) == ["to a"]


def test_a_foreign_line_after_ours_is_refused(path):
    session(path, ["a"])
    with path.open("ab") as file:
        file.write(b"my notes\n")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is not a result"):
        open_journal(path)
    assert path.read_bytes() == before


@careful
def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"not a file that can be continued but a directory"):
        open_journal(tmp_path)
    with pytest.raises(UsageError, match=r"cannot write.*No such file"):
        open_journal(tmp_path / "missing" / "p.jsonl")


# ---- Batch output lines --------------------------------------------------------------------------------------

BODY = {"id": "resp_1", "output": []}
BAD = {"error": {"message": "bad", "type": "invalid_request_error", "param": None, "code": None}}


def batch_results():
    """Return an answer, a failure with a status, and one without; and the lines that they should be."""
    one, two, three = prepare(BATCH)
    failure = http_error(400, {"x-request-id": "r2"}, json.dumps(BAD).encode())
    results = [
        result_of(one, http=(200, "r1", BODY)),
        result_of(two, error=failure.error, http=failure.http),
        result_of(three, error=Error("timeout", "no answer in time", None, True)),
    ]
    lines = [
        {"custom_id": "x", "response": {"status_code": 200, "request_id": "r1", "body": BODY}, "error": None},
        {"custom_id": "y", "response": {"status_code": 400, "request_id": "r2", "body": BAD}, "error": None},
        {"custom_id": "z", "response": None, "error": {"code": "timeout", "message": "no answer in time"}},
    ]
    return results, lines


def test_batch_output_lines_and_how_they_go_on(path):
    results, lines = batch_results()
    with open_journal(path) as journal:
        list(journal.left(prepare(BATCH)))
        for result in results[::-1]:
            journal.append(result)
        journal.finish()
    found = rows(path)
    assert [list(row) for row in found] == [["id", "custom_id", "response", "error"]] * 3
    assert all(row.pop("id").startswith("batch_req_") for row in found)
    assert found == lines
    with open_journal(path) as journal:
        assert list(journal.left(prepare(BATCH[::-1]))) == []
        assert (journal.kept, {(error.type, error.status) for error in journal.kept_errors}) == (
            1, {("http_400", 400), ("timeout", None)},
        )  # fmt: skip
        journal.finish()
    assert [row["custom_id"] for row in rows(path)] == ["z", "y", "x"]
    with open_journal(path, retry_failed=True) as journal:
        assert [prompt.id for prompt in journal.left(prepare(BATCH))] == ["y", "z"]


def test_a_200_without_an_answer_is_no_batch_response():
    (prompt,) = prepare(BATCH[:1])
    row = batch_row(result_of(prompt, error=Error("no_answer", "m", 200, True), http=(200, "r", {})))
    assert (row["response"], row["error"]) == (None, {"code": "no_answer", "message": "m"})


# ---- Standard output -----------------------------------------------------------------------------------------


def test_blank_lines_and_zeros_in_the_file_are_passed_over(path):
    session(path, ["a", "b"])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\n" + second + b"\0" * 64)
    assert session(path, ["a", "b", "c"]) == ["c"]
    assert texts(path) == ["to a", "to b", "to c"]


@careful
@pytest.mark.parametrize("whole", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("change", [os.remove, lambda path: os.replace(path, f"{path}.old")], ids=["removed", "moved"])
def test_a_file_that_is_removed_in_mid_run_is_written_again(path, change, whole):
    prompts = prepare(["a", "b"])
    with open_journal(path) as journal:
        asked = list(journal.left(prompts))
        journal.append(result_of(asked[1]))
        change(path)
        journal.append(result_of(asked[0]))
        if whole:
            journal.finish()
    assert sorted(texts(path)) == ["to a", "to b"]
    assert session(path, ["a", "b"]) == []


@careful
def test_a_file_in_whose_place_another_stands_is_not_touched(path):
    with open_journal(path) as journal:
        (asked,) = journal.left(prepare(["a"]))
        journal.append(result_of(asked))
        os.remove(path)
        path.write_text("another run's")
        with pytest.raises(OSError, match="another file"):
            journal.attend()
        with pytest.raises(OSError, match="another file"):
            journal.finish()
    assert path.read_text() == "another run's"
    assert texts(path.with_name("p.results.rescued.jsonl")) == ["to a"]


def check(path, items, **settings):
    with open_journal(path) as journal:
        journal.check(prepare(items, **settings), "q.txt")


@pytest.mark.parametrize(
    ("items", "settings"),
    [(["x", "a", "b"], {}), (["b"], {}), (["a", "b"], {"model": "m"}), (["b"], {"template": "{prompt}", "model": "m"})],
    ids=["one more", "one less", "another model", "another template"],
)
def test_a_job_that_has_changed_is_the_same_job(path, items, settings):
    session(path, ["a", "b"])
    check(path, items, **settings)


@careful
def test_another_jobs_answers_are_refused(path):
    session(path, ["a", "b", "c"], fail=["c"])
    before = path.read_bytes()
    for items in (["x", "y"], [{"prompt": "a", "x": 1, "id": 7}], ["x", 17], []):
        with pytest.raises(UsageError, match=r"a different input: none matches q\.txt\. .*-o.*--overwrite"):
            check(path, items)
    assert path.read_bytes() == before


def test_failures_alone_hold_nobody_up(path):
    session(path, ["a", "b"], fail=["a", "b"])
    check(path, ["x"])


@careful
def test_a_damaged_line_costs_no_other(path):
    session(path, ["a", "b", "c"])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:50] + b"\n" + third)
    assert session(path, ["a", "b", "c"]) == ["b"]
    assert texts(path) == ["to a", "to b", "to c"]
    (aside,) = path.parent.glob("*superseded.jsonl")
    assert aside.read_bytes() == second[:50] + b"\n"


DAMAGE = {
    "the first line": lambda one, two, three: (one[:60] + b"\n" + two + three, ["a"]),
    "zeros before a line": lambda one, two, three: (one + b"\0" * 99 + two + three, []),
    "zeros over the start of a line": lambda one, two, three: (one + b"\0" * 20 + two[20:] + three, None),
    "zeros over the end of a line": lambda one, two, three: (one[:-9] + b"\0" * 9 + two + three, ["a", "b"]),
    "zeros over most of the last": lambda one, two, three: (one + two + three[:5] + b"\0" * 50, ["c"]),
    "zeros over all of the last": lambda one, two, three: (one + two + b"\0" * 50, ["c"]),
}


@careful
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_passed_over_or_refused_and_costs_no_other_line(path, damage):
    session(path, ["a", "b", "c"])
    broken, asked = damage(*path.read_bytes().splitlines(keepends=True))
    path.write_bytes(broken)
    if asked is None:
        with pytest.raises(UsageError, match="line 2"):
            open_journal(path)
        assert path.read_bytes() == broken
    else:
        assert session(path, ["a", "b", "c"]) == asked
        assert texts(path) == ["to a", "to b", "to c"]


def test_a_torn_line_that_could_not_be_cut_off_is_cut_off_before_the_next(path, monkeypatch):
    class Disk:
        broken = False

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.broken:
                self.file.write(data[:30])
                raise OSError(errno.EIO, "Input/output error")
            return self.file.write(data)

        def truncate(self, size):
            if self.broken:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.truncate(size)

    with open_journal(path) as journal:
        asked = list(journal.left(prepare(["a", "b", "c"])))
        journal.append(result_of(asked[0]))
        journal._file = Disk(journal._file)
        for Disk.broken in (True, True):
            with pytest.raises(OSError):
                journal.append(result_of(asked[1]))
        Disk.broken = False
        journal.append(result_of(asked[2]))
    assert texts(path) == ["to a", "to c"]
    assert session(path, ["a", "b", "c"]) == ["b"]


@careful
def test_a_failure_that_was_answered_since_does_not_stay_beside_the_answer(path):
    items = ["a", "b", "c"]
    session(path, items, fail=["b", "c"])
    session(path, items, retry_failed=True, fail=["b"], finish=False)
    with open_journal(path) as journal:
        assert list(journal.left(prepare(items[:2]))) == []
        journal.finish(whole=False)
    assert [(row["id"], row["text"]) for row in rows(path)] == [(1, "to a"), (2, None), (3, "to c")]


def test_the_mode_of_the_file_is_kept(path):
    session(path, ["a"])
    path.chmod(0o600)
    session(path, ["a", "b"])
    assert path.stat().st_mode & 0o777 == 0o600 or os.name == "nt"


@careful
def test_a_name_that_cannot_be_replaced_keeps_what_is_complete(path, monkeypatch, caplog):
    def busy(*names):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    session(path, ["a", "b"])
    assert sorted(texts(path)) == ["to a", "to b"] and "it is complete" in caplog.text
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_written_is_brought_to_the_disk(path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(fsync(number)))
    prompts = prepare(["a", "b"])
    with open_journal(path) as journal:
        for prompt, count in zip(journal.left(prompts), (1, 2), strict=True):
            journal.append(result_of(prompt))
            journal.sync()
            journal.sync()
            assert len(synced) == count


def test_a_file_that_another_run_has_just_replaced_is_refused(path, monkeypatch):
    session(path, ["a"])
    opened = open

    def replaced(name, *more, **options):
        file = opened(name, *more, **options)
        os.replace(path, f"{path}.old")
        path.write_bytes(b"")
        return file

    monkeypatch.setattr("builtins.open", replaced)
    with pytest.raises(UsageError, match="another run"):
        open_journal(path)


def test_a_second_run_on_the_same_file_is_refused_and_changes_nothing(path):
    with open_journal(path) as journal:
        (asked,) = journal.left(prepare(["a"]))
        journal.append(result_of(asked))
        for options in ({}, {"overwrite": True}):
            with pytest.raises(UsageError, match="another run is writing"):
                open_journal(path, **options)
    assert texts(path) == ["to a"]
    with open_journal(path) as journal:
        assert list(journal.left(prepare(["a"]))) == []


@careful
def test_failures_of_the_same_question_are_told_apart(path):
    items = ["a", "b", "a"]
    with open_journal(path) as journal:
        asked = list(journal.left(prepare(items)))
        journal.append(result_of(asked[2], error=FAILED))
    assert session(path, items, fail=["a"], answer=2, finish=False) == ["b", "a"]  # the first takes the other's line
    assert session(path, items) == []
    assert [row["id"] for row in rows(path)] == [1, 2, 3]


ROWS = {
    "usual": {"id": 1, "text": "Grüße, \u2028 \U0001f600", "n": [0.5, -0.0, 1.25, 2**53, True, None]},
    "half a surrogate pair": {"text": "\ud800"},
    "no number": {"text": float("nan"), "more": [float("inf")]},
    "a number beyond 64 bits": {"n": 2**70},
    "keys of other types": {"usage": {1: "one"}},
    "too deep": {"id": 1, "reply": functools.reduce(lambda inner, _: [inner], range(3000), 0)},
}


@in_rows("row", ROWS.values(), ids=ROWS)
def test_a_line_is_the_same_with_and_without_orjson(row, monkeypatch):
    line = concurrent_prompts.to_line(row)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and isinstance(json.loads(line), dict)
    monkeypatch.setattr(concurrent_prompts, "dump", lambda value: concurrent_prompts.encode_json(value).encode())
    assert concurrent_prompts.to_line(row) == line


TEXTS = ['{"a":1}', " [1] \n", '\ufeff{"a":1}', '{"a":NaN}', '"\\ud800"', "", "x", "[1] 2", "[" * 9999]


@in_rows("text", TEXTS)
def test_what_is_read_is_the_same_with_and_without_orjson(text, monkeypatch):
    values = [concurrent_prompts.parse_json(form) for form in (text, text.encode())]
    monkeypatch.setattr(concurrent_prompts, "load", json.loads)
    assert repr([concurrent_prompts.parse_json(form) for form in (text, text.encode())]) == repr(values)
