"""Which parameter an adapter of ``target_parameters`` belongs to, such as the weight of fused experts.

PEFT wraps the module that owns the parameters once for each of them, in the order in which the module registered them:
the first is the innermost. A file has the wrappers by their paths, ``…experts`` for the outermost,
``…experts.base_layer`` for the next, and does not name the parameters. Ranks and alphas are looked up by the
parameter's name, ``…experts.gate_up_proj``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .patterns import has_name, matches, rank_of, scaling_of

_INNER = ".base_layer"
# Ways to name the wrappers of one module that are tried: all of seven.
_MOST_OPTIONS = 5040


@dataclass(frozen=True)
class Stored:
    """What a file has of one wrapper.

    Attributes:
        rows: rows of A, E·r.
        shape: (out, in), the rows of B and the columns of A.
    """

    rows: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Known:
    """What is known of parameters from elsewhere.

    Attributes:
        names: names of parameters by PEFT's path of the wrapper, as in the manifest of a residual checkpoint.
        matrices: the (E, out, in) that a parameter may have, by its name, as in the report of an initialization.
        order: names of parameters in the order of their wrappers, the outermost first, as in a
            ``pissa_initial.safetensors``. It decides between parameters of one shape.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, Collection[tuple[int, ...]]] = field(default_factory=dict)
    order: Sequence[str] = ()


@dataclass(frozen=True)
class Parameter:
    """The parameter of a wrapper.

    Attributes:
        name: its name in the base model, with which PEFT looks up rank and alpha.
        decided: whether there is no other that it could be. Otherwise all of them have the same rank and scaling.
        experts: E; 1 for a parameter of two dimensions.
    """

    name: str
    decided: bool
    experts: int


def wrapper_paths(module: str, parameters: Sequence[str]) -> dict[str, str]:
    """PEFT's path of the wrapper of each parameter, by the parameter's name in the base model.

    Args:
        module: name of the module that owns the parameters.
        parameters: names in the module of those that are adapted, in the order of its ``named_parameters``.

    Examples:
        >>> from pissa_kernels.adapter.wrapped import wrapper_paths
        >>> wrapper_paths("mlp.experts", ["gate_up_proj", "down_proj"])
        {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    innermost = len(parameters) - 1
    return {f"{module}.{name}": module + _INNER * (innermost - index) for index, name in enumerate(parameters)}


def parameters_of(
    stored: Mapping[str, Stored], config: Mapping[str, Any], known: Known | None = None
) -> dict[str, Parameter]:
    """The parameters of the wrappers in a file, by the wrapper's path: the inverse of :func:`wrapper_paths`.

    The order in which a module registered its parameters is in no file. What else is known decides: names of other
    files, the shapes of a report, and ranks by ``rank_pattern``, as all parameters of a module have as many experts.

    Args:
        stored: the layers of a file by their paths in the base model.
        config: the adapter's config.
        known: what other files say.

    Returns:
        For the wrappers alone; layers of ``target_modules`` are left out.

    Raises:
        ValueError: a wrapper fits no parameter, or parameters with different ranks or scalings; the message names the
            layer.
    """
    found = {}
    for module, paths in _wrappers(stored, config).items():
        if paths != [module + _INNER * depth for depth in range(len(paths))]:
            raise ValueError(
                f"layer {module!r}: its wrappers {', '.join(paths)} are not nested as PEFT nests them; save it again"
            )
        options = list(_options(module, paths, stored, config, known or Known()))
        if known is not None and known.order and len(options) > 1:
            options = [option for option in options if _is_in_order(option, known.order)]
        if not options:
            raise ValueError(
                f"layer {module!r}: there are factors of {len(paths)} parameters, which are not those that "
                f"target_parameters names ({', '.join(config['target_parameters'])}); save the adapter with PEFT"
            )
        found.update(_choice(paths, _likely(options, paths, stored, config), config, stored))
    return found


def name_inside(path: str, wrappers: Iterable[str]) -> str:
    """Name of a module in the base model, from PEFT's path, which may lead through wrappers of parameters.

    Args:
        path: the path, of a wrapper itself too.
        wrappers: paths of all wrappers.

    Examples:
        >>> from pissa_kernels.adapter.wrapped import name_inside
        >>> name_inside("mlp.experts.base_layer.base_layer.gate", ["mlp.experts", "mlp.experts.base_layer"])
        'mlp.experts.gate'
    """
    for wrapper in sorted(wrappers, key=len, reverse=True):
        inside = f"{wrapper}{_INNER}."
        if path.startswith(inside):
            path = f"{wrapper}.{path.removeprefix(inside)}"
    return path


def _likely(
    options: Sequence[tuple[str, ...]], paths: Sequence[str], stored: Mapping[str, Stored], config: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """The options with the fewest different numbers of experts: the parameters of a module have as many."""
    numbers = [
        len({stored[path].rows // rank_of(config, name) for path, name in zip(paths, option, strict=True)})
        for option in options
    ]
    return [option for option, number in zip(options, numbers, strict=True) if number == min(numbers)]


def _wrappers(paths: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Paths of the wrappers around each module, the outermost first."""
    targets = list(config.get("target_parameters") or ())
    modules: dict[str, list[str]] = {}
    for path in sorted(paths, key=len) if targets else ():
        module = path
        while module.endswith(_INNER):
            module = module.removesuffix(_INNER)
        if module != path or (_may_own(module, targets) and not _is_target_module(module, config)):
            modules.setdefault(module, []).append(path)
    return modules


