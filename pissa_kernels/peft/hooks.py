"""Which attributes of PEFT are replaced, and by what.

PEFT has no hook for an initializer, so ``LoraLayer.pissa_init`` is replaced. The other entries of :func:`hooks` supply
what it is not given: the name of the layer, the start and the end of an injection, the source of an adapter that is
loaded, and the model that will be saved. A wrapper calls the function that it replaced wherever the patch does not
apply to the thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..adapter.layers import in_scope
from ..runtime.shards import reshard
from .guards.guard import protect, protect_peft_model
from .guards.weighted import add_weighted_adapter
from .injection import first_process, kinds
from .injection.additions import check_addition, removed_on_failure
from .injection.creation import creating
from .injection.targets import is_pissa
from .injection.wrapping import injected, warn_of_plain_layers, wrapping
from .layers import tied_embeddings
from .layers.layer import LayerJob
from .layers.replicated import follow, split
from .layers.tied_embeddings import is_tied
from .saving import base_weights, start
from .saving.load import Source, loading, replace_records
from .saving.save import SavePretrained
from .scope import Injection, ReplacedModule, Session, injecting, replacing, setting
from .weights.offload import resident
from .weights.ties import Ties

Function = Callable[..., Any]


class Hook(NamedTuple):
    """An attribute to replace.

    Attributes:
        owner: a class or a module.
        attribute: name of a method, class method or function in it.
        wrap: makes the replacement from the session and the function that is found there.
    """

    owner: Any
    attribute: str
    wrap: Callable[[Session, Function], Function]


def hooks() -> list[Hook]:
    """Every attribute of PEFT that a patch replaces."""
    from peft import PeftModel, peft_model
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    return [
        Hook(LoraLayer, "pissa_init", wrap_pissa_init),
        Hook(LoraLayer, "reset_lora_parameters", kinds.wrap_reset_parameters),
        Hook(MultiheadAttention, "update_layer", kinds.wrap_update_attention),
        Hook(ParamWrapper, "update_layer", kinds.wrap_update_parameter),
        Hook(LoraModel, "_create_and_replace", wrap_create_and_replace),
        Hook(BaseTuner, "inject_adapter", wrap_inject_adapter),
        Hook(BaseTuner, "inject_adapter", start.wrap_inject_adapter),
        Hook(BaseTuner, "inject_adapter", base_weights.wrap_inject_adapter),
        Hook(peft_model, "set_peft_model_state_dict", base_weights.wrap_set_state),
        Hook(PeftModel, "from_pretrained", wrap_from_pretrained),
        Hook(PeftModel, "load_adapter", wrap_load_adapter),
        Hook(PeftModel, "__init__", wrap_adapter_creation),
        Hook(PeftModel, "add_adapter", wrap_adapter_creation),
        Hook(PeftAdapterMixin, "load_adapter", wrap_load_into_transformers),
    ]


def install(session: Session, hook: Hook) -> None:
    """Replace an attribute by a wrapper that keeps its session and what it has replaced."""
    found = vars(hook.owner)[hook.attribute]
    function = _function(found)
    wrapper: Any = functools.wraps(function)(hook.wrap(session, function))
    wrapper.__dict__.update(_pissa_kernels_session=session, _pissa_kernels_replaced=found)
    setattr(hook.owner, hook.attribute, classmethod(wrapper) if isinstance(found, classmethod) else wrapper)


def remove_ended(hook: Hook) -> None:
    """Remove the wrappers of ended sessions, as far as no other code has wrapped them since."""
    while True:
        function = _function(vars(hook.owner)[hook.attribute])
        session = getattr(function, "_pissa_kernels_session", None)
        if session is None or session.open:
            return
        setattr(hook.owner, hook.attribute, function._pissa_kernels_replaced)


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, classmethod) else found


def wrap_pissa_init(session: Session, previous: Function) -> Function:
    """Initialize the layers that this package handles; the method it replaced handles all others."""

    def pissa_init(layer: Any, adapter_name: str, init_lora_weights: str) -> None:
        if session.applies() and kinds.is_of_attention(replacing.get().module, layer):
            return  # initialized with its attention
        if session.applies() and in_scope(layer):
            session.initialize(layer, adapter_name, init_lora_weights)
        else:
            previous(layer, adapter_name, init_lora_weights)

    return pissa_init


def wrap_create_and_replace(session: Session, previous: Function) -> Function:
    """Check the module that PEFT wraps, and set its name for messages and the report."""

    def create_and_replace(
        self: Any,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        current_key: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        injection, parameter = injecting.get(), kwargs.get("parameter_name")
        nested = replacing.get().module is target  # of nested patches, one checks
        with contextlib.ExitStack() as stack:
            if injection is not None and not nested and session.applies() and is_pissa(lora_config):
                stack.enter_context(
                    wrapping(injection, self.model, lora_config, adapter_name, current_key, target, parameter)
                )
            stack.enter_context(setting(replacing, ReplacedModule(current_key, target)))
            if session.applies():
                stack.enter_context(creating(lora_config, target, parameter))
            if session.applies() and is_pissa(lora_config) and kinds.has_adapter(target, adapter_name, parameter):
                kinds.update(target, adapter_name, lora_config, current_key)
            else:
                previous(self, lora_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs)

    return create_and_replace


def wrap_inject_adapter(session: Session, previous: Function) -> Function:
    """Collect the layers of a model, and initialize them together at the end."""

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # of nested patches, the innermost collects
        if not session.applies() or injecting.get() is not None:
            previous(self, model, adapter_name, *args, **kwargs)
            return
        configs = self.peft_config
        reshard(model)
        check_addition(model, adapter_name, configs[adapter_name], loading=loading.get() is not None)
        replicated = any(getattr(config, "layer_replication", None) for config in configs.values())
        kept = functools.partial(is_tied, configs[adapter_name])
        injection = Injection(Ties(model, replicated=replicated, kept=kept), model)
        group = first_process.filled_from_first(model) if is_pissa(configs[adapter_name]) else None
        injection.filled_later = group is not None and not group.first
        if loading.get() is not None:  # each process has the file with the initial factors
            group = None
        try:
            with resident(model, adapter_name), removed_on_failure(model, adapter_name, injection):
                with contextlib.nullcontext() if group is None else group.together():
                    with injected(injection, configs[adapter_name], model, adapter_name):
                        with setting(injecting, injection):
                            previous(self, model, adapter_name, *args, **kwargs)
                        jobs, copies = split(injection.jobs, injection.ties)
                    for job in jobs:
                        injection.keep(job)
                    if not injection.filled_later:
                        run_together(session, injection, model, jobs, copies)
                if group is not None:
                    session.layers += first_process.follow_first(group, model, adapter_name, injection.jobs)
                    injection.notices.left_alone.clear()
                if is_pissa(configs[adapter_name]) and loading.get() is None:
                    warn_of_plain_layers(injection, model, adapter_name)
        finally:
            protect(self, model, session.reopen, add_weighted_adapter=add_weighted_adapter)

    return inject_adapter


def run_together(
    session: Session,
    injection: Injection,
    model: nn.Module,
    jobs: list[LayerJob],
    copies: list[tuple[LayerJob, LayerJob]],
) -> None:
    """Initialize the layers of an injection, and those that have the weight of one of them."""
    if jobs:
        session.run(jobs)
    session.layers += [follow(job, first) for job, first in copies]
    session.layers += tied_embeddings.follow(injection.tied, model)


def wrap_from_pretrained(session: Session, previous: Function) -> Function:
    """Take the residuals against the initial factors that the adapter was saved with."""

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(previous, cls, *args, **kwargs)
        if not _starts_load(session):
            return load()
        source, _ = Source.of_call(previous, cls, *args, **kwargs)
        return _load(session, source, load)

    return from_pretrained


def wrap_load_adapter(session: Session, previous: Function) -> Function:
    """As for ``from_pretrained``; values for an adapter that exists bring the initial factors that belong to them."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(previous, self, *args, **kwargs)
        if not _starts_load(session):
            return load()
        reshard(self)
        source, adapter_name = Source.of_call(previous, self, *args, **kwargs)
        values = source.values_for(self, adapter_name) if adapter_name in self.peft_config else []
        loaded = _load(session, source, load)
        replace_records(self.peft_config[adapter_name], adapter_name, values)
        return loaded

    return load_adapter


