"""Modes of a module for a while: parts keep their own, and threads do not leave each other's behind."""

from torch import nn

from usf_kernels.nn.modes import in_mode


def modes(module):
    return [part.training for part in module.modules()]


def module():
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()), nn.BatchNorm1d(2))
    made[1].eval()  # frozen
    return made


def test_every_part_gets_its_own_mode_back():
    for training in (False, True):
        parts = module()
        before = modes(parts)
        with in_mode(parts, training=training):
            assert set(modes(parts)) == {training}
        assert modes(parts) == before


def test_overlapping_contexts_leave_the_modes_of_before():
    """As two threads do that predict with one model in training."""
    parts = module()
    before = modes(parts)
    first, second = (in_mode(parts, training=False) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert modes(parts) == before
