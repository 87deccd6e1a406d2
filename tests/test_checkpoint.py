import doctest
import errno
import json
import os
import threading

import pytest
import torch
from torch import nn
from toy import ToyFlow

import usf_kernels as usf
from usf_kernels import checkpoint, files
from usf_kernels.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_stored_state,
    read_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def saved(tmp_path):
    model = ToyFlow(4)
    nn.init.normal_(model.weight)
    path = tmp_path / "model.pt"
    save_checkpoint(path, model, extra={"image_size": (64, 96)})
    return path, model


def rewrite(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)


def test_round_trip(saved):
    path, model = saved
    loaded = load_checkpoint(path, model_class=ToyFlow)
    images = torch.rand(2, 3, 4, 4)
    assert loaded.loss(images).item() == model.eval().loss(images).item()
    assert not loaded.training
    assert read_checkpoint(path)["extra"] == {"image_size": [64, 96]}
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


def test_a_trained_backbone_is_stored_and_a_frozen_one_checked(saved):
    path, model = saved
    model.backbone.requires_grad_(True)
    nn.init.normal_(model.backbone.weight)
    save_checkpoint(path, model)
    assert "backbone.weight" in read_checkpoint(path)["state"]
    model.backbone.requires_grad_(False)
    save_checkpoint(path, model)
    with pytest.raises(ValueError, match=r"model\.pt: was trained with other weights of the backbone"):
        load_checkpoint(path, model_class=ToyFlow)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 broken"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt: not a usf_kernels checkpoint"):
        load_checkpoint(path)


def test_cut_files_are_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.pt: not a usf_kernels checkpoint"):
            read_checkpoint(path)


def test_damaged_weights_are_refused(saved):
    path, model = saved
    whole = path.read_bytes()
    position = whole.index(model.weight.detach().numpy().tobytes())
    path.write_bytes(whole[:position] + bytes(8) + whole[position + 8 :])
    with pytest.raises(ValueError, match=r"model\.pt: not a usf_kernels checkpoint, or damaged"):
        load_checkpoint(path, model_class=ToyFlow)


def test_damaged_headers_are_refused_by_name(saved):
    """zipfile alone raises five types for them."""
    path, _ = saved
    whole = bytearray(path.read_bytes())
    local, central = 0, whole.index(b"PK\x01\x02")
    for start, length in ((local, 30), (central, 46)):
        for bit in range(8 * length):
            damaged = whole.copy()
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                read_checkpoint(path)
            except ValueError as error:
                assert "model.pt: not a usf_kernels checkpoint" in str(error)  # noqa: PT017


def test_a_backbone_in_another_dtype_than_the_flow(saved):
    path, model = saved
    model.backbone.half()
    save_checkpoint(path, model)
    loaded = load_checkpoint(path, model_class=ToyFlow)
    assert torch.equal(loaded.backbone.weight, model.backbone.weight)
    assert {loaded.backbone.weight.dtype, loaded.weight.dtype} == {torch.float16, torch.float32}
    rewrite(path, backbone_dtype="int8")
    with pytest.raises(ValueError, match=r"model\.pt: damaged checkpoint, its backbone_dtype is 'int8'"):
        load_checkpoint(path, model_class=ToyFlow)


def test_files_that_run_code_are_refused(tmp_path):
    path = tmp_path / "code.pt"
    torch.save({"format": FORMAT, "model": ToyFlow(2)}, path)
    with pytest.raises(ValueError, match=r"code\.pt: not a usf_kernels checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "a PyTorch file, but not"),
        ({"version": 2}, r"version 2 is newer than this package reads \(1\)"),
        ({"architecture": "Other"}, "holds a Other, not a ToyFlow"),
        ({"config": {"width": 3}}, "configuration does not build a ToyFlow"),
        ({"config": {"channels": 3, "dropout": 0.0}}, "backbone"),
        ({"state": {}}, "does not fit the model: bias"),
        ({"state": {"bias": "b", "weight": 3}}, "does not fit the model"),
        ({"state": {0: torch.zeros(1)}}, "state has keys that are no names"),
        ({"state": [1, 2]}, "damaged checkpoint, state is a list"),
        ({"extra": None}, "damaged checkpoint, extra is a NoneType"),
        ({"extra": {"image_size": "large"}}, "damaged checkpoint, its image_size is 'large'"),
        ({"extra": {"image_size": [0, 5]}}, r"damaged checkpoint, its image_size is \[0, 5\]"),
        ({"config": 3}, "damaged checkpoint, config is a int"),
        ({"config": {"channels": None}}, "configuration does not build a ToyFlow"),
        ({"architecture": 3}, "damaged checkpoint, architecture is a int"),
        ({"backbone": 3}, "damaged checkpoint, backbone is a int"),
        ({"version": "1"}, "damaged checkpoint, its version is '1'"),
    ],
)
def test_what_does_not_fit_is_named(saved, changes, message):
    path, _ = saved
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}"):
        load_checkpoint(path, model_class=ToyFlow)


