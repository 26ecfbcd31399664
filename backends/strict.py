"""Strict JSON: what is read can be written again and sent. A lone copy of the module reads as Python's json does."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

from . import core


def finite(text: str) -> float:
    """Return the number. Raises ValueError for what JSON does not have: NaN and Infinity, also as 1e999."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is not a JSON number")
    return number


DECODER: Any = json.JSONDecoder(parse_constant=finite, parse_float=finite)


def decode_row(text: str) -> Any:
    """Return the value of strict JSON. Raises ValueError also where it is nested too deep to be written again."""
    if text.count("[") + text.count("{") > core.DEEPEST:
        brackets = re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*+"?', "", text))
        if any(depth > core.DEEPEST for depth in itertools.accumulate(1 if one in "[{" else -1 for one in brackets)):
            raise ValueError(f"nested more than {core.DEEPEST} deep")
    try:
        row, end = DECODER.scan_once(text, 0)
        if end == len(text):
            return row
    except StopIteration:
        pass
    return DECODER.decode(text)  # which says what is wrong
