"""A figure is a value, its standard error and what they are over."""

import math

import pytest
import torch

from ltm_hf.evaluation.figures import beyond_noise, cell, figure, shortened, written


def test_a_figure_is_a_mean_with_its_error():
    assert figure(torch.tensor([1.0, 2.0, 6.0])) == {
        "value": pytest.approx(3.0),
        "error": pytest.approx(math.sqrt(7 / 3)),  # variance 7 with n - 1, over n
        "n": 3,
    }
    assert figure(torch.tensor([True])) == {"value": 1.0, "error": None, "n": 1}
    assert figure([]) == {"value": None, "error": None, "n": 0} and cell(figure([])) == written(figure([])) == "–"
    for broken in (math.nan, math.inf):  # is not left out
        one = figure([1, broken])
        assert one == {"value": None, "error": None, "n": 2} and cell(one) == written(one) == "not finite"


def test_in_words():
    assert written({"value": 0.125, "error": 0.01}, 1, 100, sign=True) == "+12.5 ± 1.0"
    assert written({"value": -0.125, "error": None}, 2) == "-0.12"
    assert shortened("one\ntwo  three", 20) == "one two three" and shortened("one two three", 9) == "one two …"


@pytest.mark.parametrize(
    ("mean", "error", "answer"), [(0.3, 0.1, True), (-0.3, 0.1, True), (0.19, 0.1, False), (0.0, 0.0, False)]
)
def test_noise_is_two_standard_errors(mean, error, answer):
    assert beyond_noise({"value": mean, "error": error}) is answer
    assert not beyond_noise({"value": mean, "error": None})
