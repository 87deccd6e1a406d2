"""How many regions a map could hold: against sums in arbitrary precision."""

import math

import nfa_oracle as oracle
import numpy as np
import pytest

from usf_kernels.number_of_tests import MOST_KEPT, counts, log_number_of_tests


@pytest.mark.parametrize(
    "sizes", [[(1, 1)], [(1, 3)], [(14, 14)], [(28, 28), (14, 14)], [(7, 9), (63, 1), (2, 2)]]
)
def test_log_number_of_tests(sizes):
    expected = oracle.log_number_of_tests([h * w for h, w in sizes])
    assert log_number_of_tests(sizes) == pytest.approx(expected, rel=1e-13)


def test_log_number_of_tests_of_large_maps():
    assert log_number_of_tests([(4096, 4096)]) == pytest.approx(4096**2 * math.log10(4.062570), rel=1e-6)
    for bad in ([], [(0, 3)], [(3,)], "28", [(2.5, 2)], 28):
        with pytest.raises((ValueError, TypeError), match="sizes"):
            log_number_of_tests(bad)


@pytest.mark.parametrize("side", [np.uint8(200), np.int32(100_000)])
def test_numbers_of_numpy_do_not_overflow(side):
    found = log_number_of_tests([(side, side)])
    assert type(found) is float
    assert found == log_number_of_tests([(int(side), int(side))])


def test_counts_of_large_maps_are_not_kept():
    small, large = (64, 16), (MOST_KEPT, 64)
    assert counts(small, "per_size") is counts(small, "per_size")
    first, again = (counts(large, "per_size") for _ in range(2))
    assert first is not again
    assert np.array_equal(first[0].by_size, again[0].by_size)