@pytest.mark.parametrize("entry", ["version", "architecture", "config", "backbone", "extra", "state"])
def test_a_missing_entry_is_named(saved, entry):
    path, _ = saved
    content = torch.load(path, weights_only=True)
    del content[entry]
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"model\.pt: damaged checkpoint, .*{entry}"):
        load_checkpoint(path, model_class=ToyFlow)


def test_another_shape_is_named(saved):
    path, _ = saved
    content = torch.load(path, weights_only=True)
    content["state"]["bias"] = torch.zeros(5)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pt: does not fit the model: .*bias"):
        load_checkpoint(path, model_class=ToyFlow)


def test_unknown_architecture_and_missing_file(saved):
    path, _ = saved
    with pytest.raises(ValueError, match=r"'ToyFlow', which usf_kernels\.models does not have"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt"):
        load_checkpoint(path.with_name("gone.pt"))


def test_extra_must_be_plain(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "a.pt", ToyFlow(2), extra={"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def write_half(path, error):
    with files.atomic_write(path) as file:
        file.write(b"half of the new")
        raise error


def test_atomic_write_leaves_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_atomic_write_takes_the_place_of_files_only(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="Not a regular file") as caught, files.atomic_write(pipe):
        pass
    assert caught.value.filename == str(pipe)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_atomic_write_names_the_file_it_was_asked_for(tmp_path):
    path = tmp_path / "no" / "folder.txt"
    with pytest.raises(FileNotFoundError) as caught:
        files.write_json(path, 1)
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="full") as caught:
        write_half(tmp_path / "b", OSError(errno.ENOSPC, "full"))
    assert caught.value.filename == str(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_json_has_null_for_what_it_cannot_say(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": None}


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"x")
    for name in ("kept.tmp", ".others.pt.123.tmp"):
        (tmp_path / name).write_bytes(b"x")
    files.remove_leftovers(tmp_path, ("last.pt",))
    assert {path.name for path in tmp_path.iterdir()} == {"kept.tmp", ".others.pt.123.tmp"}


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(NotADirectoryError, match="file"):
            files.make_folder(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        files.check_writable(tmp_path)


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(checkpoint, extraglobs={"usf": usf, "torch": torch}) == (0, 4)


def test_random_backbones_are_kept(tmp_path):
    pytest.importorskip("timm")
    model = usf.models.FastFlow(
        usf.models.create_backbone("resnet10t", weights=None, out_indices=(0, 1)), steps=1
    )
    save_checkpoint(tmp_path / "model.pt", model)
    images = torch.rand(2, 3, 32, 32)
    again = load_checkpoint(tmp_path / "model.pt")
    for found, expected in zip(again.features(images), model.features(images), strict=True):
        assert torch.equal(found, expected)


def test_inference_forms_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model: expected one that can be trained, found its inference form"):
        save_checkpoint(tmp_path / "flow.pt", usf.models.USFlow(4, blocks=1).fuse())
    assert not list(tmp_path.iterdir())


def test_weights_that_are_in_another_place_now(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pt")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "others.pt")
    backbone = usf.models.create_backbone("resnet10t", weights=tmp_path / "weights.pt", out_indices=(0, 1))
    model = usf.models.FastFlow(backbone, steps=1).eval()
    path, moved = tmp_path / "model.pt", tmp_path / "moved.pt"
    save_checkpoint(path, model, extra={"image_size": [32, 32]})
    (tmp_path / "weights.pt").rename(moved)
    with pytest.raises(ValueError, match=r"model\.pt: .*no such file: .*weights\.pt"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"model\.pt: was trained with other weights of the backbone"):
        load_checkpoint(path, weights=tmp_path / "others.pt")
    with pytest.raises(ValueError, match="weights: no such file: nowhere"):
        load_checkpoint(path, weights="nowhere")
    with pytest.raises(ValueError, match="weights: expected one file for the network resnet10t"):
        load_checkpoint(path, weights=[moved, moved])
    again, images = load_checkpoint(path, weights=moved), torch.rand(2, 3, 32, 32)
    for found, expected in zip(again(images)[0], model(images)[0], strict=True):
        assert torch.equal(found, expected)
    save_checkpoint(path, again, extra={"image_size": [32, 32]})
    load_checkpoint(path)  # the new place is in there


def test_weights_for_a_model_that_holds_its_own(tmp_path):
    save_checkpoint(tmp_path / "flow.pt", usf.models.USFlow(4, blocks=1))
    with pytest.raises(ValueError, match=r"weights: expected None, as .*flow\.pt holds all .* found a\.pt"):
        load_checkpoint(tmp_path / "flow.pt", weights="a.pt")


@pytest.mark.parametrize("weights", ["auto", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_keep_their_dtype(tmp_path, dtype, weights):
    pytest.importorskip("timm")
    backbone = usf.models.create_backbone(out_indices=(0, 1), weights=weights)
    model, images = usf.models.FastFlow(backbone, steps=1).to(dtype).eval(), torch.rand(2, 3, 32, 32)
    assert model.null_parameters.dtype is torch.float64
    save_checkpoint(tmp_path / "model.pt", model)
    again = load_checkpoint(tmp_path / "model.pt")
    assert again.null_parameters.dtype is torch.float64
    images = images.to(dtype)
    for found, expected in zip(again(images)[0], model(images)[0], strict=True):
        assert torch.equal(found, expected)
    save_checkpoint(tmp_path / "flow.pt", usf.models.USFlow(2, blocks=1).to(dtype))
    assert next(load_checkpoint(tmp_path / "flow.pt").parameters()).dtype is dtype


def test_what_a_checkpoint_holds_is_not_looked_for_elsewhere(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pt")
    backbone = usf.models.create_backbone("resnet10t", weights=tmp_path / "weights.pt", out_indices=(1,))
    options = {"image_size": 16, "latent": 4, "width": 4, "blocks": 1}
    model = usf.models.VAEUSFlow(backbone, trainable=True, **options).eval()
    save_checkpoint(tmp_path / "vae.pt", model)
    (tmp_path / "weights.pt").unlink()
    again = load_checkpoint(tmp_path / "vae.pt")
    save_checkpoint(tmp_path / "vae.pt", again)
    again = load_checkpoint(tmp_path / "vae.pt")
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="weights: expected None"):
        load_checkpoint(tmp_path / "vae.pt", weights=tmp_path / "vae.pt")


def test_many_may_write_the_same_file_at_once(tmp_path):
    path, failures = tmp_path / "a", []

    def write(letter):
        for _ in range(30):
            try:
                with files.atomic_write(path, durable=False) as file:
                    file.write(letter * 2000)
                assert len(set(path.read_bytes())) == 1
                assert path.stat().st_size == 2000
            except (OSError, AssertionError) as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 250, "\u00e4" * 120, "[a]*"])
def test_names_of_any_length_and_letters(tmp_path, name):
    files.write_json(tmp_path / name, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with open(tmp_path / f"{files._hidden(name)}0.tmp", "wb"):
        pass
    files.remove_leftovers(tmp_path, (name,))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_compiled_model_is_stored_as_what_it_compiles(tmp_path):
    flow = usf.models.USFlow(2, blocks=1)
    compiled = torch.compile(flow)
    save_checkpoint(tmp_path / "flow.pt", compiled)
    content = read_checkpoint(tmp_path / "flow.pt")
    assert content["architecture"] == "USFlow"
    assert content["state"].keys() == flow.state_dict().keys()
    assert isinstance(load_checkpoint(tmp_path / "flow.pt"), usf.models.USFlow)
    load_stored_state(compiled, content, "flow.pt")
