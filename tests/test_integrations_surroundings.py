"""Replaced blocks among optimisers, averages, hooks and modes: what they see is what FrEIA's own would."""

import copy
import functools

import pytest
import torch
from freia_sequences import assert_same, dense, framework, modules, replaced, sequence
from torch import nn

import usf_kernels as usf


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_steps_of_fused_optimisers_are_seen(kind):
    """They do not count what they write."""
    model, x = replaced(sequence()), torch.randn(8, 6)
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            assert_same(model(x), _plain(model, x))
        z, log_det = model(x)
        (z.square().sum(1) - log_det).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert_same(model(x), _plain(model, x))


def _plain(model, x):
    """By the blocks one after the other."""
    with torch.enable_grad():
        return model(x)


@torch.no_grad()
def test_weights_at_the_address_of_others_are_seen():
    """Memory that was freed is given to what comes next."""

    def large(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, 512), nn.ReLU(), nn.Linear(512, c_out))

    original = sequence(blocks=2, subnet=large)
    fast, x, name = replaced(original), torch.randn(5, 6), "module_list.0.subnet.0.weight"
    weight = original.get_parameter(name).clone()
    for i in range(20):
        found, expected = (torch.func.functional_call(m, {name: weight * i}, (x,)) for m in (fast, original))
        assert_same(found, expected)
    for i in range(20):
        for model in (fast, original):
            layer = model.module_list[0].subnet[0]
            layer.weight = nn.Parameter(weight * 1.0)
            layer.weight = nn.Parameter(weight * i)
        assert_same(fast(x), original(x))


@torch.no_grad()
def test_other_layers_and_what_layers_of_the_users_read_are_seen():
    class Scaled(nn.Module):
        def __init__(self, c_in, c_out):
            super().__init__()
            self.layer, self.factor = nn.Linear(c_in, c_out), 1.0

        def forward(self, x):
            return self.layer(x) * self.factor

    original, x = sequence(subnet=Scaled), torch.randn(8, 6)
    fast = replaced(original)
    for factor in (1.0, torch.rand(8, 1), 3.0):
        for model in (original, fast):
            model.module_list[1].subnet.factor = factor
        assert_same(fast(x), original(x))
    original = sequence()
    fast = replaced(original)
    assert_same(fast(x), original(x))
    assert fast._fused is not None
    for model in (original, fast):
        model.module_list[1].subnet[1] = nn.ReLU().eval()
    assert_same(fast(x), original(x))
    for model in (original, fast):
        model.module_list[0].clamp = 0.1
    assert_same(fast(x), original(x))


def test_a_volume_preserving_block_of_one_channel():
    class Cut(nn.Module):
        def __init__(self, c_in, c_out):
            super().__init__()
            self.layer, self.outputs = nn.Linear(c_in, 4), c_out

        def forward(self, x):
            return self.layer(x)[:, : self.outputs]

    block, x = modules.AllInOneBlock([(1,)], subnet_constructor=Cut, gin_block=True), torch.randn(3, 1)
    expected = block((x,))
    found = replaced(block)((x,))
    assert_same((*found[0], found[1]), (*expected[0], expected[1]))


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.zero_, lambda w: w.mul_(0.5), torch.Tensor.neg_, lambda w: w.copy_(w.flip(0).clone())],
    ids=["zero", "half", "negative", "reversed"],
)
@pytest.mark.parametrize("width", [5, 512, 4096])
def test_what_is_written_through_data_is_seen_in_the_next_mode(change, width):
    """Also where sums of values, or of their bits, stay the same."""

    def subnet(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, width), nn.Tanh(), nn.Linear(width, c_out))

    model, x = replaced(sequence(subnet=subnet)), torch.randn(8, 6)
    with torch.no_grad():
        model(x)
        model.train()
        change(model.module_list[0].subnet[2].weight.data)
        model.eval()
        assert_same(model(x), _plain(model, x))


def test_replicas_of_data_parallel_run_their_blocks():
    """Their weights are no parameters."""
    model, x = replaced(sequence()), torch.randn(8, 6)
    with torch.no_grad():
        expected = model(x)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                del module._parameters[name]
                setattr(module, name, None if parameter is None else parameter.detach())
            module._is_replica = True
        assert_same(model(x), expected)


