"""The wording of each text that a user may see is pinned by the list in messages.txt; `python -m tests.messages`."""

import ast

from tests.messages import LIST, differences, texts


def test_the_list_has_each_text_as_the_sources_have_it():
    assert differences() == [], "write the list anew, python -m tests.messages, and review what changed"


def test_the_list_has_texts_of_all_kinds():
    lines = LIST.read_text("utf-8").splitlines()
    assert "model (default: {…})" in lines  # the help of an option
    assert "check the key: export OPENAI_API_KEY, or name another variable with --api-key-env" in lines  # a hint
    assert "%s is damaged: counting the cost of the results instead" in lines  # a warning
    assert "picture in {…}" in lines  # the report


def test_a_text_is_found_wherever_it_stands():
    source = '''
"""No message."""
WORDS = "no message either".split()
PATTERN = re.compile("no message at all")
def ask(name: "a type of two words"):
    """No message."""
    raise UsageError(f"{name} is {'not there' if name else name}: " + f"in {name!r:>5}" + hint(f"say {name} again"))
'''
    assert [*texts(ast.parse(source))] == ["{…} is {…}: in {…}{…}", "not there", "say {…} again"]