def wrap_load_into_transformers(session: Session, previous: Function) -> Function:
    """As for PEFT's ``load_adapter``, for transformers' own. With ``hotswap`` the adapter exists."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(previous, self, *args, **kwargs)
        arguments = inspect.signature(previous).bind(self, *args, **kwargs).arguments
        folder = arguments.get("peft_model_id")
        if folder is None or not _starts_load(session):
            return load()
        source = Source(folder, arguments.get("adapter_kwargs") or {})
        adapter_name = arguments.get("adapter_name") or "default"
        config = getattr(self, "peft_config", {}).get(adapter_name)
        values = [] if config is None else source.values_for(self, adapter_name)
        loaded = _load(session, source, load)
        replace_records(config, adapter_name, values)
        return loaded

    return load_adapter


def _starts_load(session: Session) -> bool:
    # not inside another one: from_pretrained calls load_adapter, and of nested patches the innermost does the work
    return session.applies() and loading.get() is None


def _load(session: Session, source: Source, load: Callable[[], Any]) -> Any:
    seen = len(session.layers)
    with setting(loading, source):
        loaded = load()
    source.warn_of_other_residuals(session.layers[seen:])
    return loaded


def wrap_adapter_creation(session: Session, previous: Function) -> Function:
    """Give the model a ``save_pretrained`` that also saves the initial factors, after the patch has ended too."""

    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        if session.applies() and "_modules" in vars(self):  # not while it is created
            reshard(self)
        previous(self, *args, **kwargs)
        if session.applies():
            self.save_pretrained = SavePretrained(self)
            protect_peft_model(self, session.reopen)

    return create