def test_results_are_contiguous_where_the_original_s_are():
    def subnet(c_in, c_out):
        return nn.Conv2d(c_in, c_out, 1)

    nodes = [framework.InputNode(4, 4, 4)]
    nodes.append(framework.Node(nodes[-1], modules.AllInOneBlock, {"subnet_constructor": subnet}))
    nodes.append(framework.Node(nodes[-1], modules.Flatten, {}))
    nodes.append(framework.Node(nodes[-1], modules.AllInOneBlock, {"subnet_constructor": dense}))
    graph, x = framework.GraphINN([*nodes, framework.OutputNode(nodes[-1])]).eval(), torch.randn(2, 4, 4, 4)
    expected = graph(x)
    pytest.importorskip("anomalib")
    from anomalib.models import Fastflow  # noqa: F401  graphs are replaced where anomalib is in use

    usf.accelerate(graph)
    flow = framework.SequenceINN(4, 4, 4)
    flow.append(modules.AllInOneBlock, subnet_constructor=subnet)
    with torch.no_grad():
        assert_same(graph(x), expected)
        for z in (replaced(flow.eval())(x)[0], replaced(flow)(x, rev=True)[0]):
            assert z.is_contiguous()


def test_another_default_device():
    original, x = sequence(reverse_permutation=True), torch.randn(8, 6)
    expected = original(x)
    with torch.device("meta"), torch.no_grad():
        assert_same(replaced(original)(x), expected)


def test_other_modes_in_every_forward_pass_keep_the_inference_form():
    model, x = replaced(sequence()), torch.randn(8, 6)
    with torch.no_grad():
        model(x)
        form = model._fused
        model.train()
        model.eval()
        model(x)
    assert model._fused is form is not None


@pytest.mark.parametrize("part", ["block", "layer"])
def test_hooks_are_called(part):
    model, x, calls = replaced(sequence()), torch.randn(2, 6), []
    block = model.module_list[1]
    heard = block if part == "block" else block.subnet[0]
    with torch.no_grad():
        model(x)
        handle = heard.register_forward_hook(lambda *_: calls.append(0))
        model(x)
        assert len(calls) == 1
        handle.remove()
        model(x)
    assert len(calls) == 1
    assert model._fused is not None


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_what_makes_weights_is_no_obstacle(make):
    subnet = lambda c_in, c_out: nn.Sequential(make(nn.Linear(c_in, 5)), nn.ReLU(), nn.Linear(5, c_out))  # noqa: E731
    original, x = sequence(subnet=subnet), torch.randn(2, 6)
    original(x)  # leaves a result of autograd in each layer
    model = sequence(subnet=subnet)
    model.load_state_dict(original.state_dict())
    usf.replace_blocks(model)
    with torch.no_grad():
        assert_same(model(x), original(x))
    assert model._fused is not None


def test_dropout_that_is_on_draws():
    def subnet(c_in, c_out):
        return nn.Sequential(nn.Linear(c_in, 16), nn.Dropout(), nn.Linear(16, c_out))

    model, x = replaced(sequence(subnet=subnet)), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model(x)[0])
        for layer in model.modules():
            layer.train(isinstance(layer, nn.Dropout))
        assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("to", ["exact", "usf"])
