"""What is multiplied in bfloat16."""

from __future__ import annotations

import pytest

from latentize.modeling.precision import Precision, Use


@pytest.mark.parametrize(
    ("precision", "narrow"),
    [
        (Precision(), set()),
        (Precision(faster=True), {Use.LEARNT}),
        (Precision(faster=True, hurried=True), {Use.LEARNT, Use.STATISTICS}),
        (Precision(faster=True, large=True), set(Use)),
        (Precision(large=True, hurried=True), set()),
    ],
)
def test_which_products_are_narrow(precision: Precision, narrow: set[Use]) -> None:
    assert {use for use in Use if precision.narrow(use)} == narrow
    assert precision.everything == (narrow == set(Use))
