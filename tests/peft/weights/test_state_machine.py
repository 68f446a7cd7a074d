"""Random sequences of operations on a PiSSA model: after each, a float64 reference or a refusal that changed nothing.

``PISSA_KERNELS_STATE_MACHINE=N`` runs N sequences with new seeds. Without it the sequences are the same in every run:
800 of them, as many as two cores run in a minute.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from ...support.lora_errors import quiet
from ...support.lora_files import ModelWalk
from ...support.lora_reference import LAYERS

LONG = int(os.environ.get("PISSA_KERNELS_STATE_MACHINE", "0"))
# none is part of "base_model" or of a layer: PEFT finds an adapter by such a search when it swaps one
NAMES = ("default", "second", "third", "fourth")
INITS = ("pissa", "pissa", "pissa", "pissa_niter_2", True)
TARGETS = (LAYERS, LAYERS, LAYERS[:2], LAYERS[1:], LAYERS[:1])

settings = st.fixed_dictionaries(
    {
        "init_lora_weights": st.sampled_from(INITS),
        "r": st.sampled_from((2, 3, 4)),
        "lora_alpha": st.sampled_from((4, 8)),
        "use_rslora": st.sampled_from((False, False, False, True)),
        "use_dora": st.sampled_from((False, False, False, False, True)),
        "target_modules": st.sampled_from(TARGETS),
        "rank_pattern": st.sampled_from(({}, {}, {"last": 1})),
        "alpha_pattern": st.sampled_from(({}, {}, {"middle": 2})),
    }
)
index = st.integers(0, 3)
factors = st.sampled_from((0.5, 1.0, 2.0))
sometimes = st.sampled_from((False, False, False, True))


class Machine(RuleBasedStateMachine):
    """The rules: which operations make sense in which state. Arguments are indices into what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.walk = ModelWalk()
        self.settings: dict[str, dict[str, Any]] = {}

    def teardown(self) -> None:
        self.walk.close()

    def name(self, which: int) -> str:
        """One of the adapters."""
        return self.walk.names[which % len(self.walk.names)]

    def free(self) -> str:
        """A name that no adapter has."""
        return next(name for name in NAMES if name not in self.walk.names)

    def some(self, which: int) -> list[str]:
        """Some of the adapters, in any order."""
        names = self.walk.names
        return (names[which % len(names) :] + names[: which % len(names)])[: 1 + which % 2]

    def remember(self, name: str, chosen: dict[str, Any]) -> None:
        """Keep the settings of an adapter, so that another one can be given the same."""
        self.settings[name] = chosen

    def is_wrong_in_peft(self, chosen: dict[str, Any]) -> bool:
        """Whether no layer is PiSSA's, and PEFT takes DoRA's magnitudes from a weight with a merged adapter."""
        plain = not self.walk.pissa() and chosen["init_lora_weights"] is True
        return plain and chosen["use_dora"] and self.walk.merged

    adapted = precondition(lambda self: not self.walk.ended and self.walk.names)
    bare = precondition(lambda self: not self.walk.ended and not self.walk.adapted)
    room = precondition(lambda self: not self.walk.ended and 0 < len(self.walk.names) < len(NAMES))
    saved = precondition(lambda self: not self.walk.ended and self.walk.saved)

    @initialize(chosen=settings)
    def first(self, chosen: dict[str, Any]) -> None:
        self.walk.start("default", chosen)
        self.remember("default", chosen)

    @bare
    @rule(chosen=settings)
    def start(self, chosen: dict[str, Any]) -> None:
        self.walk.start("default", chosen)
        self.remember("default", chosen)

    @room
    @rule(chosen=settings, hooked=st.booleans())
    def add(self, chosen: dict[str, Any], hooked: bool) -> None:
        if not self.is_wrong_in_peft(chosen):
            name = self.free()
            self.remember(name, chosen)
            self.walk.add(name, chosen, hooked)

    @room
    @rule(which=index, hooked=st.booleans())
    def add_with_the_same_settings(self, which: int, hooked: bool) -> None:
        chosen = self.settings.get(self.name(which))
        if chosen is not None and not self.is_wrong_in_peft(chosen):
            name = self.free()
            self.remember(name, chosen)
            self.walk.add(name, chosen, hooked)

    @room
    @rule(chosen=settings)
    def add_olora(self, chosen: dict[str, Any]) -> None:
        if self.walk.pissa():
            self.walk.add(self.free(), {**chosen, "init_lora_weights": "olora", "use_dora": False}, True)

    @adapted
    @rule(which=index, seed=st.integers(0, 99))
    def train(self, which: int, seed: int) -> None:
        if not self.walk.merged:  # PEFT takes the present values out again, and cannot know the earlier ones
            self.walk.train(self.name(which), seed)

    @adapted
    @rule(which=index)
    def use(self, which: int) -> None:
        self.walk.use(self.some(which))

    @adapted
    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        self.walk.enable(enabled)

    @adapted
    @rule()
    def without(self) -> None:
        self.walk.without()

    @adapted
    @rule()
    def original(self) -> None:
        if self.walk.pissa():
            self.walk.original()

    @adapted
    @rule(which=index, base=st.booleans())
    def mixed(self, which: int, base: bool) -> None:
        names = self.some(which)
        # PEFT refuses these, and leaves its own hooks in the model then
        if not self.walk.merged and not any(self.walk.model.peft_config[name].use_dora for name in names):
            self.walk.mixed([*names, *["__base__"] * base])

    @adapted
    @rule(which=index, factor=factors)
    def rescale(self, which: int, factor: float) -> None:
        if not self.walk.merged:
            self.walk.rescale(self.name(which), factor)

    @adapted
    @rule(factor=st.sampled_from((None, 0.5, 2.0)))
    def rescale_active(self, factor: float | None) -> None:
        if not self.walk.merged:
            self.walk.rescale_active(factor)

    @adapted
    @rule(which=st.none() | index, safe=st.booleans())
    def merge(self, which: int | None, safe: bool) -> None:
        self.walk.merge(None if which is None else self.some(which), safe)

    @adapted
    @rule()
    def unmerge(self) -> None:
        self.walk.unmerge()

    @adapted
    @rule()
    def unload(self) -> None:
        self.walk.unload()

    @adapted
    @rule()
    def unload_residual(self) -> None:
        names = self.walk.names
        if len(names) == 1 and self.walk.pissa() == names and not self.walk.merged:
            self.walk.unload_residual(names[0])

    @adapted
    @rule(which=st.none() | index)
    def merge_and_unload(self, which: int | None) -> None:
        self.walk.merge_and_unload(None if which is None else self.some(which))

    @adapted
    @rule(which=index)
    def delete(self, which: int) -> None:
        if len(self.walk.names) > 1:
            self.walk.delete(self.name(which))

    @room
    @rule(which=index, kind=st.sampled_from(("cat", "svd", "linear")), weights=st.tuples(factors, factors))
    def weighted(self, which: int, kind: str, weights: tuple[float, float]) -> None:
        names = self.some(which)
        self.walk.weighted(names, list(weights[: len(names)]), self.free(), kind)

    @adapted
    @rule()
    def step(self) -> None:
        if not self.walk.merged:
            self.walk.step()

    @precondition(lambda self: self.walk.ended)
    @rule()
    def stay(self) -> None:
        """Nothing can be said of the model any more."""

    @adapted
    @rule(dtype=st.sampled_from((torch.bfloat16, torch.float64, torch.float32)), seldom=sometimes)
    def cast(self, dtype: torch.dtype, seldom: bool) -> None:
        if seldom and not self.walk.merged:
            self.walk.cast(dtype)

    @adapted
    @rule(way=st.sampled_from(("copy", "pickle", "move")))
    def replicate(self, way: str) -> None:
        self.walk.replicate(way)

    @adapted
    @rule(chance=st.integers(0, 99))
    def compiled(self, chance: int) -> None:
        if chance == 99:  # a second each
            self.walk.compiled()

    @adapted
    @rule(which=index)
    def save(self, which: int) -> None:
        self.walk.save(self.name(which))

    @saved
    @rule(which=index)
    def reload(self, which: int) -> None:
        self.walk.reload(which % len(self.walk.saved))

    @saved
    @rule(which=index)
    def load_start(self, which: int) -> None:
        if not self.walk.adapted:
            self.walk.load_start(which % len(self.walk.saved))

    @saved
    @rule(which=index, hooked=st.booleans())
    def load_as_a_new_adapter(self, which: int, hooked: bool) -> None:
        if 0 < len(self.walk.names) < len(NAMES):
            self.walk.load(which % len(self.walk.saved), self.free(), hooked)

    @saved
    @rule(which=index, into=index, hooked=st.booleans(), swap=st.booleans())
    def load_into_an_adapter(self, which: int, into: int, hooked: bool, swap: bool) -> None:
        if not self.walk.names or self.walk.merged:
            return
        which, name = which % len(self.walk.saved), self.name(into)
        if self.walk.saved[which].settings != self.walk.shape_of(name):
            return
        if swap:
            self.walk.hotswap(which, name, hooked)
        else:
            self.walk.load(which, name, hooked)

    @adapted
    @rule(which=index)
    def save_residual(self, which: int) -> None:
        self.walk.save_residual(self.name(which))

    @adapted
    @rule(which=index)
    def convert(self, which: int) -> None:
        if self.name(which) in self.walk.pissa():
            self.walk.convert(self.name(which))


@pytest.mark.slow
def test_random_sequences() -> None:
    with quiet():
        run_state_machine_as_test(
            Machine,
            settings=hypothesis.settings(
                max_examples=LONG or 800,
                stateful_step_count=12,
                deadline=None,
                derandomize=not LONG,
                report_multiple_bugs=False,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
