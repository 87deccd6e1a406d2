import pytest
from test_bench_compare import row

from bench import demonstration, gpu_sections, report, summary, table
from bench.machine import RESULTS
from bench.model_peers import AT_ONCE
from bench.registry import SUBJECTS
from bench.sections import losses, section

TRAINED = ", training step"


def test_the_readme_and_its_page_say_what_the_rows_say():
    readme, devices = report.README.read_text(encoding="utf-8"), report.files(RESULTS)
    assert report.rewritten(readme, report.parts(devices)) == readme, "run: python -m bench.report"
    assert report.page(devices) == report.PAGE.read_text(encoding="utf-8"), "run: python -m bench.report"


def test_a_readme_without_markers():
    with pytest.raises(ValueError, match="speed: begin"):
        report.rewritten("# Title", {"speed": ""})


def test_the_kept_demonstration_is_worth_showing():
    """Defects neither trivial nor invisible, the flow above its baseline, its own threshold near the best."""
    found = demonstration.read()["textures"].values()

    def mean(key):
        return sum(texture[key] for texture in found) / len(found)

    assert len(found) == 3
    assert 0.75 <= mean("baseline_pixel_auroc") <= 0.95
    assert mean("pixel_auroc") >= mean("baseline_pixel_auroc") + 0.02
    assert mean("image_auroc") >= mean("baseline_image_auroc") + 0.03
    for texture in found:
        assert texture["pixel_auroc"] >= texture["baseline_pixel_auroc"]
        assert texture["image_auroc"] >= texture["baseline_image_auroc"]
        assert texture["miou_automatic"] >= texture["miou_oracle"] - 0.1
        assert texture["false_alarms_per_clean_image"] <= 1
        assert all(0.7 <= z2 <= 1.5 for z2 in texture["held_out_mean_square"].values())


def test_each_device_has_a_part_of_the_page_and_the_first_the_pictures(tmp_path):
    table.write(tmp_path / "cpu.csv", blocks())
    table.write(tmp_path / "another.csv", [r | {"device": "Another"} for r in blocks()])
    table.write(tmp_path / "compile_sm90.csv", [])
    devices = report.files(tmp_path)
    assert [rows[0]["device"] for rows in devices] == ["cpu", "Another"]
    cold = [r | {"cache": "cold"} for r in blocks()]
    table.write(tmp_path / "cpu.csv", [r for rows in devices for r in rows] + cold)
    (tmp_path / "another.csv").unlink()
    assert report.files(tmp_path) == devices
    text = report.page(devices)
    assert text.count("### Blocks, inference\n") == 2
    assert "![" in text.split("## Another")[0]
    assert "![" not in text.split("## Another")[1]


def quick(case, times, *, device="cpu", dtype="float32", **shared):
    """Rows of a block's fused form and of its peers."""
    shared |= {"subject": "blocks", "direction": "forward", "device": device, "dtype": dtype}
    shared |= {"case": case, "versions": "torch=2"}
    yield row("additive, LU, fused", times[0], **shared)
    for name, time in zip(("anomalib", "FrEIA 0.2", "anomalib, torch.compile"), times[1:], strict=False):
        yield row(name, time, "peer", **shared)


