"""Packages that are missing: the error names what installs them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from usf_kernels import metrics
from usf_kernels.extras import needs_extra


def test_the_extra_is_named():
    with pytest.raises(ImportError, match=r"pictures: .*'absent'.*pip install 'usf-kernels\[train\]'"):  # noqa: SIM117
        with needs_extra("train", "pictures"):
            import absent  # noqa: F401


@pytest.mark.parametrize(
    ("module", "call"), [("scipy.stats", metrics.auroc), ("skimage.measure", metrics.aupro)]
)
def test_metrics_name_it(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"usf-kernels\[train\]"):
        call([0.1, 0.2], [0, 1])


@pytest.mark.parametrize("module", ["freia", "anomalib"])
def test_integrations_name_it(module):
    absent = "import sys; sys.modules['FrEIA'] = sys.modules['anomalib'] = None"
    code = f"{absent}; import usf_kernels.integrations.{module}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'usf-kernels[anomalib]'" in ended.stderr


def test_everything_installed_by_name_is_pinned():
    root = Path(__file__).parents[1]
    package = tomllib.loads((root / "pyproject.toml").read_text())
    groups = [package["build-system"]["requires"], package["project"]["dependencies"]]
    groups += package["project"]["optional-dependencies"].values()
    names = {re.split(r"[^\w-]", line)[0] for group in groups for line in group} - {"usf-kernels"}
    pinned = (root / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pinned)
    assert names <= {line.split("==")[0] for line in pinned}
