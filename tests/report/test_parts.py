"""Reports of layers that have several matrices: stacks of experts, and grouped convolutions."""

from __future__ import annotations

import copy

import pytest
import torch

from pissa_kernels import Certificate, Report
from pissa_kernels.report.layer import frobenius_squared, of_parts
from pissa_kernels.report.spectrum import energy_of_all, least_rank

from ..support import reports

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def stack():
    loose = Certificate(30, 0.25, 3e-3, False, "chebyshev")
    return of_parts(
        NAME,
        [
            reports.layer("", (4.0, 2.0), 0.5, seconds=0.5),
            reports.layer("", (1.0, 1.0), 0.25, certificate=loose, seconds=0.5),
        ],
        seconds=0.75,
    )


def test_a_summary_holds_for_all_matrices_together():
    layer = stack()
    # ‖W‖_F² of the two matrices is 20/0.5 = 40 and 2/0.25 = 8
    assert layer.certificate == Certificate(30, pytest.approx(22 / 48), 3e-3, False, "krylov+chebyshev")
    assert layer.seconds == 0.75
    assert layer.singular_values.square().tolist() == pytest.approx([17 / 2, 5 / 2])
    assert frobenius_squared(layer) == pytest.approx(48)
    assert [part.name for part in layer.parts] == [f"{NAME}[0]", f"{NAME}[1]"]


def test_the_energy_of_a_model_counts_every_matrix():
    other = reports.layer("lm_head", (3.0, 1.0), 0.5)
    assert energy_of_all([stack(), other]) == pytest.approx((22 + 10) / (48 + 20))
    assert energy_of_all([stack()]) == pytest.approx(energy_of_all(stack().parts))


def test_the_least_rank_is_that_of_the_matrix_which_needs_most():
    assert least_rank(stack(), 0.75) == 2  # the first matrix has 16 of 20 in its first triplet, the second 1 of 2
    assert least_rank(stack(), 0.5) == 1
    assert least_rank(stack(), 0.4, of="whole") is None  # the second captures a quarter


def test_a_table_has_a_summary_and_a_row_for_each_matrix_on_request():
    report = Report([stack(), reports.layer("lm_head", (3.0, 1.0))])
    rows = report.table().splitlines()
    assert rows[2].split()[:2] == [NAME, "2×64×48"]
    assert rows[3].split()[0] == "lm_head"
    assert "2 layers of 3 matrices" in rows[-1]
    detailed = report.table(parts=True).splitlines()
    assert [row.split()[:2] for row in detailed[2:6]] == [
        [NAME, "2×64×48"],
        [f"{NAME}[0]", "64×48"],
        [f"{NAME}[1]", "64×48"],
        ["lm_head", "64×48"],
    ]
    assert "NO" in detailed[4].split()


def test_json_keeps_every_matrix():
    report = Report([stack()])
    again = Report.from_dict(report.to_dict())
    assert again.to_dict() == report.to_dict()
    assert [part.name for part in again.layers[0].parts] == [f"{NAME}[0]", f"{NAME}[1]"]
    assert torch.equal(again.layers[0].parts[1].singular_values, torch.tensor([1.0, 1.0]))
    assert "parts" not in Report([reports.layer("lm_head")]).to_dict()["layers"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.pop("certificate"), r"layers\[0\].parts\[1\]"),
        (lambda part: part.update(singular_values=[1.0]), r"layers\[0\].parts\[1\] has 1 singular values, rank 2"),
        (lambda part: part["certificate"].update(energy=None), r"layers\[0\].parts\[1\].certificate"),
    ],
)
def test_a_damaged_matrix_is_named(change, message):
    record = copy.deepcopy(Report([stack()]).to_dict())
    change(record["layers"][0]["parts"][1])
    with pytest.raises(ValueError, match=message):
        Report.from_dict(record)
