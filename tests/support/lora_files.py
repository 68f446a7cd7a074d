"""Operations with files: an adapter saved, loaded, swapped in, converted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

import pissa_kernels as pk

from .lora_operations import Operations
from .lora_reference import Adapter, Network
from .lora_walk import operation


@dataclass
class Saved:
    """An adapter in a folder, with its reference and the scaling that its config gives it in each layer."""

    folder: Path
    adapters: dict[str, Adapter]
    scaling: dict[str, float]
    settings: tuple[Any, ...]


class ModelWalk(Operations):
    """A walk with every operation, those with files included."""

    # Saved by the walk itself

    @operation
    def save(self, name: str) -> None:
        """``save_pretrained`` of one adapter."""
        folder = self.new_folder()
        self.model.save_pretrained(str(folder), selected_adapters=[name])
        folder = folder if name == "default" else folder / name
        settings = self.shape_of(name)
        self.saved.append(Saved(folder, self.own(name), self.config_scaling(name), settings))

    @operation
    def reload(self, saved: int) -> None:
        """``from_pretrained`` of a saved adapter, onto a copy of the base model."""
        source = self.saved[saved]
        loaded = self.onto(copy.deepcopy(self.base), source.folder, hooked=True)
        self.compare_loaded(loaded, source.adapters, source.scaling, "the reloaded adapter")

    @operation
    def save_residual(self, name: str) -> None:
        """``save_pissa``, and what plain PEFT loads from it: the model before training."""
        folder = self.save_pissa(name)
        if self.plain:
            return
        network = Network()
        network.load_state_dict(load_file(folder / "model.safetensors"))
        stock = self.onto(network.to(self.dtype), folder, subfolder="pissa_init")
        self.compare(self.forward(stock), self.originals(), "what save_pissa has saved")

    @operation
    def convert(self, name: str) -> None:
        """PEFT's conversion to a plain LoRA, loaded onto the original base model by plain PEFT."""
        initial, folder = self.save_pissa(name), self.new_folder()
        self.model.save_pretrained(
            str(folder),
            selected_adapters=[name],
            path_initial_model_for_weight_conversion=str(initial / "pissa_init"),
        )
        folder = folder if name == "default" else folder / name
        converted = self.onto(copy.deepcopy(self.base), folder)
        self.compare_loaded(converted, self.own(name), self.config_scaling(name), "the converted adapter")

    def save_pissa(self, name: str) -> Path:
        """The folder of ``save_pissa``. Plain LoRA is saved in PEFT's way, which has no residual."""
        folder = self.new_folder()
        if not self.plain:
            pk.save_pissa(self.model, folder, adapter_name=name)
            return folder
        self.model.save_pretrained(str(folder / "pissa_init"), selected_adapters=[name])
        if name != "default":
            (folder / "pissa_init" / name).rename(folder / "moved")
            (folder / "pissa_init").rename(folder / "other")
            (folder / "moved").rename(folder / "pissa_init")
        return folder

    @operation
    def unload_residual(self, name: str) -> None:
        """PEFT's recipe, with ``init_lora_weights=True`` before ``unload``: the residual weight of the one adapter."""
        weights = self.originals()
        for key, scaling in self.config_scaling(name).items():
            weights[key] = weights[key] - scaling * self.layers[key].adapters[name].initial
        self.model.peft_config[name].init_lora_weights = True
        self.become(self.model.unload(), weights)
        self.check("unload with init_lora_weights=True")
        self.ended = True  # a new start has W again, in the layers that it adapts

    # Loaded into the walk

    @operation
    def load_start(self, saved: int) -> None:
        """``from_pretrained`` of a saved adapter onto the model, which has no adapters now."""
        source = self.saved[saved]
        self.base = copy.deepcopy(self.model)
        self.model = self.onto(self.model, source.folder, hooked=True)
        self.receive(source, "default")

    @operation
    def hotswap(self, saved: int, name: str, hooked: bool) -> None:
        """``hotswap_adapter`` with a saved adapter."""
        source = self.saved[saved]
        with self.hooked(hooked):
            hotswap_adapter(self.model, str(source.folder), name, torch_device="cpu")
        self.receive(source, name)

    @operation
    def load(self, saved: int, name: str, hooked: bool) -> None:
        """``load_adapter`` of a saved adapter, into a new name or an existing one."""
        source = self.saved[saved]
        with self.hooked(hooked):
            self.model.load_adapter(str(source.folder), name)
        self.receive(source, name)

    def receive(self, source: Saved, name: str) -> None:
        """The reference of an adapter whose values came from a folder."""
        for key, adapter in source.adapters.items():
            self.layers[key].adapters[name] = Adapter(**vars(adapter))

    def own(self, name: str) -> dict[str, Adapter]:
        """The reference of an adapter in each layer."""
        return {key: Adapter(**vars(r.adapters[name])) for key, r in self.layers.items() if name in r.adapters}

    def config_scaling(self, name: str) -> dict[str, float]:
        """The scaling of an adapter in each layer before any change of it."""
        layers = {key: layer for key, layer in self.lora_layers().items() if name in layer.lora_A}
        return {
            key: layer.lora_alpha[name] / (layer.r[name] ** 0.5 if layer.use_rslora[name] else layer.r[name])
            for key, layer in layers.items()
        }

    def shape_of(self, name: str) -> tuple[Any, ...]:
        """What two adapters must have in common for the values of one to fit the other."""
        config = self.model.peft_config[name]
        ranks = {key: layer.r[name] for key, layer in self.lora_layers().items() if name in layer.lora_A}
        return (sorted(ranks.items()), config.use_dora)

    def onto(self, network: Any, folder: Path, hooked: bool = False, **options: Any) -> Any:
        """A ``PeftModel`` of a network and an adapter's folder."""
        with self.hooked(hooked):
            return peft.PeftModel.from_pretrained(network, str(folder), **options).eval()

    def compare_loaded(self, model: Any, own: dict[str, Adapter], scaling: dict[str, float], what: str) -> None:
        """Compare another model with what its one adapter has to compute."""
        if self.plain:
            return
        bases = {name: layer.base() for name, layer in self.layers.items()}
        weights = {name: base.weight for name, base in bases.items()}
        for key in self.lora_layers(model):
            weights[key] = bases[key].adapted([(own[key], scaling[key])])
        self.compare(self.forward(model), weights, what, bases)
