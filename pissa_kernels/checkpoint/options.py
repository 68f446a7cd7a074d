"""Options of the adapter that ``init`` makes, checked by themselves: types, ranges, regular expressions."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ..adapter.patterns import matches
from ..checks import parse_init

ALL_LINEAR = "all-linear"
# No weight has a larger rank; PEFT makes an empty tensor of any that is asked for.
MOST = 2**31 - 1
# A single name with one of these characters is a regular expression. A dot does not count: module names have dots.
_PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")


@dataclass(frozen=True)
class AdapterOptions:
    """Options of the adapter, as for PEFT's ``LoraConfig``.

    Attributes:
        rank: r.
        alpha: ``lora_alpha``; None for the rank, a scaling of 1.
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketches.
        target_modules: names, "all-linear" among them or alone, or one regular expression; none where only parameters
            are adapted.
        target_parameters: names of parameters that are stacks of matrices, such as fused experts, or their ends.
        exclude_modules: names, or one regular expression.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, as PEFT takes them.
        use_rslora: scale by alpha/√r instead of alpha/r.
        trust_remote_code: run the Python code that comes with the checkpoint to build its model.

    Raises:
        TypeError, ValueError: an option has another type or is out of range; the message names it.
    """

    rank: int = 16
    alpha: float | None = None
    init: str = "pissa"
    seed: int = 0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "rank": _integer("rank", self.rank, 1, MOST),
            "alpha": None if self.alpha is None else _positive("alpha", self.alpha),
            # the range of torch.Generator.manual_seed
            "seed": _integer("seed", self.seed, -(2**63), 2**64 - 1),
            "rank_pattern": {
                key: _integer(f"rank_pattern[{key!r}]", rank, 1, MOST)
                for key, rank in _pattern("rank_pattern", self.rank_pattern).items()
            },
            "alpha_pattern": {
                key: _positive(f"alpha_pattern[{key!r}]", alpha)
                for key, alpha in _pattern("alpha_pattern", self.alpha_pattern).items()
            },
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        parse_init(self.init)
        for name in ("use_rslora", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("target_modules", "exclude_modules"):
            _check_entries(name, getattr(self, name))
        _check_entries("target_parameters", self.target_parameters, expressions=False)
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty; give names of modules, or None for all-linear")
        if not self.target_modules and self.exclude_modules:
            raise ValueError("exclude_modules leaves out modules, and target_parameters alone adapts none")
        if any(map(is_all_linear, self.exclude_modules)):
            raise ValueError("exclude_modules takes names, or one regular expression, but not all-linear")

    @property
    def named(self) -> tuple[str, ...]:
        """The entries of ``target_modules`` but all-linear."""
        return tuple(entry for entry in self.target_modules if not is_all_linear(entry))


def entries(name: str, modules: str | Iterable[str] | None, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of modules, or one regular expression, as a tuple.

    Args:
        name: the option, for messages.
        modules: a string, several in any order, or None.
        default: what None stands for.

    Raises:
        TypeError: ``modules`` is of another type.
    """
    if modules is None:
        return default
    if isinstance(modules, str):
        return (modules,)
    if isinstance(modules, (bytes, Mapping)) or not isinstance(modules, Iterable):
        raise TypeError(f"{name} must be a name or a list of names, got {modules!r}")
    return tuple(sorted(modules) if isinstance(modules, (set, frozenset)) else modules)


def default_modules(target_parameters: tuple[str, ...]) -> tuple[str, ...]:
    """What ``target_modules`` are if they are not given: all linear layers, or none beside named parameters."""
    return () if target_parameters else (ALL_LINEAR,)


def is_all_linear(entry: str) -> bool:
    """Whether an entry stands for all linear layers. PEFT ignores its case."""
    return entry.lower() == ALL_LINEAR


def as_peft(names: tuple[str, ...]) -> str | list[str]:
    """Names as PEFT's config takes them: a list, or a single "all-linear" or regular expression as a string."""
    if len(names) == 1 and (is_all_linear(names[0]) or is_expression(names[0])):
        return names[0]
    return list(names)


def is_expression(entry: str) -> bool:
    """Whether an entry is a regular expression rather than a name."""
    return _PATTERN.search(entry) is not None


def check_expression(entry: str) -> None:
    """Refuse what has the characters of a regular expression and is not one.

    Raises:
        ValueError: with what is wrong.
    """
    if is_expression(entry):
        try:
            re.compile(entry)
        except (re.error, OverflowError, RecursionError) as error:
            hint = "; any characters are .*, a dot and an asterisk" if entry.startswith(("*", "?")) else ""
            raise ValueError(f"{entry!r} is not a regular expression: {error}{hint}") from None


def _check_entries(option: str, names: tuple[str, ...], *, expressions: bool = True) -> None:
    for index, entry in enumerate(names):
        if not isinstance(entry, str):
            raise TypeError(f"{option} must be names of {'modules' if expressions else 'parameters'}, got {entry!r}")
        if not entry.strip():
            raise ValueError(f"{option} has an empty name")
        if entry in names[:index]:
            raise ValueError(f"{option} names {entry!r} twice")
        if not expressions:
            if is_expression(entry):
                raise ValueError(f"{option} takes names or their ends, and {entry!r} is a regular expression")
            continue
        try:
            check_expression(entry)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
        if is_expression(entry) and len(names) > 1:
            raise ValueError(
                f"{option} takes names, or one regular expression alone, and {entry!r} is one beside others; join "
                "them, as in '.*(q_proj|v_proj)'"
            )


def _pattern(option: str, pattern: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(pattern, Mapping):
        raise TypeError(f"{option} must map names of modules to values, got {pattern!r}")
    for key in pattern:
        if not isinstance(key, str):
            raise TypeError(f"{option} must have names of modules for keys, got {key!r}")
        if not key.strip():
            raise ValueError(f"{option} has an empty name")
        try:
            matches(key, "")
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    return pattern


def _integer(option: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{option} must be an integer, got {value!r} ({type(value).__name__})")
    number = operator.index(value)
    if number < least or number > most:
        accepted = f"{least} or more" if least == 1 and number < least else f"from {least} to {most}"
        raise ValueError(f"{option} must be {accepted}, got {number}")
    return number


def _positive(option: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{option} must be a number, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{option} must be a finite number above 0, got {value!r}")
    return operator.index(value) if hasattr(value, "__index__") else number