def test_the_summary_is_of_the_quick_cases_and_of_all_on_a_gpu():
    small, other, large = "64 @ 64^2, k=1, batch 8", "64 @ 64^2, k=3, batch 8", "816 @ 28^2, k=3, batch 32"
    cpu = [*quick(small, (1, 4, 9, 0.5)), *quick(other, (2, 2, 8)), *quick(large, (1, 100))]
    gpu = [*quick(large, (1, 0.5), device="GPU", dtype="bfloat16")]
    gpu += [
        r | {"provider": r["provider"] + table.CAPTURED, "p50_ms": "3"} for r in gpu if r["role"] == "peer"
    ]
    gpu += [r | {"provider": r["provider"] + table.CAPTURED} for r in gpu if r["role"] == "ours"]
    assert summary.page([cpu, gpu]) == (
        "|  | over the fastest of | cpu, float32 | GPU, bfloat16 |\n| --- | --- | --- | --- |\n"
        "| coupling blocks: additive, LU | anomalib, FrEIA | **2.0x** (1.00x) | **3.0x** |"
    )
    assert summary.page([cpu]).count("|") == 3 * 4
    text = summary.section([cpu, gpu])
    lost = "1 of 3 comparisons on cpu, 1 of 2 comparisons on GPU (worst, in `blocks`, 0.50x: additive, LU"
    assert lost in text.replace("\n", " ")
    assert text.split("|")[0].count(". ") <= 3
    on_cpu, on_gpu = text.split("On a GPU, in CUDA graphs")
    assert "over the fastest of | cpu, float32 |\n" in on_cpu
    assert "| coupling blocks | anomalib, FrEIA | **2.0x** (1.00x) |" in on_cpu
    assert "over the fastest of | GPU, bfloat16 |\n" in on_gpu
    assert "On a GPU" not in summary.section([cpu])
    assert "- `blocks`, cpu: 1 of 3 comparisons; worst 0.50x" in report.page([cpu])


def test_the_summary_knows_every_case_of_the_quick_run():
    rows = []
    for name in ("blocks", "training_step", "models", "accelerate", "tree", "nfa"):
        for case in SUBJECTS[name].cases:
            provider = {"models": "additive, LU", "accelerate": "accelerate"}.get(name, "conjugated")
            rows.append(row(provider, 1, subject=name, case=case.name, direction="forward"))
    known = {summary._line(r) for r in rows} - {""}
    assert known <= {name for name, _ in summary._lines(rows)}
    assert len(known) == 2 + 9 + 3 + 2


def test_the_readme_has_the_forms_together_and_leaves_parts_out():
    case = next(c.name for c in SUBJECTS["training_step"].cases if c.quick)
    shared = {"subject": "training_step", "case": case, "direction": "training step"}
    rows = [row("conjugated", 4, **shared), row("additive, LU", 1, **shared)]
    rows += [row(f"conjugated{table.REVERSIBLE}", 8, **shared), row("anomalib", 4, "peer", **shared)]
    flow, trained = (
        next(
            c.name
            for c in SUBJECTS["models"].cases
            if c.quick and c.name.startswith("FastFlow") and part in c.name
        )
        for part in ("flow part", TRAINED)
    )
    rows += [
        row(f"additive, LU{table.REVERSIBLE}", 8, subject="models", case=trained, direction="training step")
    ]
    rows += [row("anomalib Fastflow", 128, "peer", subject="models", case=trained, direction="training step")]
    rows += [row("additive, LU, fused", 1, subject="models", case=flow, direction="forward")]
    rows += [row("anomalib Fastflow", 9, "peer", subject="models", case=flow, direction="forward")]
    assert summary.page([rows], brief=True).splitlines()[2:] == [
        "| training step of blocks | anomalib, FrEIA | **2.0x** (1.00x) |",
        "| training steps, reversible | anomalib, FrEIA | **2.8x** (0.50x) |",
    ]
    assert "| FastFlow, flow alone | anomalib | **9.0x** |" in summary.page([rows])


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
    assert not list(losses(list(blocks())))  # the form that is not fused is slower, and not what one uses


def test_anomalib_counts_in_its_faster_memory_format():
    rows = list(blocks())
    rows += [
        r | {"provider": "anomalib, channels-last", "p50_ms": "3"}
        for r in rows
        if (r["provider"], r["case"]) == ("anomalib", "a1")
    ]
    assert "| additive, LU | **2.45x** (2.00x) |" in section(rows)


def test_what_is_lost_is_said():
    rows = [r | {"p50_ms": "3"} if r["role"] == "peer" and r["case"] == "b8" else r for r in blocks()]
    rows = [r | {"p50_ms": "5"} if "fused" in r["provider"] and r["case"] == "b8" else r for r in rows]
    assert list(losses(rows)) == [
        "- `blocks`, cpu: 1 of 4 comparisons; worst 0.60x: additive, LU, fused at b8, float32, "
        "against anomalib"
    ]


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


