"""The tuning table: what it tries, and what it says."""

import pytest
import torch
from helpers import DEVICE

pytest.importorskip("triton")
from bench import tune
from usf_kernels.kernels import configs, products, score


@pytest.mark.parametrize("name", ["reduce", "linear"])
def test_every_choice_is_heard_with_a_way_to_try_it(name):
    heard, found = [], []
    z, matrix = torch.randn(2, 5, 3, 3, device=DEVICE), torch.randn(4, 5, device=DEVICE)

    def run():
        return score.squared_norm(z) if name == "reduce" else products.linear(z, matrix, None)

    def listener(said, candidates, attempt):
        heard.append(said)
        for config in tune.candidates_of(said, candidates):
            found.append(attempt(config).clone())
        assert len(found) > len(candidates)

    with configs.hearing(listener):
        expected = run()
    assert heard == [name]
    for result in found:
        torch.testing.assert_close(result, expected)
    run()
    assert heard == [name]  # nobody listens any more


def test_candidates_come_first_and_once():
    (pinned, *_) = first = [dict(config) for config in tune.MORE["resize"][:2]]
    found = tune.candidates_of("resize", first)
    assert found[:2] == first
    assert found.count(pinned) == 1
    assert {tuple(c.values()) for c in found} == {tuple(c.values()) for c in tune.MORE["resize"]}
    assert tune.candidates_of("no such kernel", first) == first


def test_a_summary_compares_a_kernel_with_itself_and_the_vendor():
    def row(kernel, kind, us):
        return {"kernel": kernel, "kind": kind, "us": us, "config": kind, "gb_per_s": "7", "host_us": "3"}

    rows = [row("reduce", "pinned", "10"), row("reduce", "other", "5"), row("resize", "pinned", "1")]
    assert "10.0 us" in tune.summary("map", rows)
    assert "x2.00 reduce other" in tune.summary("map", rows)
    assert "x4.00 vendor" in tune.summary("map", [*rows, row("vendor", "vendor", "2.5")])
    assert tune.summary("nothing", []) == "nothing"
