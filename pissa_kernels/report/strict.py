"""Strict reading of JSON objects: exactly the keys that belong, each with a value that is accepted, or one error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

# What is found is quoted up to this length.
_QUOTED = 60


class Rule(NamedTuple):
    """What a value has to be, in words that follow "accepted is", and the test of it."""

    accepted: str
    holds: Callable[[Any], bool]


def is_integer(value: object, least: float = -math.inf) -> bool:
    """An int that is no bool, and not below ``least``."""
    return type(value) is int and value >= least


def is_number(value: object) -> bool:
    """A finite int or float ≥ 0 that a float can hold."""
    if type(value) is int:
        return 0 <= value < 2**63
    return type(value) is float and math.isfinite(value) and value >= 0


TEXT = Rule("a string", lambda value: type(value) is str)
TRUTH = Rule("true or false", lambda value: type(value) is bool)
INTEGER = Rule("an integer", is_integer)
COUNT = Rule("an integer ≥ 0", lambda value: is_integer(value, 0))
NUMBER = Rule("a finite number ≥ 0", is_number)


def optional(rule: Rule) -> Rule:
    """The rule, or null."""
    return Rule(f"{rule.accepted}, or null", lambda value: value is None or rule.holds(value))


def one_of(*values: str) -> Rule:
    """One of these strings."""
    return Rule("one of " + ", ".join(map(repr, values)), lambda value: type(value) is str and value in values)


def fields(record: object, where: str, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The record, checked.

    Args:
        record: what :func:`load` returned, or a part of it.
        where: of the record in its file, for the message.
        rules: one for each key.

    Raises:
        ValueError: not an object, a key too few or too many, or a value that its rule does not accept.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, found {quote(record)}")
    for problem, keys in (("lacks", rules.keys() - record.keys()), ("has the unknown", record.keys() - rules.keys())):
        if keys:
            raise ValueError(f"{where} {problem} {', '.join(sorted(map(repr, keys)))}; it has {', '.join(rules)}")
    for key, rule in rules.items():
        if not rule.holds(record[key]):
            raise ValueError(f"{where}: {key} is {quote(record[key])}; accepted is {rule.accepted}")
    return record


def load(text: str) -> object:
    """Parse JSON, without the NaN and Infinity that Python's parser lets through.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def quote(value: object) -> str:
    """What was found, short enough for a message."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number there")
