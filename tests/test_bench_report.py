import pytest
from test_bench_compare import row

from bench import report, table
from bench.machine import RESULTS
from bench.sections import section


def test_the_readme_says_what_the_rows_say():
    readme = report.README.read_text(encoding="utf-8")
    assert report.rewritten(readme, report.sections(RESULTS)) == readme, "run: python -m bench.report"


def test_a_readme_without_markers():
    with pytest.raises(ValueError, match="speed: begin"):
        report.rewritten("# Title", "")


def test_a_gpu_gets_a_section_of_its_own_without_pictures(tmp_path):
    table.write(tmp_path / "cpu.csv", blocks())
    table.write(tmp_path / "compile_sm90.csv", [])
    table.write(tmp_path / "some-gpu.csv", [r | {"device": "Some GPU"} for r in blocks()])
    text = report.sections(tmp_path)
    assert text.count("### Blocks, inference\n") == text.count("### Blocks, inference (Some GPU)\n") == 1
    assert "![" not in text.split("(Some GPU)")[1]


def blocks():
    """Two shapes, one and eight blocks: fused takes 1 or 2 ms, anomalib 4, its convolutions 1."""
    for depth in ("1", "8"):
        for case, ours in (("a", 1), ("b", 2)):
            shared = {"subject": "blocks", "case": case + depth, "depth": depth, "dtype": "float32"}
            shared |= {"direction": "forward", "device": "cpu", "threads": "2", "versions": "torch=2"}
            yield row("additive, LU", 9, **shared)
            yield row("additive, LU, fused", ours, **shared)
            yield row("additive, LU, fused", 2 * ours, **shared | {"direction": "inverse"})
            yield row("anomalib", 4, "peer", **shared)
            yield row("convolutions of additive blocks", 0.5, "limit", **shared)
            yield row("C x C products", 0.5, "limit", **shared)


def test_blocks_are_means_over_shapes():
    text = section(list(blocks()))
    assert "| additive, LU | **2.83x** (2.00x) | 1.41 (2.00) | 2.00 (2.00) |" in text
    assert "| additive, LU, 8 in a row | **2.83x** (2.00x) |" in text
    assert "torch 2" in text
    assert "Nowhere in these rows." in text  # the form that is not fused is slower, and not what one uses


def test_what_is_lost_is_said():
    rows = [r | {"p50_ms": "3"} if r["role"] == "peer" and r["case"] == "b8" else r for r in blocks()]
    rows = [r | {"p50_ms": "5"} if "fused" in r["provider"] and r["case"] == "b8" else r for r in rows]
    lost = section(rows).split("### Where we do not win")[1]
    assert "- `blocks`: 1 of 4 comparisons; worst 0.60x: additive, LU, fused at b8, float32" in lost


def test_training_memory_is_a_share_of_the_peers():
    shared = {"subject": "training_step", "case": "a", "depth": "8", "direction": "training step"}
    rows = [
        row("additive, LU", 4, saved_mb="50", **shared),
        row("additive, LU, reversible", 5, saved_mb="8", **shared),
        row("anomalib", 8, "peer", saved_mb="80", **shared),
    ]
    text = section(rows)
    assert "| additive, LU | **2.00x** (2.00x) |  | 0.62 (0.62) |" in text
    assert "| additive, LU, reversible | **1.60x** (1.60x) | 1.25 (1.25) | 0.10 (0.10) |" in text


def test_the_tree_is_beside_the_fastest():
    shared = {"subject": "tree", "case": "white 28^2", "side": "28", "direction": "forward"}
    rows = [row("usf_kernels", 0.02, **shared), row("slow", 1, "peer", **shared)]
    rows.append(row("maxtree (uint16)", 0.1, "peer", **shared))
    assert "| 28² | 0.02 / 0.1 (maxtree), **5.0x** |" in section(rows)


def models(part, dtype="float32", **shared):
    """Two batch sizes: ours takes 2 and 4 ms, fused half of that, the fastest peer 3."""
    for batch, times in (("1", 2), ("8", 4)):
        shared |= {"subject": "models", "case": f"UFlow resnet18 256^2, batch {batch}{part}", "dtype": dtype}
        yield row("additive, LU", times, **shared)
        if part != ", training step":
            yield row("additive, LU, fused", times / 2, **shared)
        yield row("anomalib Uflow", 5, "peer", **shared)
        yield row("anomalib Uflow, torch.compile", 3, "peer", **shared)


def test_every_part_of_the_models_has_a_table():
    rows = [*models(""), *models("", "bfloat16"), *models(", training step")]
    rows = [r for r in rows if r["dtype"] == "float32" or "batch 1" in r["case"]]  # some were not measured
    rows.append(rows[0] | {"provider": "backbone alone", "role": "limit", "p50_ms": "0.5"})
    whole, training = section(rows).split("### Whole models")[1].split("Forward and backward")
    assert "| model | batch | backbone, ms | fastest peer, ms | additive, LU |" in whole
    assert "| UFlow resnet18 256² | 1 | 0.5 | 3 / 3 | **3.0x** / **3.0x** |" in whole
    assert "| UFlow resnet18 256² | 8 |  | 3 | **1.50x** |" in whole
    assert "The flow alone" not in whole
    assert "| UFlow resnet18 256² | 8 | 3 | **0.75x** |" in training
    assert (
        "- `models`: 1 of 5 comparisons; worst 0.75x: additive, LU at UFlow resnet18 256², batch 8"
        in training
    )


def accelerated(part, times, **shared):
    names = ("anomalib", "replace_blocks", "accelerate", "accelerate, exact")
    shared |= {"subject": "accelerate", "case": f"CFlow resnet18 256^2, batch 1, {part}"}
    for name, (p50, saved) in zip(names, times, strict=False):  # the last ones may be missing
        yield row(name, p50, "peer" if name == "anomalib" else "ours", saved_mb=saved, **shared)


def test_accelerated_models_are_beside_the_originals():
    flow = list(accelerated("flow part", ((8, "60"), (4, "36"), (2, ""))))
    whole = list(accelerated("whole model", ((9, ""), (6, ""), (3, ""), (4.5, ""))))
    text = section([*whole, *flow])
    assert "| CFlow resnet18 256² | 1 | flow part | 8 | 2 | **4.0x** | **2.0x** |  |" in text
    assert "| CFlow resnet18 256² | 1 | whole model | 9 | 3 | **3.0x** | **1.50x** | **2.0x** |" in text
    assert "| CFlow resnet18 256² | 60 | 36 | 40 % |" in text
    text = section([whole[0], whole[2]])
    assert "| CFlow resnet18 256² | 1 | whole model | 9 | 3 | **3.0x** |\n" in text
    assert "checkpoint" not in text
