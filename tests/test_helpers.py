"""Rows that run as one test: each is called, and a failure has the names of all that fail."""

import asyncio
import os

import pytest

from tests.helpers import in_rows


def test_each_row_is_called_and_those_that_fail_are_named(monkeypatch):
    called = []

    @in_rows(("number", "half"), [(2, 1), (3, 1), (4, 3)], ids=["two", "three", "four"])
    def test(number, half, monkeypatch):
        called.append((number, os.environ.get("A_ROW")))
        monkeypatch.setenv("A_ROW", "x")
        with pytest.raises(ZeroDivisionError):
            assert number == 2 * half and number / 0

    with pytest.raises(ExceptionGroup, match="2 of 3 rows: row three; row four") as failed:
        test(monkeypatch=monkeypatch)
    assert called == [(2, None), (3, None), (4, None)] and len(failed.value.exceptions) == 2


async def test_rows_of_rows_are_awaited():
    called = []

    @in_rows("letter", "ab")
    @in_rows("number", [0, 1])
    async def test(letter, number):
        await asyncio.sleep(0)
        called.append((letter, number))
        assert (letter, number) != ("b", 1)

    with pytest.raises(ExceptionGroup, match="1 of 2 rows: row 'b'"):
        await test()
    assert called == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_what_a_row_does_not_raise_is_a_failure():
    @in_rows("number", [0, 1])
    def test(number):
        with pytest.raises(ZeroDivisionError):
            number + 1 / number

    with pytest.raises(ExceptionGroup, match="1 of 2 rows: row 1") as failed:
        test()
    assert "DID NOT RAISE" in str(failed.value.exceptions[0])


def test_a_row_that_is_skipped_costs_no_other():
    called = []

    @in_rows("least", [0, 2])
    @in_rows("number", [0, 1, 2])
    def test(least, number):
        called.append((least, number))
        if number >= least:
            pytest.skip("not here")

    test()
    assert called == [(least, number) for least in (0, 2) for number in (0, 1, 2)]

    with pytest.raises(pytest.skip.Exception, match="not here"):
        in_rows("number", [0, 1])(lambda number: pytest.skip("not here"))()
