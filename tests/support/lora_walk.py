"""A PEFT model and its float64 reference through a sequence of operations: what is checked after each of them."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

import pissa_kernels as pk

from .lora_errors import Divergence, documented
from .lora_reference import LAYERS, WIDTHS, Adapter, Network, ReferenceLayer

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SAMPLES = 6
# Operations that are right in float32 on weights that no other code has changed, as long as no adapter has DoRA
NEVER_REFUSED = ("start", "load_start", "use", "enable", "without", "rescale", "rescale_active", "unmerge", "unload")
NEVER_REFUSED += ("step", "train", "replicate", "compiled", "save", "reload", "delete")
REFUSED_WHILE_MERGED = ("mixed", "hotswap", "load")
Method = TypeVar("Method", bound=Callable[..., None])


def operation(method: Method) -> Method:
    """A method that calls PEFT once and then updates the reference; what must hold afterwards is checked.

    An exception of the call leaves the reference as it was. It is accepted if it is one of the documented refusals, and
    nothing in the model has changed; or if PEFT raises it for the same sequence of calls with plain LoRA adapters.
    """

    @functools.wraps(method)
    def run(self: Walk, *args: Any, **kwargs: Any) -> None:
        call = functools.partial(method, self, *args, **kwargs)
        step = (method.__name__, args, kwargs)
        if self.plain:
            call()
            return
        before = self.snapshot()
        try:
            call()
        except Divergence:
            raise
        except Exception as error:
            self.judge(error, step, before)
            return
        self.history.append(step)
        self.check(step)

    return run  # type: ignore[return-value]


class Walk:
    """A model, its reference, and what has been done to them.

    Args:
        plain: make every adapter a plain LoRA, and check nothing: what PEFT alone does with the same calls.

    Attributes:
        model: the network; a ``PeftModel`` around it while there are adapters.
        base: copy of the network before its adapters.
        layers: the reference of each layer.
        history: every operation that has succeeded.
        refusals: message of each documented refusal, after the operation's name; "PEFT: …" for PEFT's own errors.
        ended: whether PEFT itself has failed half way; nothing more is known of the model then.
    """

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.model: Any = Network().eval()
        self.base: Any = Network().eval()
        self.layers = {name: ReferenceLayer.of(getattr(self.model, name)) for name in LAYERS}
        self.history: list[tuple[str, Any, Any]] = []
        self.refusals: list[tuple[str, str]] = []
        self.unit, self.ended = UNIT[torch.float32], False
        self.x = torch.randn(SAMPLES, WIDTHS[0], generator=torch.Generator().manual_seed(1))

    def close(self) -> None:
        """Delete the files of this walk."""
        if self._folder is not None:
            self._folder.cleanup()

    def new_folder(self) -> Path:
        """A folder that does not exist."""
        self._folder = self._folder or tempfile.TemporaryDirectory()
        return Path(tempfile.mkdtemp(dir=self._folder.name)) / "out"

    # What the model is, by PEFT's own bookkeeping

    @property
    def adapted(self) -> bool:
        """Whether the model is a ``PeftModel``."""
        return isinstance(self.model, peft.PeftModel)

    @property
    def network(self) -> Any:
        """The network within the model."""
        return self.model.base_model.model if self.adapted else self.model

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return list(self.model.peft_config) if self.adapted else []

    def lora_layers(self, model: Any = None) -> dict[str, Any]:
        """The LoRA layers of a model, by default of this walk's, by name."""
        network = self.network if model is None else model.base_model.model
        found = {name: getattr(network, name) for name in LAYERS}
        return {name: layer for name, layer in found.items() if isinstance(layer, LoraLayer)}

    @property
    def merged(self) -> bool:
        """Whether any layer has a merged adapter."""
        return any(layer.merged_adapters for layer in self.lora_layers().values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights."""
        return next(self.network.parameters()).dtype  # type: ignore[no-any-return]

    def pissa(self) -> list[str]:
        """Names of the adapters that have initial factors in some layer."""
        return [n for n in self.names if any(r.adapters[n].start for r in self.layers.values() if n in r.adapters)]

    def hooked(self, hooked: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of the patch, or an empty one."""
        return pk.patch_peft(progress=False) if hooked else contextlib.nullcontext()

    # What the reference says that it computes

    def terms(self, name: str, layer: Any, adapters: Iterator[str] | list[str]) -> list[tuple[Adapter, float]]:
        """The adapters that one layer has of some names, with their present scalings."""
        own = self.layers[name].adapters
        return [(own[n], float(layer.scaling[n])) for n in adapters if n in layer.lora_A]

    def expected_weight(self, name: str) -> Tensor:
        """The weight that a layer has to compute with now."""
        reference, layer = self.layers[name], self.lora_layers().get(name)
        if layer is None or layer.disable_adapters:
            return reference.weight
        if layer.merged_adapters:
            return reference.adapted([(adapter, scaling) for _, adapter, scaling in reference.merged])
        return reference.adapted(self.terms(name, layer, layer.active_adapters))

    def follow_merges(self) -> None:
        """Note what has been merged since, with the values that it has now."""
        for name, layer in self.lora_layers().items():
            reference = self.layers[name]
            kept = [entry for entry in reference.merged if entry[0] in layer.merged_adapters]
            known = [entry[0] for entry in kept]
            for adapter in layer.merged_adapters:
                if adapter not in known and adapter in layer.lora_A:
                    found = reference.adapters[adapter]
                    kept.append((adapter, Adapter(**vars(found)), float(layer.scaling[adapter])))
            reference.merged = kept

    # Checks

    def forward(self, model: Any = None, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output of each layer."""
        trace: dict[str, tuple[Tensor, Tensor]] = {}
        model = self.model if model is None else model
        with torch.no_grad():
            model(self.x.to(next(model.parameters()).dtype), trace=trace, **kwargs)
        return trace

    def compare(
        self,
        trace: dict[str, tuple[Tensor, Tensor]],
        weights: dict[str, Any],
        what: Any,
        layers: dict[str, ReferenceLayer] | None = None,
    ) -> None:
        """Compare each layer's output with that of a weight, or of one weight for each sample."""
        if self.plain:
            return
        roundings = len(self.history) + 1
        for name, (x, y) in trace.items():
            reference, weight = (layers or self.layers)[name], weights[name]
            rows = weight if isinstance(weight, list) else [weight] * len(x)
            expected = torch.cat([reference.compute(w, x[i : i + 1]) for i, w in enumerate(rows)])
            # one more for the bias and the output itself, each at most as large as the output
            bound = reference.allowed(roundings, self.unit) * x.double().norm() + 4 * self.unit * expected.norm()
            error = (y.double() - expected).norm()
            if not error <= bound:
                relative = float(error / expected.norm())
                raise Divergence(
                    f"{what}: layer {name!r} is off by {relative:.2g} (allowed {bound:.2g} of {error:.2g})"
                )

    def check(self, step: Any) -> None:
        """Compare every layer of the model with its reference."""
        if self.ended:
            return
        self.follow_merges()
        weights = {name: self.expected_weight(name) for name in LAYERS}
        try:
            trace = self.forward()
        except Exception as error:
            if documented(error) and self.variant_is_active():
                self.refusals.append(("forward", str(error)))
                return
            if type(error) is not type(self.error_of_plain(None)):
                raise Divergence(f"{step}: a forward pass raised {error!r}") from error
            self.refusals.append(("forward", f"PEFT: {error}"))
            self.ended = True
            return
        self.follow_merges()  # a forward pass of disabled layers unmerges them
        self.compare(trace, weights, step)

    def variant_is_active(self) -> bool:
        """Whether a DoRA adapter is active that need not be exact: beside another one, rescaled, or not the first."""
        for name, layer in self.lora_layers().items():
            active = [n for n in layer.active_adapters if n in layer.lora_A]
            if any(self.layers[name].adapters[n].magnitude is not None for n in active):
                alone = len([step for step in self.history if step[0] in ("start", "load_start")]) == len(self.history)
                return not alone
        return False

    def snapshot(self) -> dict[str, Any]:
        """All that an operation may change, and the outputs, to the bit."""
        state: dict[str, Any] = {key: value.clone() for key, value in self.model.state_dict().items()}
        for name, layer in self.lora_layers().items():
            state[f"{name}: state"] = (
                list(layer.active_adapters),
                list(layer.merged_adapters),
                layer.disable_adapters,
                dict(layer.scaling),
                sorted(layer.lora_variant),
                [id(record.lora_A) for record in layer.__dict__.get("pissa_initial", [])],
                len(layer._forward_hooks),
            )
        state["modules"] = [(name, type(module).__name__) for name, module in self.model.named_modules()]
        if self.adapted:
            state["configs"] = {name: config.to_dict() for name, config in self.model.peft_config.items()}
            state["active"] = list(self.model.active_adapters)
        try:
            state |= {f"{name}: output": y for name, (_, y) in self.forward().items()}
        except Exception as error:
            state["outputs"] = str(error)
        return state

    def changes(self, before: dict[str, Any]) -> list[str]:
        """What differs from a snapshot."""
        now = self.snapshot()
        return [
            key
            for key in before.keys() | now.keys()
            if key not in before
            or key not in now
            or not (torch.equal(before[key], now[key]) if isinstance(now[key], Tensor) else before[key] == now[key])
        ]

    def judge(self, error: Exception, step: tuple[str, Any, Any], before: dict[str, Any]) -> None:
        """Accept a documented refusal that has changed nothing, or an error that PEFT itself raises."""
        if documented(error):
            if self.must_succeed(step):
                raise Divergence(f"{step}: refused ({error}), but it can be right") from error
            if changed := self.changes(before):
                raise Divergence(f"{step}: refused ({error}), but these have changed: {changed}") from error
            self.refusals.append((step[0], str(error)))
            return
        if type(error) is not type(self.error_of_plain(step)):
            raise Divergence(f"{step}: raised {error!r}, which is no documented refusal") from error
        self.refusals.append((step[0], f"PEFT: {error}"))
        self.ended = bool(self.changes(before))

    def must_succeed(self, step: tuple[str, Any, Any]) -> bool:
        """Whether an operation has to be right: in float32, without DoRA, on weights that no other code has changed."""
        name, args, _ = step
        for layer in self.layers.values():
            dora = any(adapter.magnitude is not None for adapter in layer.adapters.values())
            if dora or isinstance(layer.tampered, Tensor):
                return False
        if self.dtype != torch.float32 or self.unit != UNIT[torch.float32]:
            return False
        if name == "add":
            return not args[1].get("use_dora") and args[1]["init_lora_weights"] != "olora"
        return name in NEVER_REFUSED or (name in REFUSED_WHILE_MERGED and not self.merged)

    def error_of_plain(self, step: tuple[str, Any, Any] | None) -> Exception | None:
        """What PEFT raises after the same history with plain LoRA adapters: for an operation, or a forward pass."""
        twin = type(self)(plain=True)
        try:
            for name, args, kwargs in [*self.history, step] if step else self.history:
                getattr(twin, name)(*args, **kwargs)
            twin.forward()
        except Exception as error:
            return error
        finally:
            twin.close()
        return None