def on_gpu(subject, case, *named, **shared):
    """Rows of (provider, role, ms), all of them captured but those that end with "eager"."""
    shared |= {"subject": subject, "case": case, "direction": "forward", "device": "GPU"}
    shared |= {"versions": "torch=2"}
    for name, role, p50, *more in named:
        name = name.removesuffix(" eager") if name.endswith(" eager") else name + table.CAPTURED
        yield row(name, p50, role, **(shared | (more[0] if more else {})))


def test_what_was_aimed_at_is_beside_what_was_reached():
    large = {"batch": "64", "dtype": "float32"}
    rows = [
        *on_gpu(
            "coupling",
            "additive coupling, 256 @ 64^2, batch 64",
            ("usf_kernels", "ours", 2, {"of_limit": "0.846"}),
            ("torch.compile", "peer", 2.6),
            **large,
        ),
        *on_gpu(
            "lu_conv",
            "LU 1x1 convolution, 256 @ 64^2, batch 64, forward",
            ("usf_kernels", "ours", 2, {"of_limit": "0.9", "gflop_per_s": "5"}),
            (table.VENDOR, "limit", 1.6),
            (table.VENDOR, "limit", 1.9),
            **large | {"dtype": "bfloat16"},
        ),
        *on_gpu(
            "blocks",
            "64 @ 64^2, k=1, batch 1, 8 blocks",
            ("conjugated, fused", "ours", 1),
            ("conjugated", "ours", 2),
            ("FrEIA 0.2 eager", "peer", 6),
            ("FrEIA 0.2", "peer", 3),
            **{"batch": "1", "depth": "8", "dtype": "float32"},
        ),
    ]
    text = "\n\n".join(gpu_sections.section(rows))
    lines = (
        "| additive coupling | 256 @ 64², batch 64 | 85 % | **1.30x** |  |  |",
        "| LU 1x1 convolution | 256 @ 64², batch 64 |  |  |  | **80 %** |",
        "| 8 blocks: conjugated | 64 @ 64², k=1, batch 1 |  |  | **6.0x** |  |",
    )
    assert all(line in text for line in lines)
    small = [r | {"batch": "8"} for r in rows]
    assert "aimed at" not in "".join(gpu_sections.section(small))


def test_models_of_a_gpu_have_tables():
    rows = [r | {"device": "GPU", "versions": "torch=2"} for r in (*models(""), *models(TRAINED))]
    rows = [r | {"direction": "training step" if TRAINED in r["case"] else "forward"} for r in rows]
    rows += [r | {"provider": r["provider"] + table.CAPTURED, "p50_ms": "1"} for r in rows]
    text = "\n\n".join(gpu_sections.section(rows))
    assert "| additive, LU | UFlow resnet18 256², batch 8 | 1 | 1.50x | **1.00x** |" in text
    assert "| additive, LU | UFlow resnet18 256², batch 8 | 1 | 0.75x | **1.00x** |" in text
    assert "reversible training as it is called" in summary.section([rows]).replace("\n", " ")


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
    (lost,) = losses(rows)
    assert "1 of 5 comparisons; worst 0.75x: additive, LU at UFlow resnet18 256², batch 8" in lost


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
    assert "| CFlow resnet18 256² | 1 | whole model | 9 | 3 | **3.0x** |" in text
    assert "checkpoint" not in text


def test_a_peer_that_was_changed_has_a_line_of_its_own():
    case = next(c.name for c in SUBJECTS["models"].cases if c.quick and c.name.startswith("CFlow"))
    shared = {"subject": "models", "case": case, "direction": "forward"}
    rows = [row("additive, LU, fused", 1, **shared)]
    rows += [row(f"anomalib Cflow{end}", ms, "peer", **shared) for end, ms in (("", 6), (AT_ONCE, 2))]
    lines = summary.page([rows]).splitlines()[2:]
    assert [line.split("|")[2:4] for line in lines] == [
        [" anomalib ", " **6.0x** "],
        [" anomalib, all rows at once ", " **2.0x** "],
    ]
