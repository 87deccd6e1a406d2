"""Launchers done again from notes: the same bits as without, and only where that is right."""

import weakref

import pytest
import torch
from helpers import DEVICE, layouts

pytest.importorskip("triton")
from usf_kernels.kernels import (
    anomaly_map,
    block,
    configs,
    coupling,
    coupling_backward,
    finish,
    launch,
    linear_norm,
    lu_conv,
    masked,
    outer,
    products,
    replay,
    rows,
    score,
)

pytestmark = pytest.mark.usefixtures("nan_memory")


def draw(*shape):
    return torch.randn(shape, device=DEVICE)


def index(channels, chosen=None):
    return torch.randperm(channels)[:chosen].to(DEVICE)


def triangles():
    return [0.1 * draw(19, 19) + torch.eye(19, device=DEVICE) for _ in range(2)]


def exits(channels):
    return index(channels), draw(channels).exp(), draw(channels)


def calls():
    """Name, launcher, and a maker of its arguments: all that is replayed."""
    small = (3, 6, 5, 4)
    step = coupling.coupling_step
    yield "additive", step, lambda: (draw(*small), draw(3, 3, 5, 4), None, None, None, 3, None, False)
    yield "affine", step, lambda: (draw(*small), draw(*small), None, None, None, 3, 2.0, False)
    yield "step", step, lambda: (draw(*small), draw(*small), *exits(6), 3, 2.0, True)
    yield "vectors", step, lambda: (draw(7, 6), draw(7, 6), *exits(6), 3, 2.0, False)
    back = coupling_backward.coupling_step_backward
    yield (
        "backward",
        back,
        lambda: (draw(*small), draw(3), draw(*small), draw(*small), *exits(6), 3, 2.0, False),
    )
    yield "masked", masked.masked_shift, lambda: (draw(*small), draw(*small), draw(5, 4) > 0, False)
    yield "masked backward", masked.masked_shift, lambda: (None, draw(*small), draw(5, 4) > 0, True)
    yield "norm", score.squared_norm, lambda: (draw(*small),)
    yield "norm backward", score.squared_norm_backward, lambda: (draw(3, 5, 4), draw(*small))
    yield "linear", products.linear, lambda: (draw(*small), draw(4, 6), draw(4))
    yield "outer", outer.outer, lambda: (draw(*small), draw(3, 4, 5, 4))
    yield "linear norm", linear_norm.linear_squared_norm, lambda: (draw(*small), draw(40, 6), None)
    yield (
        "residual",
        block.residual_mlp,
        lambda: (
            *(draw(*small), draw(9, 6), draw(9), draw(6, 9), None),
            *(draw(1, 9, 5, 4), "relu", False),
        ),
    )
    yield (
        "wide residual",
        block.residual_mlp,
        lambda: (
            *(draw(1, 66, 2, 2), draw(33, 66), draw(33), draw(66, 33), None),
            *(None, "relu", True),
        ),
    )
    yield (
        "finish",
        finish.finish,
        lambda: (
            *(draw(*small), draw(6), draw(*small), True, -1),
            torch.empty(small, device=DEVICE),
        ),
    )
    for inverse in (False, True):
        yield f"matrix {inverse}", lu_conv.lu_matrix, lambda i=inverse: (*triangles(), i, torch.float32)
    yield "select", rows.select_rows, lambda: (draw(11, 6), index(6, 3))
    yield "add", rows.add_rows, lambda: (draw(11, 6), index(6, 3), draw(11, 3), -1)
    yield (
        "affine rows",
        rows.affine_rows,
        lambda: (draw(11, 6), index(6, 3), draw(11, 6), draw(3), 2.0, False),
    )
    for latent in (False, True):
        yield (
            f"map {latent}",
            anomaly_map.anomaly_map,
            lambda i=latent: (
                *([draw(2, 6, 5, 4), draw(2, 3, 3, 2)], [7, 9]),
                i,
            ),
        )


CALLS = {name: rest for name, *rest in calls()}


