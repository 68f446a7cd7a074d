"""Operations of PEFT and of the package on a model, each with what it does to the reference."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import torch
from torch import Tensor

import pissa_kernels as pk

from .lora_errors import Divergence
from .lora_reference import LAYERS, Adapter, best_error
from .lora_values import combined, factors, magnitude_of, product
from .lora_walk import SAMPLES, UNIT, Walk, operation

Settings = dict[str, Any]


class Operations(Walk):
    """A walk with every operation. Those that PEFT gives no meaning (an unknown name) are not made."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__(plain)
        self.saved: list[Any] = []

    def config(self, settings: Settings) -> peft.LoraConfig:
        """PEFT's config; with plain LoRA where this walk is plain."""
        given = {**settings, "target_modules": list(settings["target_modules"])}
        if self.plain:
            given["init_lora_weights"] = True
        return peft.LoraConfig(**copy.deepcopy(given))

    # Adapters that come and go

    @operation
    def start(self, name: str, settings: Settings) -> None:
        """``get_peft_model`` under the patch."""
        self.base = copy.deepcopy(self.model)
        with self.hooked(True):
            self.model = peft.get_peft_model(self.model, self.config(settings), adapter_name=name).eval()
        self.adopt(name, settings)

    @operation
    def add(self, name: str, settings: Settings, hooked: bool) -> None:
        """``add_adapter`` inside or outside of the patch."""
        with self.hooked(hooked):
            self.model.add_adapter(name, self.config(settings))
        if settings["init_lora_weights"] == "olora":
            raise Divergence("an OLoRA adapter changes the base weight, and was not refused")
        self.adopt(name, settings)

    def adopt(self, name: str, settings: Settings) -> None:
        """Take the values of a new adapter from the model, and check that they are what its initializer promises."""
        pissa = str(settings["init_lora_weights"]).startswith("pissa") and not self.plain
        for key, layer in self.lora_layers().items():
            if name not in layer.lora_A:
                continue
            reference, (A, B) = self.layers[key], factors(layer, name)
            magnitude = magnitude_of(layer, name)
            adapter = Adapter(B @ A, (A, B) if pissa else None, magnitude)
            reference.adapters[name] = adapter
            if self.plain:
                continue
            scaling = float(layer.scaling[name])
            reference.adapted([(adapter, scaling)])
            allowed = reference.allowed(len(self.history) + 1, self.unit)
            left = float((reference.weight - scaling * adapter.initial).norm())
            if settings["init_lora_weights"] == "pissa":
                # the energy deficit that the package promises is 1e-6, and 2.5e-6 for bfloat16
                best = (best_error(reference.weight, layer.r[name]) ** 2 + 5e-6 * left**2) ** 0.5
                if left > best + allowed:
                    raise Divergence(f"{name!r} of layer {key!r} is not the principal part of W: {left} > {best}")
            if not pissa and float(adapter.product.norm()) != 0:
                raise Divergence(f"the plain adapter {name!r} of layer {key!r} does not start at zero")
            if magnitude is not None and float((magnitude - reference.weight.norm(dim=1)).norm()) > allowed:
                raise Divergence(f"the magnitudes of {name!r} in layer {key!r} are not the norms of the rows of W")

    @operation
    def delete(self, name: str) -> None:
        """``delete_adapter``."""
        self.model.delete_adapter(name)
        for reference in self.layers.values():
            reference.adapters.pop(name, None)

    @operation
    def weighted(self, names: list[str], weights: list[float], new: str, kind: str) -> None:
        """``add_weighted_adapter``. The new change of the weight is what PEFT makes of B·A, less the same of B₀·A₀.

        With rsLoRA PEFT multiplies the sum by the scaling √r of the new adapter; a sum of PiSSA's is not multiplied.
        """
        first, pissa = self.model.peft_config[names[0]], set(names) & set(self.pissa())
        options = {"svd_rank": 10} if kind == "svd" else {}  # all of the rank that a layer has
        self.model.add_weighted_adapter(names, weights, new, combination_type=kind, **options)
        kind = "linear" if len(names) == 1 else kind
        for key, layer in self.lora_layers().items():
            if new not in layer.lora_A:
                continue
            reference, sums = self.layers[key], []
            present = [
                (n, w * float(layer.scaling[n])) for n, w in zip(names, weights, strict=True) if n in layer.lora_A
            ]
            for start in (False, True):
                pairs = [
                    (s, reference.adapters[n].start if start else factors(layer, n))
                    for n, s in present
                    if not start or reference.adapters[n].start
                ]
                sums.append(combined([(s, *pair) for s, pair in pairs if pair], kind, reference.weight))
            magnitude = reference.weight.norm(dim=1) if first.use_dora else None
            (A, B), (A0, B0) = sums
            own = float(layer.scaling[new]) if pissa else 1.0
            reference.adapters[new] = Adapter(B @ A / own, (A0, B0 / own) if len(A0) else None, magnitude)

    # Which of them are used

    @operation
    def use(self, names: list[str]) -> None:
        """``set_adapter`` with one name or several."""
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(names)

    @operation
    def enable(self, enabled: bool) -> None:
        """``enable_adapter_layers`` or ``disable_adapter_layers``."""
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if enabled else tuner.disable_adapter_layers()

    @operation
    def without(self) -> None:
        """A forward pass within ``disable_adapter()``: the model before PiSSA."""
        with self.model.disable_adapter():
            self.compare(self.forward(), self.originals(), "disable_adapter")

    @operation
    def original(self) -> None:
        """A forward pass within ``original_model``."""
        with self.hooked(False) if self.plain else pk.original_model(self.model):
            self.compare(self.forward(), self.originals(), "original_model")

    @operation
    def mixed(self, names: list[str]) -> None:
        """A batch with an adapter for each sample, or "__base__" for none."""
        rows = (names * SAMPLES)[:SAMPLES]
        trace = self.forward(adapter_names=rows)
        weights: dict[str, Any] = self.originals()
        for key, layer in self.lora_layers().items():
            if not layer.disable_adapters:
                weights[key] = [self.layers[key].adapted(self.terms(key, layer, [row])) for row in rows]
        self.compare(trace, weights, "a batch of several adapters")

    @operation
    def rescale(self, name: str, factor: float) -> None:
        """``set_scale`` of one adapter in every layer."""
        for layer in self.lora_layers().values():
            layer.set_scale(name, factor)

    @operation
    def rescale_active(self, factor: float | None) -> None:
        """``scale_layer`` of the active adapters, or ``unscale_layer`` for None."""
        for layer in self.lora_layers().values():
            layer.unscale_layer() if factor is None else layer.scale_layer(factor)

    # The base weight

    @operation
    def merge(self, names: list[str] | None, safe: bool = False) -> None:
        """``merge_adapter``."""
        self.model.merge_adapter(names, safe_merge=safe)

    @operation
    def unmerge(self) -> None:
        """``unmerge_adapter``."""
        self.model.unmerge_adapter()

    @operation
    def unload(self) -> None:
        """``unload``: W, with what is merged into it."""
        weights = {k: r.adapted([(a, s) for _, a, s in r.merged]) for k, r in self.layers.items()}
        self.become(self.model.unload(), weights)

    @operation
    def merge_and_unload(self, names: list[str] | None) -> None:
        """``merge_and_unload``."""
        weights = self.originals()
        for key, layer in self.lora_layers().items():
            reference, merged = self.layers[key], [entry[0] for entry in self.layers[key].merged]
            new = [n for n in names or layer.active_adapters if n not in merged]
            past = [(adapter, scaling) for _, adapter, scaling in reference.merged]
            weights[key] = reference.adapted(past + self.terms(key, layer, new))
        self.become(self.model.merge_and_unload(adapter_names=names), weights)
        self.saved.clear()

    def become(self, network: Any, weights: dict[str, Tensor]) -> None:
        """The model is a network without adapters now."""
        self.model = network
        self.layers = {name: layer.continued(weights[name]) for name, layer in self.layers.items()}

    def originals(self) -> dict[str, Tensor]:
        """The weight of each layer before its adapters."""
        return {name: layer.weight for name, layer in self.layers.items()}

    # Values and their types

    @operation
    def train(self, name: str, seed: int, by: float = 0.3) -> None:
        """Change A, B and the magnitudes of one adapter."""
        generator = torch.Generator().manual_seed(seed)
        for key, layer in self.lora_layers().items():
            if name not in layer.lora_A:
                continue
            parameters = [layer.lora_A[name].weight, layer.lora_B[name].weight]
            if name in layer.lora_magnitude_vector:
                parameters.append(layer.lora_magnitude_vector[name].weight)
            before = product(layer, name)
            with torch.no_grad():
                for parameter in parameters:
                    noise = torch.randn(parameter.shape, generator=generator) * (1 if len(parameter.shape) > 1 else 0.3)
                    parameter.add_((by * noise).to(parameter.dtype))
            self.changed(key, layer, name, before)

    def changed(self, key: str, layer: Any, name: str, before: Tensor) -> None:
        """Update the reference of an adapter of which B·A was ``before``."""
        adapter = self.layers[key].adapters[name]
        adapter.product = adapter.product + product(layer, name) - before
        adapter.magnitude = magnitude_of(layer, name)

    @operation
    def step(self) -> None:
        """A gradient step, and the gradient of the input."""
        before = {
            (key, name): product(layer, name) for key, layer in self.lora_layers().items() for name in layer.lora_A
        }
        weights = {name: self.expected_weight(name) for name in LAYERS}
        x = self.x.to(self.dtype, copy=True).requires_grad_()
        self.model.train()
        self.model(x).square().sum().backward()
        self.model.eval()
        exact = x.detach().double().requires_grad_()
        y = exact
        for name in LAYERS:
            y = self.layers[name].compute(weights[name], y)
            y = y if name == LAYERS[-1] else torch.tanh(y)
        y.square().sum().backward()
        assert x.grad is not None
        assert exact.grad is not None
        # each layer multiplies the errors of the others by the norm of its weight
        size = torch.stack([torch.tensor(layer.size) for layer in self.layers.values()]).clamp(min=1).prod() ** 2
        if (
            not self.plain
            and (x.grad.double() - exact.grad).norm() > 16 * len(self.history) * self.unit * size * exact.grad.norm()
        ):
            raise Divergence("the gradient of the input is another one")
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad / (1 + parameter.grad.norm())
                    parameter.grad = None
        for (key, name), old in before.items():
            self.changed(key, self.lora_layers()[key], name, old)

    def tamper(self) -> None:
        """Change every base weight, as other code might. Adapters keep their change of the weight."""
        for name in LAYERS:
            reference, layer = self.layers[name], getattr(self.network, name)
            weight = getattr(layer, "base_layer", layer).weight.data
            change = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
            weight += change
            change = change.double() if change.shape == reference.weight.shape else change.double().mT
            reference.weight, reference.tampered = reference.weight + change, change

    @operation
    def cast(self, dtype: torch.dtype) -> None:
        """``to(dtype)`` of the whole model."""
        self.model.to(dtype)
        self.unit = max(self.unit, UNIT[dtype])

    @operation
    def replicate(self, way: str) -> None:
        """A copy or a pickle takes the place of the model, or the model moves to its own device."""
        ways = {"copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "move": lambda m: m.to("cpu")}
        self.model = ways[way](self.model)

    @operation
    def compiled(self) -> None:
        """The outputs of ``torch.compile``, also within ``disable_adapter``, are those of the model itself."""
        torch._dynamo.reset()
        program, x = torch.compile(self.model, backend="eager"), self.x.to(self.dtype)
        with torch.no_grad():
            for context in (self.hooked(False), self.model.disable_adapter(), self.hooked(False)):
                with context:
                    found, expected = program(x).double(), self.model(x).double()
                if not self.plain and (found - expected).norm() > 1e3 * self.unit * expected.norm():
                    raise Divergence("the compiled model computes something else")
