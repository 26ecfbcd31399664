"""`--help`: one reference of all flags, in groups, and the manual of each backend and extra."""

import argparse
import ast
import re

import pytest

from concurrent_prompts import main
from concurrent_prompts.backends import options
from concurrent_prompts.backends.loading import BACKENDS
from concurrent_prompts.extras import INDEX, files_for
from tests.helpers import ROOT, said

NAMES = [*BACKENDS, *(name.replace("_", "-") for name in INDEX)]


def printed(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main([*words])
    return capsys.readouterr().out


def test_the_options_are_in_groups(capsys):
    text = printed(capsys, "--help")
    groups = re.findall(r"^(\w+):$", text, re.M)
    assert groups == ["input", "request", "limits", "output", "extras", *INDEX]
    assert max(map(len, text.splitlines())) <= 80


def test_an_option_takes_two_lines_at_the_most():
    parser = options.build_parser(files_for(["--help"]))
    for action in parser._actions:
        formatter = parser._get_formatter()
        formatter.add_argument(action)
        lines = formatter.format_help().strip().splitlines()
        assert len(lines) <= 2 and action.help not in ("", argparse.SUPPRESS, None), lines


@pytest.mark.parametrize("name", NAMES)
def test_each_backend_and_extra_has_a_manual(capsys, name):
    folder, file = "backends" if name in BACKENDS else "extras", name.replace("-", "_")
    text = printed(capsys, "--help", name)
    assert text.startswith(ast.get_docstring(ast.parse((ROOT / folder / f"{file}.py").read_text("utf-8"))))
    assert all(f"  {sign}" in text for sign in INDEX.get(file, ()) if sign.startswith("--") and sign != "--compare")


@pytest.mark.parametrize("words", [["--help", "dry_run"], ["-h", "max-cost"], ["p.txt", "--help=--merge"]])
def test_a_manual_has_several_names(capsys, words):
    heading = {"dry_run": "--dry-run: ", "max-cost": "--max-cost USD: ", "--help=--merge": "--shard K/N"}[words[-1]]
    assert printed(capsys, *words).startswith(heading)


def test_the_manual_of_a_third_partys(here, capsys):
    (here / "a_module_with_a_manual.py").write_text('"""How it is used.\n\n    So.\n"""\n')
    assert printed(capsys, "--help", "a_module_with_a_manual:connect") == "How it is used.\n\nSo.\n"
    (here / "a_module_without_a_manual.py").write_text("connect = None\n")
    assert printed(capsys, "--help", "a_module_without_a_manual:connect") == "It has no manual.\n"


@pytest.mark.parametrize("name", ["curl", "prompts.txt", "os.no_such:thing"])
def test_a_name_that_is_none_is_an_error_that_lists_them(here, capsys, name):
    assert main(["--help", name]) == 2
    message = said(capsys)
    assert message.startswith(f"--help {name}: ")
    assert "." in name or message.endswith(f"there are {', '.join(NAMES)}")
