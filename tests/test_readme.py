"""The Python of the README runs as it stands there, on stand-ins for what a reader has."""

import re
from functools import partial
from pathlib import Path

import pytest
import snippets
import torch
from test_fastflow import Pyramid
from torch import nn

import usf_kernels as usf
import usf_kernels.training
from usf_kernels.models import Backbone

README = "README.md"
run = partial(snippets.run, README)


def test_every_block_is_run_here():
    tested = re.findall(r"run\(\s*\"(.*?)\"", Path(__file__).read_text())
    every = snippets.blocks(README)
    assert sorted(block for block in every for words in tested if block.startswith(words)) == sorted(every)


def test_segmentation_of_latents(capsys):
    names = run("# Here noise", {})
    assert names["mask"][0, 0, 90, 90]
    assert not names["mask"][1:].any()
    assert "(10, 10, 14, 14)" in capsys.readouterr().out


def fit_briefly(fit, *arguments, max_epochs, **options):
    return fit(*arguments, max_epochs=2, progress=False, **options)


def test_a_model_and_its_inference_form(monkeypatch, tmp_path, graphs, capsys):
    def backbone(name, out_indices):
        config = {"name": name, "out_indices": out_indices}
        torch.manual_seed(0)  # the same weights at every call, as a pretrained one has
        return Backbone(Pyramid(), config, mean=(0.5,) * 3, std=(0.5,) * 3)

    for place in (usf.models, usf.models.scored):
        monkeypatch.setattr(place, "create_backbone", backbone)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(usf_kernels.training, "fit", partial(fit_briefly, usf_kernels.training.fit))
    pytest.importorskip("skimage")
    names = run("import torch", {})
    assert names["model"].loss(names["images"]).isfinite()
    assert "tensor([" in capsys.readouterr().out
    expected = names["prediction"].anomaly_map
    torch.testing.assert_close(run("fast =", names)["prediction"].anomaly_map, expected)
    names["fit"] = partial(names["fit"], accelerator="cpu")  # whose recordings stand in for CUDA's graphs
    names = snippets.run("docs/tuning.md", "standard =", names)
    assert names["standard"].options["memory"] == "standard"
    names = snippets.run("docs/tuning.md", "# Of an example", names)
    torch.testing.assert_close(names["prediction"].anomaly_map, expected)
    assert len(names["history"].rows) == 2
    assert len(graphs) == 2


def test_a_density_model():
    names = run("flow =", {"usf": usf, "torch": torch})
    assert names["loss"].isfinite()
    assert names["log_density"].shape == (16,)


def test_an_existing_model(capsys):
    pytest.importorskip("FrEIA")
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    model = SequenceINN(4)
    model.append(AllInOneBlock, subnet_constructor=nn.Linear)
    names = {"usf": usf, "their_model": model}
    run("print(usf.replace_blocks(their_model))", names)
    assert "AllInOneBlock" not in {type(module).__name__ for module in model.modules()}
    assert "1 modules replaced" not in capsys.readouterr().out
    run("print(usf.replace_blocks(their_model, to=", names)
    assert "UniformBlock" in {type(module).__name__ for module in model.modules()}
    assert capsys.readouterr().out


def test_an_accelerated_model(capsys):
    pytest.importorskip("anomalib")
    from anomalib.models.image.fastflow.torch_model import FastflowModel

    model = FastflowModel(input_size=(64, 64), backbone="resnet18", pre_trained=False, flow_steps=1)
    run("print(usf.accelerate", {"usf": usf, "their_model": model})
    assert usf.restore_blocks(model) > 1
    assert capsys.readouterr().out


def test_a_tree():
    assert run("tree =", {"usf": usf, "torch": torch})["tree"].area.max() == 784
