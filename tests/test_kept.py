"""Values that are kept until the tensors change that they come from."""

import copy
import pickle

import pytest
import torch

from usf_kernels.models.kept import MOST, Kept


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.ones(3))


def test_kept_until_a_tensor_is_written_to_replaced_or_moved(weight):
    kept, calls = Kept(), []

    def get(tensor=weight):
        return kept.get("key", [tensor], lambda: calls.append(0) or tensor.detach() * 2)

    assert get() is get()
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(get(), torch.full((3,), 4.0))
    get(torch.nn.Parameter(torch.ones(3)))
    get(weight.double())
    assert len(calls) == 4


def test_kept_until_an_optimiser_steps_that_does_not_count(weight):
    kept = Kept()
    before = kept.get("key", [weight], lambda: weight.detach().clone())
    weight.grad = torch.ones(3)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    assert not torch.equal(kept.get("key", [weight], lambda: weight.detach().clone()), before)


def test_the_last_few_keys_are_kept(weight):
    kept = Kept()
    values = [kept.get(key, [weight], object) for key in range(MOST)]
    assert kept.get(0, [weight], object) is values[0]  # now the last that was used
    kept.get(MOST, [weight], object)
    assert kept.get(0, [weight], object) is values[0]
    assert kept.get(1, [weight], object) is not values[1]
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert len(other) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_without_gradients_serves_where_they_are_asked_for(weight, mode):
    kept, x = Kept(), torch.ones(3, requires_grad=True)
    with mode():
        value = kept.get("key", [weight], lambda: weight * 2)
    assert not value.requires_grad
    assert kept.get("key", [weight], lambda: weight * 3) is value
    (x * value).sum().backward()
    assert torch.equal(x.grad, value)


def test_tensors_of_inference_mode_keep_nothing():
    with torch.inference_mode():
        tensor = torch.ones(3)
    kept = Kept()
    assert kept.get("key", [tensor], object) is not kept.get("key", [tensor], object)
