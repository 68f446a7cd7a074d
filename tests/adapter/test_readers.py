"""adapter.readers: which reads of a weight are found in the source of a class."""

from __future__ import annotations

import torch
from torch import nn

from pissa_kernels.adapter.readers import Reader, reader_of, weight_reads


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = self.c = self.d = nn.Linear(2, 2)
        nn.init.zeros_(self.a.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.weight

    def helper(self) -> torch.Tensor:
        with torch.no_grad():
            for _ in range(2):
                found = self.inner.b.weight.T
        return found

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.d.weight)


class Describing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.a.weight, torch.Tensor) and self.a.weight.dtype != torch.int8:
            x = x.to(self.a.weight.device)
        self.b.weight = nn.Parameter(x)
        other = self.a
        return other.weight.new_zeros(self.a.weight.shape[0])


class Conditional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c.weight if self.training else x
        if self.fused:
            return x @ self.a.weight
        return self.b.weight + y


class Fusing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + x @ self.b.weight

    def fuse_projections(self) -> None:
        self.both.weight.data.copy_(torch.cat([self.a.weight, self.b.weight]))


class Overriding(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def test_reads_and_their_conditions() -> None:
    assert weight_reads(Base) == {"a": True, "inner.b": True}
    assert weight_reads(Describing) == {}
    assert weight_reads(Conditional) == {"a": False, "b": True, "c": False}


def test_a_method_that_a_caller_has_to_ask_for() -> None:
    assert weight_reads(Fusing) == {"a": False, "b": True, "both": False}


def test_a_method_that_is_overridden_does_not_count() -> None:
    assert weight_reads(Overriding) == {"inner.b": True}


def test_a_class_without_source_has_no_reads() -> None:
    made = type("Made", (nn.Module,), {})
    assert weight_reads(made) == {}
    assert weight_reads(int) == {}


def test_the_reader_may_be_any_module_around() -> None:
    base = Base()
    base.inner = Conditional()
    base.inner.b = nn.Linear(2, 2)
    base.inner.a = nn.Linear(2, 2)
    model = nn.Sequential(base)
    assert reader_of(model, "0.a") == Reader("0", "Base", True)
    assert reader_of(model, "0.inner.b") == Reader("0", "Base", True)
    assert reader_of(model, "0.inner.a") == Reader("0.inner", "Conditional", False)
    assert reader_of(model, "0.c") is None
    assert reader_of(nn.Linear(2, 2), "weight") is None


def test_modules_of_torch() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2)
    found = {name: reader_of(encoder, name) for name in ("linear1", "self_attn.out_proj", "norm1")}
    assert found["linear1"] == Reader("", "TransformerEncoderLayer", True)
    assert found["self_attn.out_proj"] is not None
    assert found["norm1"] is None
