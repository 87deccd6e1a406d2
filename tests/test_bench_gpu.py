"""What the benchmark has for GPUs alone."""

import argparse

import pytest
import torch

from bench import flows, operations, priorities, registry, run, table
from bench.measure import CPU, captured
from bench.subject import Provider
from usf_kernels.cli import bench as options_of


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("while_capturing", [False, True])
def test_a_gpu_is_usable_after_a_capture_that_broke(while_capturing):
    x = torch.ones(4, device="cuda")

    def reads_back():
        if torch.cuda.is_current_stream_capturing() >= while_capturing:
            x.sum().item()

    with pytest.raises(RuntimeError):
        captured(reads_back)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()
    replay = captured(lambda: x.add_(1))
    before = x[0].item()
    replay()
    assert x[0].item() == before + 1


def test_what_cannot_be_captured_is_said_and_the_rest_is_captured(monkeypatch, capsys):
    def capture(call):
        if call() == "bad":
            raise ValueError("reads a value back\nat line 3")
        return call

    monkeypatch.setattr(run, "captured", capture)
    other = Provider("other", lambda: "bad", graphed=lambda: "good")
    providers = [Provider("a", lambda: "bad"), Provider("never", None, capture=False), other]
    assert list(run._graphs(providers)) == ["graph 2"]
    assert capsys.readouterr().out == "  a, float32: no CUDA graph: reads a value back\n"


def test_a_gpu_measures_what_is_asked_of_it_first():
    def work(device, *options):
        parser = argparse.ArgumentParser()
        options_of.add_arguments(parser)
        found = run._work(parser.parse_args(options), torch.device(device))
        return [(subject.name, case.name) for subject, case in found]

    order = list(priorities.ORDER)
    everything = work("cuda", "--minutes", "5")
    assert everything[: len(order)] == order
    on_gpus = [case for s in registry.SUBJECTS.values() if "cuda" in s.devices for case in s.cases]
    assert len(everything) == len(set(everything)) == len(on_gpus)
    assert work("cuda") != everything
    assert not {case for case in work("cpu", "--minutes", "5") if priorities.SIZE in case[1]}


@pytest.mark.parametrize("layout", flows.FORMATS)
@pytest.mark.parametrize("subject", ["lu_conv", "residual", "score"])
def test_the_vendor_multiplies_as_much_as_ours(monkeypatch, subject, layout):
    """Beside it, all that a bare product does is counted."""
    made = []
    for module, name in ((torch, "matmul"), (operations.F, "linear")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: made.append((args, real(*args))))
    for case in [case for case in registry.SUBJECTS[subject].cases if "64 @ 64^2, batch 8" in case.name]:
        _, _, inputs, _, _, gigaflops, _, products = case.providers.args
        if products is not None:
            made.clear()
            operations._multiply(products(*inputs(CPU)), layout)
            sizes = [out.numel() * args[layout == "channels_last"].shape[1] for args, out in made]
            assert 2e-9 * sum(sizes) == pytest.approx(gigaflops)


def test_large_cases_are_for_gpus_only():
    large = [
        case
        for name in table.OPERATIONS
        for case in registry.SUBJECTS[name].cases
        if case.name.endswith((priorities.SIZE, "batch 64")) or f"{priorities.SIZE}, " in case.name
    ]
    assert len(large) == 5 + 2 + 1 + 4
    assert all(case.devices == ("cuda",) and not case.quick and case.first for case in large)
    others = [c for s in registry.SUBJECTS.values() for c in s.cases if c not in large]
    assert {case.devices for case in others} == {("cpu", "cuda")}


def test_what_comes_first_on_a_gpu_exists_and_has_every_kind():
    cases = [registry.SUBJECTS[subject].case(name) for subject, name in priorities.ORDER]
    subjects = [subject for subject, _ in priorities.ORDER]
    assert set(subjects[:15]) == {"machine", *table.OPERATIONS, "blocks", "training_step", "models"}
    assert {(case.shape["batch"], case.shape.get("depth")) for case in cases[10:14]} >= {(1, 8), (8, 8)}