def _may_own(module: str, targets: Iterable[str]) -> bool:
    return any(has_name(target, f"{module}.{target.rpartition('.')[2]}") for target in targets)


def _is_target_module(module: str, config: Mapping[str, Any]) -> bool:
    """Whether ``target_modules`` selects a module. PEFT does not wrap parameters of such."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, module)
    return any(has_name(target, module) for target in targets)


def _options(
    module: str, paths: Sequence[str], stored: Mapping[str, Stored], config: Mapping[str, Any], known: Known
) -> Iterator[tuple[str, ...]]:
    """Every choice of parameters for the wrappers of a module, in their order, that what is known allows."""
    targets = config["target_parameters"]
    names = list(dict.fromkeys(f"{module}.{target.rpartition('.')[2]}" for target in targets))
    names = [name for name in names if any(has_name(target, name) for target in targets)]
    fitting = [[name for name in names if _fits(path, name, stored[path], config, known)] for path in paths]
    for path, fits in zip(paths, fitting, strict=True):
        if not fits:
            raise ValueError(
                f"layer {path!r}: lora_A has {stored[path].rows} rows, and the matrices are {stored[path].shape}; "
                f"accepted are factors of {' or '.join(names) or 'a parameter of target_parameters'}, with as many "
                "rows for each matrix as the rank of the config"
            )
    chosen: list[str] = []

    def extend() -> Iterator[tuple[str, ...]]:
        if len(chosen) == len(paths):
            yield tuple(chosen)
            return
        for name in fitting[len(chosen)]:
            if name not in chosen:
                chosen.append(name)
                yield from extend()
                chosen.pop()

    for number, option in enumerate(extend()):
        if number == _MOST_OPTIONS:
            raise ValueError(
                f"layer {module!r}: the adapter's file does not say which of {len(names)} parameters its "
                f"{len(paths)} pairs of factors are for; give the initial adapter in the residual checkpoint of init, "
                "or in a pissa_initial.safetensors"
            )
        yield option


def _is_in_order(option: Sequence[str], order: Sequence[str]) -> bool:
    """Whether parameters are in the order in which a file has them, which has them all."""
    return set(option) <= set(order) and list(option) == sorted(option, key=order.index)


def _fits(path: str, name: str, found: Stored, config: Mapping[str, Any], known: Known) -> bool:
    experts, left = divmod(found.rows, rank_of(config, name))
    return (
        not left
        and known.names.get(path, name) == name
        and (name not in known.matrices or (experts, *found.shape) in known.matrices[name])
    )


def _choice(
    paths: Sequence[str],
    options: Sequence[tuple[str, ...]],
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
) -> dict[str, Parameter]:
    """One parameter for each wrapper of a module: the one that it must be, or one of several with the same settings."""
    names = dict.fromkeys(name for option in options for name in option)
    settings = {name: (rank_of(config, name), scaling_of(config, name)) for name in names}
    chosen = {}
    for index, path in enumerate(paths):
        candidates = dict.fromkeys(option[index] for option in options)
        if len({settings[name] for name in candidates}) > 1:
            raise ValueError(
                f"layer {path!r}: the adapter's file does not say which of {', '.join(candidates)} its factors are "
                "for, and their ranks or alphas differ; give the initial adapter in the residual checkpoint of init, "
                "or in a pissa_initial.safetensors"
            )
        name = options[0][index]
        chosen[path] = Parameter(name, decided=len(candidates) == 1, experts=stored[path].rows // settings[name][0])
    return chosen
