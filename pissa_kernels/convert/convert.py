"""``convert_adapter``: a trained PiSSA adapter in, a plain LoRA of the original model out. No model is loaded.

With W_res = W − s·B₀·A₀, the trained layer W_res + s·B·A is W + s·(B·A − B₀·A₀): a LoRA of the original model with the
same scaling, whose factors are stacked, [B, −B₀]·[A; A₀] of rank 2r, or truncated to a lower rank. PEFT converts loaded
models, and writes only A and B. Here one layer's factors are in memory at a time, and all other tensors are copied.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..checks import layer_context
from ..files.advice import read_json
from ..files.apart import check_apart
from ..files.atomic import atomic_folder
from ..files.destination import destination
from ..files.folder import open_checkpoint
from ..files.system import flush
from .adapter import AdapterFile
from .check_base import Models
from .dropped import Dropped, recorded_errors, together
from .lowrank import change_norm
from .origin import is_hub_name, original_name, residual_folder
from .pair import AdapterPair, open_pair
from .plain import check_plain, plan_plain, write_plain
from .report import ConversionReport
from .swapped import SwapCheck


def convert_adapter(
    trained: str | os.PathLike[str],
    initial: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> ConversionReport:
    """Turn a trained PiSSA adapter into a plain LoRA of the original model.

    One layer's factors are in memory at a time, and with ``base`` one weight of either model. The result appears
    complete or not at all. The same files give the same bytes; with ``rank``, on the same kind of CPU.

    Args:
        trained: folder of the trained adapter.
        initial: folder of the initial adapter, or one that holds it in ``pissa_init/``, or one that holds
            ``pissa_initial.safetensors``, such as ``trained`` itself if it was saved under the hook.
        out: folder of the result. It may exist empty.
        rank: K, up to 2r, for the nearest adapter of that rank, with float32 factors; a layer with a smaller 2r keeps
            its own. None for rank 2r, which is exact, in the adapter's dtype.
        base: folder of the original model, or its name on a hub, for the config. If it is a folder, and the initial
            adapter lies in a residual checkpoint, the two models are compared weight by weight. A quantized residual is
            compared to within the error that ``init`` recorded, and the report has what the plain LoRA drops of it.
        force: replace an adapter in ``out`` that this function wrote and that is as it was written.

    Returns:
        The report of all layers.

    Raises:
        FileExistsError: ``out`` holds something, is a file or a mount point, or lies in, under or above what is read.
        FileNotFoundError, NotADirectoryError: a file or folder is missing.
        OSError: reading or writing failed. Nothing has been written to ``out`` then.
        ValueError: a file is damaged, the adapters do not belong together or are swapped, the rank is out of range, a
            factor is not finite, or ``base`` is not the model that the initial adapter was made from; the message names
            the layer.

    Examples:
        >>> import copy, pathlib, tempfile, peft, torch
        >>> import pissa_kernels as pk
        >>> base = torch.nn.Sequential(torch.nn.Linear(32, 24))
        >>> config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["0"])
        >>> with pk.patch_peft():
        ...     model = peft.get_peft_model(copy.deepcopy(base), config)
        >>> x = torch.randn(8, 32)
        >>> model(x).square().sum().backward()
        >>> torch.optim.SGD(model.parameters(), lr=1e-3).step()
        >>> folder = tempfile.TemporaryDirectory()
        >>> trained, lora = pathlib.Path(folder.name, "trained"), pathlib.Path(folder.name, "lora")
        >>> model.save_pretrained(trained)  # with the initial factors beside the trained ones
        >>> report = pk.convert_adapter(trained, trained, lora)
        >>> [(layer.name, layer.rank, layer.loss) for layer in report.layers]
        [('0', 8, 0.0)]
        >>> plain = peft.PeftModel.from_pretrained(base, lora)
        >>> torch.allclose(plain(x), model(x), atol=1e-5)
        True
        >>> folder.cleanup()
    """
    trained, initial, out = Path(trained), Path(initial), Path(out)
    folder = destination(out)
    notes: list[str] = []
    with open_pair(trained, initial) as pair:
        models = _open_models(pair.initial, base, notes)
        check_apart([folder], [trained, initial, *([] if base is None else [Path(base)])])
        _check_replaceable(folder, force)
        plain = plan_plain(pair, rank)
        name = str(base) if base is not None else original_name(pair.trained, pair.initial)
        if name is None:
            notes.append("the config names no base model, because only the residual one is known; base= names it")
        checked, dropped = _check_layers(pair, models, notes)
        if not dropped and (quantized := _quantized_residual(pair.initial)) is not None:
            notes.append(
                f"{quantized} is quantized, and the plain LoRA drops what the quantization lost, for which training "
                "compensated; base= names the original model, with which it can be measured"
            )
        with atomic_folder(folder, replace=check_plain if force else None) as temporary:
            layers, loss = write_plain(plain, name, temporary)
    flush(folder.resolve().parent)
    return ConversionReport(
        layers=[replace(layer, dropped=dropped.get(layer.name)) for layer in layers],
        out=out,
        base=name,
        loss=loss,
        carried=[info.name for info in pair.trained.others],
        checked=checked,
        notes=notes,
        dropped=together(dropped.values()),
    )


def _check_replaceable(out: Path, force: bool) -> None:
    """Refuse to replace anything but an adapter of this function, and that without ``force``."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} exists and is not an empty folder; force replaces an adapter that convert wrote")
    check_plain(out)


