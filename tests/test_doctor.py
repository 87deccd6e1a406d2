import importlib
import json
from importlib import metadata

import pytest
import torch

from usf_kernels import doctor
from usf_kernels.cli import main


def test_report_is_complete_and_json():
    report = json.loads(json.dumps(doctor.diagnose()))
    assert report["torch"] == torch.__version__
    assert report["devices"][-1].startswith("cpu")
    assert set(report["operations"]) == {*doctor.OPERATIONS, *doctor.NATIVE_OPERATIONS}
    for name in doctor.OPERATIONS:
        assert report["operations"][name] in {"PyTorch reference on cpu", "PyTorch reference on cuda",
                                              "Triton kernel on cuda"}  # fmt: skip


def test_extras_follow_the_metadata(monkeypatch):
    versions = {"timm": "1.0", "lightning": "2.5"}
    declared = ["torch>=2.10", 'timm>=1; extra == "models"', "usf-kernels[models]; extra == 'train'",
                'lightning>=2.5; extra == "train"', 'anomalib<3,>=2.7; extra == "anomalib"']  # fmt: skip

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor.metadata, "version", version)
    report = doctor.diagnose()
    assert report["extras"] == {
        "models": {"available": True, "packages": {"timm": "1.0"}},
        "train": {"available": True, "packages": {"timm": "1.0", "lightning": "2.5"}},
        "anomalib": {"available": False, "packages": {"anomalib": None}},
    }
    text = doctor.format_report(report)
    assert "anomalib   lacks anomalib" in text
    assert "Triton       absent: not installed" in text


def test_a_missing_extension_is_said_and_fails(monkeypatch, capsys):
    found = importlib.import_module

    def without_core(name, *rest):
        if name == "usf_kernels._core":
            raise ImportError("no module named usf_kernels._core")
        return found(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", without_core)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "extension    absent: no module named usf_kernels._core; reinstall usf-kernels" in out
    assert "log_nfa                   absent" in out


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_command(capsys, flag):
    pytest.importorskip("usf_kernels._core")
    assert main(["doctor", *flag]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert not flag or json.loads(out)["python"]
