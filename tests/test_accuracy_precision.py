"""Both precisions side by side, on rows whose answer is known; and the command, on few crops."""

from dataclasses import replace

import pytest

from bench.accuracy import precision


def rows(texture, before, after):
    shared = {"texture": texture, "model": "CFlow", "form": "affine", "recipe": "short"}
    return [
        shared | {"precision": name} | {key: str(value) for key in precision.METRICS}
        for name, value in (("float32", before), ("bfloat16", after))
    ]


def test_the_text_follows_the_rows():
    text = " ".join(precision.section(rows("brick", 0.9, 0.86) + rows("grass", 0.7, 0.7)).split())
    cells = " | ".join(["0.800 / 0.780"] * 4 + ["0.80 / 0.78"])
    assert f"| CFlow | affine | {cells} |" in text
    assert "change on one texture: 0.0400 of image AUROC" in text


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        precision, "QUICK", replace(precision.QUICK, train=32, validation=16, test=10, epochs=1)
    )
    arguments = ["--quick", "--models", "FastFlow", "--workers", "1", "--output", str(tmp_path)]
    assert precision.main(arguments) == 0
    found = precision.rows_in(tmp_path).read()
    assert [(row["form"], row["precision"]) for row in found] == [
        (form, name) for form in ("affine", "additive + LU") for name in ("float32", "bfloat16")
    ]
    for full, half in zip(found[::2], found[1::2], strict=True):
        assert full["pixel_auroc"] != half["pixel_auroc"]  # not the same model twice
        assert abs(float(full["pixel_auroc"]) - float(half["pixel_auroc"])) < 0.05
    assert "image AUROC" in (tmp_path / "precision.md").read_text()
