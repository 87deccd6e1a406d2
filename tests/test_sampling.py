"""Random numbers of samples."""

import random

import numpy as np
import pytest
import torch

from usf_kernels import sampling


@pytest.fixture(autouse=True)
def _generators_as_they_were():
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    random.setstate(before[2])


def drawn():
    return torch.rand(()).item(), np.random.random(), random.random()  # noqa: NPY002


def test_a_key_determines_the_numbers():
    numbers = []
    for key in ((0, 1, 2), (0, 1, 3), (0, 1, 2)):
        sampling.seed_generators(*key)
        numbers.append(drawn())
    assert numbers[0] == numbers[2]
    assert all(one != other for one, other in zip(numbers[0], numbers[1], strict=True))


@pytest.mark.parametrize("in_use", [True, False])
def test_devices_in_use_are_seeded_and_no_others(monkeypatch, in_use):
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    sampling.seed_generators(5)
    assert len(seeds) == in_use
    number = torch.rand(())
    torch.default_generator.manual_seed(sampling._mix(5))
    assert torch.rand(()) == number
    assert seeds == [sampling._mix(5)] * in_use


@pytest.mark.parametrize(("count", "world"), [(22, 1), (22, 2), (3, 1), (3, 2), (5, 4)])
def test_every_process_gets_equal_and_disjoint_batches(count, world):
    epochs = [
        [sampling.epoch_order(count, 4, seed=0, epoch=e, rank=r, world_size=world) for r in range(world)]
        for e in range(6)
    ]
    assert any(epoch != epochs[0] for epoch in epochs)
    for ranks in epochs:
        assert len({tuple(map(len, batches)) for batches in ranks}) == 1
        seen = [index for batches in ranks for batch in batches for index in batch]
        if count >= 4 * world:
            assert len(seen) == len(set(seen)) == count // (4 * world) * 4 * world
        else:
            assert set(seen) == set(range(count))


class Noise:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.rand(3)


def test_a_sample_has_other_noise_in_every_epoch_and_the_same_in_any_batch():
    first, again, second = (
        torch.cat(list(sampling.loader(Noise(), batches, seed=0, epoch=epoch)))
        for epoch, batches in ((1, [[0], [1]]), (1, [[0, 1]]), (2, [[0], [1]]))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
