"""FrEIA's and anomalib's modules with faster classes: the same numbers, and the way back."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import usf_kernels as usf
from usf_kernels.integrations import replacement

pytest.importorskip("FrEIA")
from FrEIA import framework, modules
from freia_toys import subnet_of

PACKAGES = ["FrEIA", "anomalib"]


def block_class(package):
    if package == "FrEIA":
        return modules.AllInOneBlock
    return pytest.importorskip("anomalib.models.components.flow").AllInOneBlock


def block(package, dims=(7, 4, 5), dims_c=(), **options):
    options.setdefault("permute_soft", False)
    made = block_class(package)(
        [dims], [tuple(d) for d in dims_c], subnet_constructor=subnet_of(len(dims) - 1), **options
    )
    with torch.no_grad():
        made.global_scale.add_(0.3 * torch.randn_like(made.global_scale))
        made.global_offset.add_(0.3 * torch.randn_like(made.global_offset))
    return made


def outputs(model, x, c, rev):
    (y,), log_det = model((x,), c, rev=rev)
    return y, log_det


def assert_close(found, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(theirs.abs().max().item(), 0.1)  # a GIN block's log-det is 0; theirs is rounding
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permute_soft": True},
        {"learned_householder_permutation": 3, "permute_soft": True},
        {"reverse_permutation": True},
        {"reverse_permutation": True, "permute_soft": True},
        {"global_affine_type": "SIGMOID", "global_affine_init": 0.7},
        {"global_affine_type": "EXP", "affine_clamping": 1.2},
        {"gin_block": True},
        {"gin_block": True, "permute_soft": True},
        {"gin_block": True, "reverse_permutation": True},
    ],
    ids=str,
)
def test_every_option_in_both_directions_with_gradients(package, options):
    for dtype, rank, conditions in itertools.product((torch.float32, torch.float64), (0, 2), (0, 2)):
        space = (4, 5)[:rank]
        original = block(package, (7, *space), [(3, *space)] * conditions, **options).to(dtype)
        fast = copy.deepcopy(original)
        assert usf.replace_blocks(fast).count == 1
        c = [torch.randn(2, 3, *space, dtype=dtype) for _ in range(conditions)]
        for rev in (False, True):
            x = torch.randn(2, 7, *space, dtype=dtype)
            results, weights = [], torch.randn_like(x)
            for model in (fast, original):
                leaf = x.clone().requires_grad_()
                y, log_det = outputs(model, leaf, c, rev)
                model.zero_grad()
                ((y * weights).sum() + log_det.sum()).backward()
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                results.append([y, log_det, leaf.grad, *grads])
            assert_close(*results, dtype)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_rank(package):
    for rank in range(4):
        space = (3, 4, 2)[:rank]
        original = block(package, (6, *space)).double()
        fast = copy.deepcopy(original)
        usf.replace_blocks(fast)
        x = torch.randn(2, 6, *space, dtype=torch.float64)
        for rev in (False, True):
            assert_close(outputs(fast, x, None, rev), outputs(original, x, [], rev), torch.float64)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_sequence_runs_in_its_inference_form(package, conditional):
    model = framework.SequenceINN(6, 5, 4)
    options = {"cond": 0, "cond_shape": (3, 5, 4)} if conditional else {}
    for _ in range(4):
        model.append(block_class(package), subnet_constructor=subnet_of(2), permute_soft=False, **options)
    model = model.double().eval()
    fast = copy.deepcopy(model)
    assert usf.replace_blocks(fast).count == 5
    x, c = torch.randn(2, 6, 5, 4, dtype=torch.float64), [torch.randn(2, 3, 5, 4, dtype=torch.float64)]
    for rev in (False, True):
        assert_close(fast(x, c, rev=rev), model(x, c, rev=rev), torch.float64)
        with torch.no_grad():
            assert_close(fast(x, c, rev=rev), model(x, c, rev=rev), torch.float64)
    assert fast._fused is not None
    with torch.no_grad():
        for one in (model, fast):  # a change is noticed
            one.module_list[1].global_offset.add_(1.0)
        assert_close(fast(x, c), model(x, c), torch.float64)
        again = copy.deepcopy(fast)
        again = pickle.loads(pickle.dumps(again))  # which FrEIA's own blocks do not
        assert again._fused is None
        assert_close(again(x, c), model(x, c), torch.float64)


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpoints_go_both_ways_and_restoring_leaves_nothing(package):
    original, other = block(package), block(package)
    fast = copy.deepcopy(original)
    names, attributes = list(fast.state_dict()), set(fast.__dict__)
    parameters = [id(p) for p in fast.parameters()]
    usf.replace_blocks(fast)
    assert list(fast.state_dict()) == names
    assert [id(p) for p in fast.parameters()] == parameters
    fast.load_state_dict(other.state_dict())  # with another permutation
    x = torch.randn(2, 7, 4, 5)
    assert_close(outputs(fast, x, None, False), outputs(other, x, [], False), torch.float32)
    original.load_state_dict(fast.state_dict())
    assert_close(outputs(original, x, [], False), outputs(other, x, [], False), torch.float32)
    assert usf.restore_blocks(fast) == 1
    assert type(fast) is type(original)
    assert set(fast.__dict__) == attributes
    assert list(fast.buffers()) == []
    assert torch.equal(outputs(fast, x, [], False)[0], outputs(other, x, [], False)[0])
    assert usf.restore_blocks(fast) == 0


class Subclass(modules.AllInOneBlock):
    pass


def test_what_is_left_and_what_is_wrong():
    options = {"subnet_constructor": subnet_of(2)}
    model = nn.ModuleList([block("FrEIA"), Subclass([(7, 4, 5)], **options), nn.Conv2d(2, 2, 1)])
    model.append(block("FrEIA"))
    del model[3].GIN  # as a version of FrEIA without that option would
    report = usf.replace_blocks(model)
    assert report.replaced == ["0"]
    assert usf.replace_blocks(block("FrEIA")).replaced == ["AllInOneBlock"]
    assert report.left == {
        "1": "a subclass of AllInOneBlock, which may compute something else",
        "3": "no attribute 'GIN', so of a version that is not known",
    }
    assert "left 1: a subclass" in str(report)
    with pytest.raises(ValueError, match=r"model: expected an AllInOneBlock .* found 1: a subclass"):
        usf.replace_blocks(model)  # the one that could be replaced is already
    with pytest.raises(ValueError, match=r"found only modules that are replaced already"):
        usf.replace_blocks(model[0])
    with pytest.raises(ValueError, match="found Subclass: a subclass of AllInOneBlock"):
        usf.replace_blocks(model[1])
    with pytest.raises(ValueError, match=r"found none"):
        usf.replace_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"to: expected one of 'exact', 'usf', found 'fast'"):
        usf.replace_blocks(model, to="fast")
    for function in (usf.replace_blocks, usf.restore_blocks):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, found int"):
            function(3)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_version_that_is_not_tested_is_said(package, monkeypatch):
    monkeypatch.setattr(replacement, "version", lambda name: "9.1")
    model = block(package)
    with pytest.warns(UserWarning, match=rf"{package} 9.1: replace_blocks is tested with \d\.\d; compare"):
        usf.replace_blocks(model)


@pytest.mark.parametrize("package", PACKAGES)
def test_compact_checkpoints(package):
    make = nn.ModuleList([block(package), block(package, permute_soft=True)])
    model, others = copy.deepcopy(make), [copy.deepcopy(make) for _ in range(2)]
    dense = model.state_dict()
    usf.replace_blocks(model, compact=True)
    usf.replace_blocks(others[1])
    compact = model.state_dict()
    assert compact["0.w_perm"].shape == (7,)
    assert not compact["0.w_perm"].is_floating_point()
    assert set(dense) - set(compact) == {"0.w_perm_inv"}
    assert torch.equal(compact["1.w_perm"], dense["1.w_perm"])  # a rotation is not an index
    for blocks in others:
        with torch.no_grad():
            for parameter in blocks.parameters():
                parameter.zero_()
    before = dict(compact)
    others[1].load_state_dict(compact)
    assert list(before) == list(compact)
    assert all(torch.equal(value, dense[name]) for name, value in others[1].state_dict().items())
    others[0].load_state_dict(others[1].state_dict())  # and so on to a model that is not replaced
    x = torch.randn(2, 7, 4, 5)
    assert_close(outputs(model[0], x, None, True), outputs(others[1][0], x, None, True), torch.float32)
    assert_close(outputs(model[0], x, None, True), outputs(others[0][0], x, [], True), torch.float32)
    for wrong in (compact["0.w_perm"][:-1].argsort(), torch.zeros(7, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.w_perm"):
            others[1].load_state_dict({**compact, "0.w_perm": wrong})
    usf.restore_blocks(model)
    assert list(model.state_dict()) == list(dense)
    with pytest.raises(RuntimeError, match=r"0\.w_perm_inv"):
        others[0].load_state_dict(compact)
