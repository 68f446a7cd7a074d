"""A trained PiSSA adapter becomes a plain LoRA of the original model, without loading one.

With W_res = W − s·B₀·A₀, the trained layer W_res + s·B·A is W + s·(B·A − B₀·A₀): an adapter of rank 2r and the same
scaling, [B, −B₀]·[A; A₀], or one of any lower rank that comes nearest to it. PEFT converts models that are loaded, and
writes A and B alone; here each layer's factors are read and written by themselves, and all else comes along.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapter.names import CONFIG_NAME
from ..files.atomic import atomic_folder, fsync
from .adapter import AdapterFile, Layer
from .merged import Merged
from .origin import is_hub_name, original_name, residual_folder
from .pair import Pair, open_pair
from .plain import ConvertedLayer, plan_plain, write_plain


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        out: the plain LoRA's folder.
        base: what its config calls the base model, or None.
        layers: in the order of the trained adapter's file.
        loss: of all layers together, relative as that of each.
        carried: names of the tensors that are no factors, and are there unchanged.
        checked: worst difference from the residual model with the trained adapter, over what rounding allows it
            (≤ 1); None if there was nothing to compare.
        notes: what the caller should know, a sentence each.
    """

    out: Path
    base: str | None
    layers: list[ConvertedLayer]
    loss: float
    carried: list[str]
    checked: float | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON has."""
        record = {**asdict(self), "out": str(self.out)}
        record["layers"] = [{**layer, "shape": list(layer["shape"])} for layer in record["layers"]]
        return record


def convert_adapter(
    trained: str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Conversion:
    """Turn a trained PiSSA adapter into a plain LoRA for the original model; the result appears whole or not at all.

    One layer's factors are in memory at a time, and with ``base`` one weight of either model. The same files give the
    same bytes; those of a lower rank on the same kind of CPU.

    Args:
        trained: a PEFT adapter's folder.
        initial: one of the untrained adapter, or one that holds it in ``pissa_init/``, or one that holds
            ``pissa_initial.safetensors``, which can be ``trained`` itself.
        out: a folder that does not exist or is empty.
        rank: K, at most 2r; layers of a smaller 2r get that. Their factors are float32. By default rank 2r, which is
            exact, in the adapter's dtype.
        base: the original model's folder, or its name on a hub. If ``initial`` lies in a residual checkpoint and this
            is a folder, the two models are compared weight by weight.
        force: replace an adapter that ``out`` holds.

    Raises:
        FileExistsError: ``out`` holds something.
        FileNotFoundError, NotADirectoryError: a file or folder is missing.
        ValueError: a damaged file; adapters that do not belong together; a rank out of range; values that are not
            finite; weights that the two models disagree in. The message names the layer.
    """
    trained, initial, out = Path(trained), Path(initial), Path(out)
    _check_out(out, [trained, initial, *([Path(base)] if base is not None else [])], force)
    notes: list[str] = []
    with open_pair(trained, initial) as pair:
        plain = plan_plain(pair, rank)
        name = str(base) if base is not None else original_name(pair.trained, pair.initial)
        if name is None:
            notes.append("the config names no base model: only a residual one is known, or none; base names it")
        checked = _check_layers(pair, _merged(pair.initial, base, notes), notes)
        with atomic_folder(out, replace=force) as staging:
            layers, loss = write_plain(plain, name, staging)
    fsync(out.resolve().parent)
    return Conversion(out, name, layers, loss, [entry.name for entry in pair.trained.others], checked, notes)


def _check_out(out: Path, sources: list[Path], force: bool) -> None:
    """Refuse to replace what is no adapter, or what is to be read."""
    there = out.resolve()
    if there.exists() and not there.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder")
    for source in sources:
        if there == source.resolve() or there in source.resolve().parents:
            raise FileExistsError(f"{out} holds {source}, which is read; choose another folder")
    if not there.exists() or not any(there.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} exists and is not an empty folder; force replaces an adapter")
    if not (there / CONFIG_NAME).is_file() or any(path.is_dir() for path in there.iterdir()):
        raise FileExistsError(f"{out} holds more than an adapter, or none; only an adapter's folder is replaced")


def _merged(first: AdapterFile, base: str | os.PathLike[str] | None, notes: list[str]) -> Merged | None:
    """The two models to compare, or a note of why they are not."""
    if base is None:
        return None
    residual = residual_folder(first)
    if is_hub_name(str(base)):
        notes.append(f"not compared with the base model: {base} is no folder here")
    elif residual is None:
        notes.append(f"not compared with the base model: there is no residual checkpoint around {first.path.parent}")
    else:
        return Merged(Path(base), residual)
    return None


def _check_layers(pair: Pair, merged: Merged | None, notes: list[str]) -> float | None:
    """Read every layer once before anything is written; the worst difference of the two models, if there are two."""
    found = [_check_layer(pair, name, layer, merged) for name, layer in pair.trained.layers.items()]
    if all(untrained for untrained, _ in found):
        notes.append(f"{pair.trained.path.parent} equals its initial adapter: the result changes nothing")
    return None if merged is None else max(difference for _, difference in found)


def _check_layer(pair: Pair, name: str, layer: Layer, merged: Merged | None) -> tuple[bool, float]:
    """Whether a layer is untrained, and how far the two models differ in it."""
    factors = pair.read(name)
    return factors.untrained(), 0.0 if merged is None else merged.check(name, layer, factors)
