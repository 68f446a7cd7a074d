"""What the options name in a model: every name, expression and pattern has to decide for some layer."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..adapter.patterns import has_name, matches, pattern_key
from ..adapter.readers import reader_of, reading
from .options import AdapterOptions, is_expression

# Names that a message lists.
SHOWN = 8


def check_names(model: nn.Module, options: AdapterOptions) -> None:
    """Refuse names and expressions that match no module, or one that is not linear.

    Args:
        model: the model.
        options: the options. Names of ``exclude_modules`` may be those of any module.

    Raises:
        ValueError: the message has the option, the name, and similar names of the model.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    excluded = {name for entry in options.exclude_modules for name in _found("exclude_modules", entry, modules)}
    for entry in options.named:
        found = _found("target_modules", entry, modules)
        left = [name for name in found if name not in excluded]
        if not left:
            raise ValueError(f"target_modules: exclude_modules leaves out every module that {entry!r} matches")
        for name in left:
            _check_linear(modules, entry, name)
    _check_containers(modules, excluded, options)


def check_parameters(model: nn.Module, options: AdapterOptions, stacks: Sequence[str]) -> None:
    """Refuse names of ``target_parameters`` that match no parameter, or one that is no stack of matrices.

    Args:
        model: the model.
        options: the options.
        stacks: names of the parameters that are stacks.

    Raises:
        ValueError: the message has the name, what it matches, and names of stacks.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) if options.target_parameters else {}
    known = f"; its stacks of matrices are {_ends(stacks)}" if stacks else "; it has no stacks of matrices"
    for entry in options.target_parameters:
        found = [name for name in parameters if has_name(entry, name)]
        if not found:
            raise ValueError(f"target_parameters: {entry!r} not found in the model{_hint(entry, stacks, ()) or known}")
        for name in found:
            if (shape := tuple(parameters[name].shape)) and parameters[name].ndim != 3:
                raise ValueError(
                    f"target_parameters: {entry!r} matches {name!r}, which has shape {shape}; it takes stacks of "
                    f"matrices, with three dimensions, and --target-modules takes linear layers{known}"
                )


def read_past(model: nn.Module, names: Sequence[str], options: AdapterOptions) -> tuple[dict[str, str], list[str]]:
    """Layers whose weight a module around them reads, so that their adapter is no part of what the model computes.

    Args:
        model: the model.
        names: its target layers.
        options: the options.

    Returns:
        By layer, the reason why all-linear leaves it out; and notes for the user, one on these layers, and one on those
        that are read under some condition only.

    Raises:
        ValueError: ``target_modules`` names such a layer.
    """
    readers = {name: reader for name in names if (reader := reader_of(model, name)) is not None}
    left_out = {name: reading(reader) for name, reader in readers.items() if reader.always}
    for name, why in left_out.items():
        if any(matches_entry(entry, name) for entry in options.named):
            raise ValueError(f"layer {name!r}: {why}. Leave the layer out with --exclude-modules {name}")
    notes = []
    if left_out:
        which = listed([f"{name} (read by {readers[name].owner})" for name in left_out])
        notes.append(f"left out of all-linear, as another module reads the weight without calling the layer: {which}")
    if conditional := [f"{name} (read by {reader.owner})" for name, reader in readers.items() if not reader.always]:
        notes.append(
            "another module reads the weight under some condition without its adapter, and then computes with the "
            "residual; --exclude-modules leaves the layer out, unless that condition never holds: "
            + listed(conditional)
        )
    return left_out, notes


def check_patterns(options: AdapterOptions, layers: Collection[str], modules: Iterable[str]) -> None:
    """Refuse entries of ``rank_pattern`` and ``alpha_pattern`` that decide for no layer.

    Args:
        options: the options.
        layers: names of the layers that are adapted.
        modules: names of all modules.

    Raises:
        ValueError: the message has the option, the entry, and what it matches instead.
    """
    names = [name for name in modules if name]
    patterns: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("rank_pattern", options.rank_pattern),
        ("alpha_pattern", options.alpha_pattern),
    )
    for option, pattern in patterns:
        deciding = {pattern_key(pattern, layer) for layer in layers}
        for key in pattern:
            if key in deciding:
                continue
            found = [name for name in names if matches(key, name)]
            if not found:
                raise ValueError(f"{option}: {key!r} matches no module of the model{_hint(key, names, layers)}")
            targets = [name for name in found if name in layers]
            if not targets:
                raise ValueError(f"{option}: {key!r} matches {_quoted(found)}, and none of them is adapted")
            first = pattern_key(pattern, targets[0])
            raise ValueError(
                f"{option}: {key!r} decides for no layer, because {first!r} comes first and matches {_quoted(targets)}"
            )


def matches_entry(entry: str, name: str) -> bool:
    """Whether a name or a regular expression of ``target_modules`` or ``exclude_modules`` matches a module."""
    return re.fullmatch(entry, name) is not None if is_expression(entry) else has_name(entry, name)


def _found(option: str, entry: str, modules: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in modules if matches_entry(entry, name)]
    if not found:
        linear = [name for name, module in modules.items() if _is_linear(module)]
        what = "the regular expression " if is_expression(entry) else ""
        raise ValueError(f"{option}: {what}{entry!r} not found in the model{_hint(entry, modules, linear)}")
    return found


def _check_containers(modules: Mapping[str, nn.Module], excluded: Collection[str], options: AdapterOptions) -> None:
    """Refuse an entry of ``exclude_modules`` for blocks: PEFT leaves out those alone, and adapts what is in them."""
    everything = len(options.named) < len(options.target_modules)
    for entry in options.exclude_modules:
        blocks = [name for name in modules if matches_entry(entry, name)]
        inside = [
            name
            for name, module in modules.items()
            if _is_linear(module)
            and name not in excluded
            and (everything or any(matches_entry(target, name) for target in options.named))
            and any(name.startswith(f"{block}.") for block in blocks)
        ]
        if inside and not any(_is_linear(modules[block]) for block in blocks):
            part = entry if is_expression(entry) else rf"(.*\.)?{re.escape(entry)}"
            raise ValueError(
                f"exclude_modules: {entry!r} matches {_quoted(blocks)}, and PEFT would adapt the layers inside, such "
                rf"as {inside[0]!r}; the regular expression '{part}\..*' leaves them out"
            )


def _check_linear(modules: Mapping[str, nn.Module], entry: str, name: str) -> None:
    module = modules[name]
    if _is_linear(module):
        return
    why = f"layer {name!r} is a {type(module).__name__}"
    if isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"{why}: nn.MultiheadAttention computes with its weights and not with its layers, so an adapter would not "
            f"be used. Leave it out with --exclude-modules {name}"
        )
    inside = [other for other in modules if other.startswith(f"{name}.") and _is_linear(modules[other])]
    weight = getattr(module, "weight", None)
    shape = f" whose weight has shape {tuple(weight.shape)}" if weight is not None else ""
    linear = inside or [other for other in modules if _is_linear(modules[other])]
    raise ValueError(
        f"{why}{shape}, which {entry!r} of target_modules matches; PiSSA takes linear layers with a 2-D weight, here "
        f"--target-modules {_last_names(linear)}"
    )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _hint(entry: str, modules: Iterable[str], linear: Iterable[str]) -> str:
    """Names of the model that are near to an entry, or else those of its linear layers."""
    if is_expression(entry):
        try:
            part = next((name for name in modules if re.search(entry, name)), None)
        except re.error:
            part = None
        if part:
            return f": it has to match a whole name, such as {part!r}; begin it with '.*'"
    if "," in entry:
        return "; separate names with spaces"
    parts = entry.count(".") + 1
    names = {".".join(name.split(".")[-parts:]) for name in modules}
    by_lower = {name.lower(): name for name in sorted(names | set(modules)) if not name.isdecimal()}
    near = difflib.get_close_matches(entry.lower(), by_lower, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(by_lower[name]) for name in near)}?"
    return f"; its linear layers are {_last_names(linear)}" if linear else ""


def _last_names(names: Iterable[str]) -> str:
    """The last parts of names, the most frequent first."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return " ".join(name for name, _ in counts.most_common(SHOWN))


def _ends(names: Iterable[str]) -> str:
    """The last two parts of names, each once."""
    return " ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
