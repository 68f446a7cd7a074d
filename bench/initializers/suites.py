"""The suites of cases, and the providers that are measured on each."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import Case

MINILM_LINEARS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
SQUARE, UP, DOWN = (
    f"encoder.layer.2.{linear}.weight" for linear in ("attention.output.dense", "intermediate.dense", "output.dense")
)


def minilm(layer: int, linear: str, rank: int) -> Case:
    """A real weight of all-MiniLM-L6-v2, in its published precision."""
    return Case(
        f"minilm-{layer}.{linear}",
        MINILM_LINEARS[linear],
        rank,
        dtype="fp32",
        spectrum="real",
        source=f"encoder.layer.{layer}.{linear}.weight",
    )


def real_like(model: str, shape: tuple[int, int], rank: int, fan_in_fan_out: bool = False) -> Case:
    """A synthetic weight with the spectrum of the MiniLM weight that is closest in shape."""
    source = SQUARE if shape[0] == shape[1] else UP if shape[0] > shape[1] else DOWN
    return Case(model, shape, rank, spectrum="real-like", fan_in_fan_out=fan_in_fan_out, source=source)


@dataclass(frozen=True)
class Suite:
    """Cases and the providers that are measured on each.

    Attributes:
        cases: cases in the order of the rows.
        providers: names in :data:`bench.initializers.providers.PROVIDERS`.
    """

    cases: tuple[Case, ...]
    providers: tuple[str, ...]


LLAMA = "llama2-7b"
STANDARD = (
    "ours pissa",
    "ours pissa_niter_4",
    "ours pissa_niter_16",
    "peft pissa",
    "peft pissa_niter_4",
    "peft pissa_niter_16",
    "torch svd_lowrank niter 4 (SVD only)",
)
# Without PEFT's full SVD: its time depends on neither rank nor spectrum, and the suite "init" has it.
CURVES = (
    "ours pissa",
    "ours pissa_niter_1",
    "ours pissa_niter_4",
    "ours pissa_niter_16",
    "peft pissa_niter_1",
    "peft pissa_niter_4",
    "peft pissa_niter_16",
    "torch svd_lowrank niter 4 (SVD only)",
)
SUITES = {
    "init": Suite(
        (
            Case(LLAMA, (4096, 4096), 16),
            Case(LLAMA, (4096, 4096), 128),
            real_like(LLAMA, (4096, 4096), 16),
            minilm(2, "attention.output.dense", 16),
            minilm(2, "attention.output.dense", 64),
            minilm(2, "intermediate.dense", 16),
            minilm(2, "intermediate.dense", 64),
        ),
        STANDARD,
    ),
    "engine": Suite(
        (
            *(Case(LLAMA, (4096, 4096), rank) for rank in (8, 16, 64, 128, 256)),
            *(real_like(LLAMA, (4096, 4096), rank) for rank in (16, 128)),
            Case(LLAMA, (4096, 4096), 64, spectrum="power"),
            real_like("smollm-135m-up", (1536, 576), 16),
            real_like("smollm-135m-down", (576, 1536), 64),
            real_like("llama3.2-1b", (2048, 2048), 16),
            Case("llama3.2-1b", (2048, 2048), 64),
            Case(f"{LLAMA}-gate", (11008, 4096), 64),
            Case(f"{LLAMA}-down", (4096, 11008), 64),
            real_like(f"{LLAMA}-gate", (11008, 4096), 64),
            real_like(f"{LLAMA}-down", (4096, 11008), 64),
            real_like("llama3-8b-gate", (14336, 4096), 16),
        ),
        CURVES,
    ),
    "shapes": Suite(
        (
            minilm(2, "output.dense", 16),
            real_like("gpt2-c_attn", (2304, 768), 16, fan_in_fan_out=True),
            Case("llama3.2-1b", (2048, 2048), 16),
            real_like(f"{LLAMA}-gate", (11008, 4096), 16),
            real_like(f"{LLAMA}-down", (4096, 11008), 16),
        ),
        STANDARD,
    ),
    "small": Suite(
        (
            Case("tiny", (64, 64), 16, spectrum="flat"),
            Case("tiny", (128, 128), 16, spectrum="flat"),
            Case("tiny", (256, 256), 16, spectrum="flat"),
            Case("tiny", (256, 256), 128, spectrum="flat"),
            Case("tiny", (768, 768), 384, spectrum="flat"),
            minilm(2, "attention.output.dense", 192),
            minilm(2, "attention.output.dense", 384),
        ),
        ("ours pissa", "peft pissa"),
    ),
    "real": Suite(
        tuple(minilm(layer, linear, rank) for rank in (16, 64) for layer in range(6) for linear in MINILM_LINEARS),
        ("ours pissa", "ours pissa_niter_4", "peft pissa", "peft pissa_niter_4"),
    ),
    "quick": Suite(
        (
            minilm(2, "attention.output.dense", 8),
            Case("small", (512, 384), 8),
            Case("small", (320, 256), 4, dtype="fp16", spectrum="real-like", fan_in_fan_out=True, source=UP),
        ),
        STANDARD,
    ),
}