def test_training_may_follow_inference_mode(to):
    original, x = sequence(), torch.randn(2, 6)
    model = copy.deepcopy(original)
    with torch.inference_mode():
        usf.replace_blocks(model, to=to)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model(x)
    with torch.no_grad():
        model(x)
    z, log_det = model.train()(x)
    (z.square().sum() - log_det.sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    if to == "exact":
        assert_same((z, log_det), original(x))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        original, x = sequence(), torch.randn(2, 6)
        model = replaced(original)
        assert_same(model(x), original(x))


@pytest.mark.parametrize("clamp", [nn.Tanh(), functools.partial(torch.clamp, min=-1, max=1)])
def test_clamps_that_are_objects(clamp):
    original = modules.GLOWCouplingBlock([(6,)], subnet_constructor=dense, clamp_activation=clamp)
    holder, x = nn.ModuleList([copy.deepcopy(original)]), torch.randn(3, 6)
    names = list(holder.state_dict())
    usf.replace_blocks(holder)
    assert list(holder.state_dict()) == names
    assert_same((holder[0]([x])[0][0], holder[0]([x])[1]), (original([x])[0][0], original([x])[1]))
    assert usf.restore_blocks(holder) == 1


@pytest.mark.parametrize("clamp", [0.0, torch.tensor(2.0)])
def test_clamps_of_no_coupling_here_are_left(clamp):
    model = sequence(1)
    model.append(modules.AllInOneBlock, subnet_constructor=dense, affine_clamping=clamp)
    report = usf.replace_blocks(model)
    assert list(report.left) == ["module_list.1"]
    assert "its clamp is" in report.left["module_list.1"]
    model(torch.randn(2, 6))


def test_subnets_that_do_not_take_one_sample_are_left():
    class Picky(nn.Linear):
        def forward(self, x):
            assert len(x) > 1
            return super().forward(x)

    model = sequence(1)
    model.append(
        modules.AllInOneBlock, subnet_constructor=lambda i, o: nn.Sequential(Picky(i, 4), nn.Linear(4, o))
    )
    report = usf.replace_blocks(model, to="usf")
    assert list(report.left) == ["module_list.1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_and_transforms_see_the_blocks():
    model, x = replaced(sequence()), torch.randn(3, 2, 6)
    with torch.no_grad():
        expected = torch.stack([model(v)[0] for v in x])
        traced = torch.jit.trace(model, x[0])
        torch.testing.assert_close(traced(x[1])[0], expected[1])
        torch.testing.assert_close(torch.vmap(lambda v: model(v)[0])(x), expected)


@pytest.mark.parametrize("to", ["exact", "usf"])
def test_log_determinants_may_be_written_to(to):
    model = replaced(sequence(), to=to)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            log_det = model(torch.randn(3, 6))[1].detach()
        log_det += torch.arange(3.0)


def test_one_channel():
    original, x = sequence(2, 1), torch.randn(3, 1)
    model = replaced(original)
    with torch.no_grad():
        assert_same(model(x), original(x))


def test_conditions_that_nobody_asked_for_are_left_out():
    for kind in (modules.AllInOneBlock, modules.GLOWCouplingBlock):
        original, x = kind([(6,)], subnet_constructor=dense), torch.randn(3, 6)
        model = replaced(nn.ModuleList([original]))[0]
        torch.testing.assert_close(model([x], [torch.randn(3, 2)])[0], original([x], [torch.randn(3, 2)])[0])


def test_restored_contents_have_the_dtype_of_now_and_frozen_ones_stay_frozen():
    model = sequence().requires_grad_(False)
    usf.replace_blocks(model, to="usf")
    assert not any(p.requires_grad for p in model.parameters())
    model.double()
    usf.restore_blocks(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model(torch.randn(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"permute_soft": True}, {"gin_block": True}])
def test_forward_mode_derivatives(options):
    model = sequence(2, **options).double()
    x, fast = torch.randn(2, 6, dtype=torch.float64), replaced(model)
    for transform in (torch.func.jacfwd, torch.func.hessian):
        found, expected = (transform(lambda v, m=m: m(v)[0].square().sum())(x) for m in (fast, model))
        torch.testing.assert_close(found, expected)


def test_a_forward_set_on_an_instance_is_called():
    model, x = replaced(sequence(2)), torch.randn(4, 6)
    with torch.no_grad():
        model(x)
        for layer in (model[0], model[1].subnet[0]):
            before, plain = model(x), layer.forward
            layer.forward = lambda *given, plain=plain, **options: plain(*given, **options)
            assert_same(model(x), before)
        model[1].subnet[0].forward = torch.nn.Linear(3, 5)
        assert_same(model(x), _plain(model, x))


def test_a_sequence_in_a_sequence():
    inner = framework.SequenceINN(6, force_tuple_output=True)
    inner.append(modules.AllInOneBlock, subnet_constructor=dense)
    model, x = framework.SequenceINN(6), torch.randn(4, 6)
    model.append(lambda dims_in, **_: inner)
    model.eval()
    with torch.no_grad():
        assert_same(replaced(model)(x), model(x))


def test_a_direction_that_is_a_number():
    block = modules.AllInOneBlock([(6,)], subnet_constructor=dense, permute_soft=True)
    x, ours = torch.randn(4, 6), replaced(block)
    for rev in (0, 1):
        assert_same(ours((x,), rev=rev)[0], block((x,), rev=rev)[0])


def test_a_parametrized_block_is_not_restored():
    class Twice(torch.nn.Module):
        def forward(self, value):
            return 2 * value

    model, x = replaced(sequence(2)), torch.randn(4, 6)
    torch.nn.utils.parametrize.register_parametrization(model[1], "global_offset", Twice())
    expected = model(x)
    with pytest.raises(ValueError, match="ParametrizedFastAllInOneBlock has parametrizations, remove them"):
        usf.restore_blocks(model)
    assert_same(model(x), expected)
