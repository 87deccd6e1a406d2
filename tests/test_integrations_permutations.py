"""Replaced blocks know their permutation as an index, and notice when it is another one."""

import copy

import pytest
import torch
from freia_sequences import assert_same, dense, modules, replaced, sequence


def write(model, source):
    with torch.no_grad():
        for to, value in zip(model.parameters(), source.parameters(), strict=True):
            to.copy_(value)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


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


@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}, {"gin_block": True}])
def test_a_permutation_written_to_is_seen(options):
    """As DistributedDataParallel does, whose ranks begin with the values of the first."""
    model, source, x = replaced(sequence(1, **options)), sequence(1, **options), torch.randn(4, 6)
    write(model, source)
    assert_same(model(x), source(x))
    with torch.no_grad():
        assert_same(model(x), source(x))


def test_calls_with_the_weights_of_another_model():
    models, x = [sequence(2) for _ in range(3)], torch.randn(4, 6)
    ours = replaced(models[0])
    for model in (*models, models[0]):
        assert_same(torch.func.functional_call(ours, weights_of(model), (x,)), model(x))
    assert_same(ours(x), models[0](x))
    parameters, buffers = torch.func.stack_module_state(models)
    parameters = {name: value.detach() for name, value in parameters.items()}
    together = torch.func.vmap(lambda *state: torch.func.functional_call(ours, state, (x,)))
    expected = [torch.stack(values) for values in zip(*(model(x) for model in models), strict=True)]
    assert_same(together(parameters, buffers), expected)


@pytest.mark.parametrize("options", [{}, {"reverse_permutation": True}, {"gin_block": True}])
def test_graphs_see_the_permutation_of_the_call(options):
    models, x = [sequence(1, **options) for _ in range(3)], torch.randn(4, 6)
    ours = replaced(models[0])

    def called(values, x):
        return torch.func.functional_call(ours, values, (x,))

    write(ours, models[1])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), models[1](x))
    write(ours, models[2])
    assert_same(compiled(x), models[2](x))
    assert_same(torch.export.export(ours, (x,)).module()(x), models[2](x))
    called = torch.compile(called, backend="aot_eager")
    for model in models[1:]:
        assert_same(called(weights_of(model), x), model(x))


def test_a_block_without_values_gets_its_permutation_with_them():
    block = modules.AllInOneBlock([(6,)], subnet_constructor=dense)
    ours, x = replaced(copy.deepcopy(block).to("meta")), torch.randn(4, 6)
    ours.load_state_dict(block.state_dict(), assign=True)
    assert_same(ours((x,))[0], block((x,))[0])
