import json
from importlib import metadata

import pytest
import torch

from usf_kernels import doctor
from usf_kernels.cli import main
from usf_kernels.ops import dispatch, products


def test_report_is_complete_and_json():
    report = json.loads(json.dumps(doctor.diagnose()))
    assert report["torch"] == torch.__version__
    assert report["devices"][-1].startswith("cpu")
    assert set(report["operations"]) == {
        *dispatch.operations(),
        doctor.CONDITIONERS,
        doctor.INFERENCE,
        *doctor.NATIVE_OPERATIONS,
    }
    on_gpu = torch.cuda.is_available() and dispatch.HAS_TRITON
    on_cpu = dict.fromkeys((*dispatch._on_cpu, "coupling_step"), "C++ for float32 on cpu")
    for name in dispatch.operations():
        if on_gpu:
            expected = "Triton kernel on cuda"
        elif torch.cuda.is_available():
            expected = "PyTorch reference on cuda"
        else:
            expected = on_cpu.get(name, "PyTorch reference on cpu")
        assert report["operations"][name] == expected
    if torch.cuda.is_available():
        own = "Triton and " if on_gpu else ""
        assert report["operations"][doctor.INFERENCE] == f"{own}PyTorch on cuda"
    own = "C++ for float32 on cpu" if products.MULTIPLIES else "PyTorch on cpu"
    conditioners = "PyTorch on cuda" if torch.cuda.is_available() else own
    assert report["operations"][doctor.CONDITIONERS] == conditioners


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the CPU")
@pytest.mark.parametrize(
    ("multiplies", "amx", "also"),
    [(False, False, ""), (True, False, ", bfloat16 with AVX-512"), (True, True, ", bfloat16 with AMX")],
)
def test_report_says_what_fused_flows_run_on(monkeypatch, multiplies, amx, also):
    monkeypatch.setattr(products, "MULTIPLIES_BFLOAT16", multiplies)
    monkeypatch.setattr(products, "has_amx", lambda: amx)
    found = doctor.diagnose()["operations"][doctor.INFERENCE]
    assert found == f"C++ for float32{also} and PyTorch on cpu"


def test_report_says_which_operations_run_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "runs_triton", lambda name, probe: name == "affine_coupling")
    operations = doctor.diagnose()["operations"]
    assert operations["affine_coupling"].startswith("Triton kernel on ")
    assert operations["masked_additive_coupling"].startswith("PyTorch reference on ")


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
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    report = doctor.diagnose()
    assert report["extras"] == {
        "models": {"available": True, "packages": {"timm": "1.0"}},
        "train": {"available": True, "packages": {"timm": "1.0", "lightning": "2.5"}},
        "anomalib": {"available": False, "packages": {"anomalib": None}},
    }
    text = doctor.format_report(report)
    assert "anomalib   lacks anomalib" in text
    assert "Triton       absent: not installed" in text


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_command(capsys, flag):
    pytest.importorskip("usf_kernels._core")
    assert main(["doctor", *flag]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert not flag or json.loads(out)["python"]
