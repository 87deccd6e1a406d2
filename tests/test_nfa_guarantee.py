"""What the threshold promises: on clean images at most 10^log_epsilon false detections each, on average."""

import numpy as np
import pytest
import torch

from usf_kernels.segmentation import regions

IMAGES = 2000
SHAPES = ((16, 16), (8, 8))


def white_energies(channels, std, seed=0, images=IMAGES):
    """Squared norms of white latents of standard deviation `std`, at two scales."""
    rng = np.random.default_rng(seed)
    return [
        torch.from_numpy((std**2 * rng.chisquare(channels, (images, *shape))).astype(np.float32))
        for shape in SHAPES
    ]


def detections(energies, channels, **options):
    """Mean number of regions found per image."""
    found = regions(energies, channels=(channels,) * len(energies), **options)
    assert len(found) == len(energies[0])
    return sum(map(len, found)) / len(found)


@pytest.mark.parametrize("tail", ["chernoff", "exact"])
@pytest.mark.parametrize("tests", ["total", "per_size"])
@pytest.mark.parametrize("std", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("channels", [16, 64, 816])
def test_at_most_one_false_detection_per_clean_image(channels, std, tests, tail):
    energies = white_energies(channels, std)
    for log_epsilon in (0.0, -1.0):
        assert (
            detections(energies, channels, tests=tests, tail=tail, log_epsilon=log_epsilon) <= 10**log_epsilon
        )


@pytest.mark.parametrize("tests", ["total", "per_size"])
def test_from_latents_too(tests):
    generator = torch.Generator().manual_seed(0)
    for std in (1.0, 0.9, 0.5):
        z = std * torch.randn(IMAGES, 16, 12, 12, generator=generator)
        assert sum(map(len, regions(z, tests=tests))) <= IMAGES


@pytest.mark.parametrize("channels", [16, 64, 816])
def test_the_bound_is_not_kept_by_finding_nothing(channels):
    """Single pixels of 10^-4 and less do turn up in noise, and `per_size` counts them."""
    assert (
        detections(white_energies(channels, 1.0), channels, tests="per_size", tail="exact", log_epsilon=1.0)
        > 0.02
    )
    assert detections(white_energies(channels, 1.6), channels, tests="per_size", tail="exact") > 1


@pytest.mark.parametrize("tail", ["chernoff", "exact"])
@pytest.mark.parametrize("tests", ["total", "per_size"])
@pytest.mark.parametrize(("channels", "std"), [(16, 6.0), (64, 3.0), (816, 1.8)])
def test_a_planted_region_is_found(channels, std, tests, tail):
    energies = white_energies(channels, 1.0, seed=1, images=50)
    energies[0][:, 4:9, 6:11] *= std**2
    for found in regions(energies, channels=(channels,) * 2, tests=tests, tail=tail):
        best = found[0]
        assert best.scale == 0
        assert 4 <= best.box[0] < best.box[2] <= 9
        assert 6 <= best.box[1] < best.box[3] <= 11
        assert best.area >= 9  # of 25: the weakest pixel sets the level of all