def _open_models(initial: AdapterFile, base: str | os.PathLike[str] | None, notes: list[str]) -> Models | None:
    """The original and the residual checkpoint; None, and a note of the reason, if they cannot be compared."""
    if base is None:
        return None
    residual = residual_folder(initial)
    if is_hub_name(base):
        notes.append(f"not compared with the base model, because {base} is not a folder")
    elif residual is None:
        notes.append(f"not compared with the base model, because {initial.path.parent} is not in a residual checkpoint")
    else:
        return Models(open_checkpoint(Path(base)), open_checkpoint(residual))
    return None


def _quantized_residual(initial: AdapterFile) -> Path | None:
    """Folder of the residual checkpoint, if its config says that it is quantized."""
    residual = residual_folder(initial)
    config = {} if residual is None else read_json(residual / "config.json")
    return residual if config.get("quantization_config") else None


def _check_layers(
    pair: AdapterPair, models: Models | None, notes: list[str]
) -> tuple[float | None, dict[str, Dropped]]:
    """Check every layer before anything is written.

    Returns:
        The largest difference between the models relative to its rounding bound, None if there is none to measure; and
        what the plain LoRA drops in each layer with a quantized residual, by name, where that is known.
    """
    untrained, differences, swap = [], [], SwapCheck()
    dropped: dict[str, Dropped] = {}
    recorded = recorded_errors(pair.initial)
    for name, layer in pair.trained.layers.items():
        with layer_context(f"layer {name!r}"):
            factors = pair.read(name)
            untrained.append(factors.untrained())
            swap.add(factors)
            found = None if models is None else models.check(name, layer, factors, recorded.get(name))
            if found is not None and found.reconstruction is not None:
                differences.append(found.reconstruction)
            elif found is not None or name in recorded:
                error, weight = (recorded[name], None) if found is None else (found.error, found.weight)
                dropped[name] = Dropped(error, layer.factor * change_norm(factors), weight)
            del factors  # before the next layer's are read
    swap.finish(pair, untrained=all(untrained))
    notes += [] if models is None else models.remarks()
    if all(untrained):
        notes.append(f"{pair.trained.path.parent} equals its initial adapter, so the result changes nothing")
    if left := pair.trained.base_weights:
        notes.append(
            f"{left[0].name!r} ({len(left)} such) is not copied: it is the base weight of an adapted layer, which the "
            "original model has"
        )
    return max(differences, default=None), dropped
