"""Strict checks of parsed JSON: an object has exactly the expected keys, and each value obeys its rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

# Length of a quoted value in a message.
_QUOTED = 60


class Rule(NamedTuple):
    """A condition on a value.

    Attributes:
        accepted: the accepted values, in words that follow "accepted is".
        holds: whether a value is one of them.
    """

    accepted: str
    holds: Callable[[Any], bool]


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether the value is an int, not a bool, and at least ``least``."""
    return type(value) is int and value >= least


def is_text(value: object) -> bool:
    """Whether the value is a string that can be written as UTF-8: JSON can escape half of a surrogate pair."""
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def is_number(value: object) -> bool:
    """Whether the value is a finite float ≥ 0, or an int from 0 to 2**63 − 1."""
    if type(value) is int:
        return 0 <= value < 2**63
    return type(value) is float and math.isfinite(value) and value >= 0


STRING = Rule("a string", is_text)
BOOLEAN = Rule("true or false", lambda value: type(value) is bool)
INTEGER = Rule("an integer", is_integer)
COUNT = Rule("an integer ≥ 0", lambda value: is_integer(value, 0))
NUMBER = Rule("a finite number ≥ 0", is_number)
ARRAY = Rule("an array", lambda value: isinstance(value, list))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def optional(rule: Rule) -> Rule:
    """The rule, with null accepted too."""
    return Rule(f"{rule.accepted}, or null", lambda value: value is None or rule.holds(value))


def one_of(*values: str) -> Rule:
    """A rule that accepts these strings."""
    return Rule("one of " + ", ".join(map(repr, values)), lambda value: type(value) is str and value in values)


def fields(record: object, path: str, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The record, once its keys and values are checked.

    Args:
        record: value that :func:`load` returned, or a part of one.
        path: place of the record in its file, such as "layers[2]", for the message.
        rules: rule of each key.

    Raises:
        ValueError: the record is not an object, a key is missing or unknown, or a value breaks its rule.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{path} must be an object, found {quote(record)}")
    for problem, keys in (("lacks", rules.keys() - record.keys()), ("has unknown", record.keys() - rules.keys())):
        if keys:
            found = ", ".join(sorted(map(repr, keys)))
            raise ValueError(f"{path} {problem} keys: {found}; accepted are {', '.join(rules)}")
    for key, rule in rules.items():
        if not rule.holds(record[key]):
            raise ValueError(f"{path}: {key} is {quote(record[key])}; accepted is {rule.accepted}")
    return record


def load(text: str) -> object:
    """Parse JSON; NaN and Infinity, which Python's parser accepts, are errors.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("not readable JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def quote(value: object) -> str:
    """A value as JSON, shortened for a message."""
    if isinstance(value, (list, dict)):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is not a JSON number")