def everything(launcher, arguments):
    """What a launcher returns, and its tensors, into which it may write."""
    result = launcher(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    return [v for v in (*results, *arguments) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_again(name, monkeypatch):
    launcher, make = CALLS[name]
    everything(launcher, make())
    ((_, notes),) = replay._known.items()
    assert notes is not None
    for _ in range(2):
        arguments = make()
        given = [v.clone() if isinstance(v, torch.Tensor) else v for v in arguments]
        expected = everything(launcher.__wrapped__, given)
        with monkeypatch.context() as patch:
            patch.setattr(replay, "_noted", None)  # not needed again
            found = everything(launcher, arguments)
        assert len(found) == len(expected)
        for actual, truth in zip(found, expected, strict=True):
            assert actual.stride() == truth.stride()
            assert actual.dtype == truth.dtype
            assert torch.equal(actual, truth)


def test_results_do_not_share_memory():
    launcher, make = CALLS["affine"]
    first, second, third = (launcher(*make()) for _ in range(3))
    kept = [v.clone() for v in second]
    launcher(*make())
    assert all(torch.equal(v, k) for v, k in zip(second, kept, strict=True))
    assert len({v.data_ptr() for result in (first, second, third) for v in result}) == 6


@pytest.mark.parametrize("name", CALLS)
def test_notes_keep_no_tensors(name):
    launcher, make = CALLS[name]
    arguments = make()
    results = launcher(*arguments)
    tensors = [v for v in arguments if isinstance(v, torch.Tensor)]
    alive = [weakref.ref(v) for v in tensors]
    del arguments, results, tensors
    assert [ref() for ref in alive] == [None] * len(alive)


def test_other_forms_are_noted_anew():
    x, shift = draw(2, 8, 4, 4), draw(2, 4, 4, 4)
    shifted = torch.empty(257, device=DEVICE)[1:].copy_(x.flatten()).view(x.shape)  # 4 bytes off
    inputs = [(x, shift), (x.double().float()[:1], shift[:1]), (shifted, shift), (x, shift.half())]
    inputs += [(other, shift) for _, other in layouts(x)]
    for a, b in inputs:
        for _ in range(2):
            y = coupling.additive_coupling(a, b, 4, False)
            assert torch.equal(y[:, 4:], a[:, 4:] + b)
    assert len(replay._known) >= 6


def test_what_copies_its_input_is_not_replayed():
    crop = draw(2, 8, 6, 6)[..., 1:-1, 1:-1]
    for _ in range(2):
        assert torch.equal(score.squared_norm(crop), score.squared_norm(crop.contiguous()))
    assert None in replay._known.values()


def test_a_change_of_precision_is_seen():
    chosen = []
    linear = products.linear.__wrapped__

    @replay.replayed
    def launcher(x, matrix):
        chosen.append(launch.product_precision())
        return linear(x, matrix, None)

    x, matrix = draw(2, 6, 3, 3), draw(6, 6)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True, False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            launcher(x, matrix)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert chosen == ["ieee", "tf32"]


def test_tuners_and_recorders_see_every_call():
    launcher, make = CALLS["norm"]
    launcher(*make())
    heard = []
    with configs.hearing(lambda name, candidates, attempt: heard.append(name)):
        for _ in range(2):
            launcher(*make())
    assert heard == ["reduce", "reduce"]
    with launch.record() as launches:
        launcher(draw(3, 6, 5, 4).to("meta"))
    assert launches


def test_a_failure_leaves_nothing_behind():
    @replay.replayed
    def launcher(x, fails):
        if fails:
            raise ValueError("no")
        return score.squared_norm(x)

    x = draw(2, 3, 4)
    with pytest.raises(ValueError, match="no"):
        launcher(x, True)
    assert torch.equal(launcher(x, False), score.squared_norm(x))
    assert len(replay._known) == 2


def test_notes_are_bounded(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    for length in range(1, 9):
        x = draw(2, 3, length)
        assert torch.equal(score.squared_norm(x), score.squared_norm.__wrapped__(x))
        assert len(replay._known) <= 3


def test_a_tensor_in_two_places_is_noted_apart():
    """Notes of such a call read one for both; the next call's tensors are two."""
    x, p = draw(2, 6, 5, 4), draw(2, 6, 5, 4)
    for other in (x, p, x):
        given = (x, other, None, None, None, 3, 2.0, False)
        for actual, truth in zip(
            coupling.coupling_step(*given), coupling.coupling_step.__wrapped__(*given), strict=True
        ):
            assert torch.equal(actual, truth)
    bias, out = draw(6), torch.full_like(x, torch.nan)
    finish.finish(x, bias, None, False, 1, x)
    assert torch.equal(finish.finish(p, bias, None, False, 1, out), p + bias.view(-1, 1, 1))
