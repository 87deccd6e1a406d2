"""Replaced blocks among optimisers, averages, hooks and modes: what they see is what FrEIA's own would."""

import copy
import functools

import pytest
import torch
from torch import nn

import usf_kernels as usf

framework = pytest.importorskip("FrEIA.framework")
modules = pytest.importorskip("FrEIA.modules")


def dense(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, 5), nn.Tanh(), nn.Linear(5, c_out))


def sequence(blocks=3, channels=6, subnet=dense, **options):
    model = framework.SequenceINN(channels)
    for _ in range(blocks):
        model.append(modules.AllInOneBlock, subnet_constructor=subnet, **options)
    return model.eval()


def replaced(model, **options):
    model = copy.deepcopy(model)
    usf.replace_blocks(model, **options)
    return model


def assert_same(found, expected):
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=1e-4, atol=1e-4)


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


def test_what_is_written_through_data_is_seen_in_the_next_mode():
    model, x = replaced(sequence()), torch.randn(8, 6)
    with torch.no_grad():
        model(x)
        model.train()
        model.module_list[0].global_offset.data.add_(1.0)
        model.eval()
        assert_same(model(x), _plain(model, x))


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


def test_averages_of_buffers_leave_permutations_alone():
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    model = replaced(sequence(1, 64))
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(20):
        mean.update_parameters(model)
    x = torch.randn(2, 64)
    assert_same(mean.module(x), model(x))


def test_permutations_follow_their_block():
    model = replaced(sequence())
    model.to("meta")
    assert {block._order.device.type for block in model.module_list} == {"meta"}
    other = replaced(sequence())
    model.to_empty(device="cpu").load_state_dict(other.state_dict())
    x = torch.randn(2, 6)
    assert_same(model(x), other(x))


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


@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}, {"gin_block": True}])
def test_a_permutation_written_to_is_seen(options):
    """As DistributedDataParallel does, whose ranks begin with the values of the first."""
    model, source, x = replaced(sequence(1, **options)), sequence(1, **options), torch.randn(4, 6)
    with torch.no_grad():
        for to, value in zip(model.parameters(), source.parameters(), strict=True):
            to.copy_(value)
    assert_same(model(x), source(x))
    with torch.no_grad():
        assert_same(model(x), source(x))


def test_calls_with_the_weights_of_another_model():
    models, x = [sequence(2) for _ in range(3)], torch.randn(4, 6)
    ours = replaced(models[0])
    for model in (*models, models[0]):
        values = {name: value.detach().clone() for name, value in model.named_parameters()}
        assert_same(torch.func.functional_call(ours, values, (x,)), model(x))
    assert_same(ours(x), models[0](x))
    parameters, buffers = torch.func.stack_module_state(models)
    parameters = {name: value.detach() for name, value in parameters.items()}
    together = torch.func.vmap(lambda *state: torch.func.functional_call(ours, state, (x,)))
    expected = [torch.stack(values) for values in zip(*(model(x) for model in models), strict=True)]
    assert_same(together(parameters, buffers), expected)


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


def test_a_block_without_values_gets_its_permutation_with_them():
    block = modules.AllInOneBlock([(6,)], subnet_constructor=dense)
    ours, x = replaced(copy.deepcopy(block).to("meta")), torch.randn(4, 6)
    ours.load_state_dict(block.state_dict(), assign=True)
    assert_same(ours((x,))[0], block((x,))[0])


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
