import csv
import gc
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch

from bench import machine, registry, run, table
from bench.blocks import SHAPES
from bench.flows import FORMS, Shape, our_flow, peer_flow, truth
from bench.measure import CPU, Neighbours, alternate, first_call
from bench.memory import STATUS, peak_bytes, saved_bytes
from bench.subject import PEER, Case, Provider, Subject, close_to, relative_error
from usf_kernels.cli import main as command


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch):
    monkeypatch.setattr(run, "_limits", lambda device: {"copy": 10.0, "float32": 100.0})


def tiny(*providers, cases=("tiny",)):
    """A subject whose cases have these providers."""
    return Subject("tiny", "a test", tuple(Case(c, lambda _: providers, seconds=0.01) for c in cases))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command on a subject; the rows of its file."""

    def go(subject, *options, output=tmp_path / "new" / "rows.csv"):
        monkeypatch.setitem(registry.SUBJECTS, "tiny", subject)
        assert command(["bench", "tiny", "--output", str(output), *options]) == 0
        return table.read(output)

    return go


def test_every_provider_has_its_turns():
    calls = []
    timings = alternate({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0.01)
    assert set(timings) == {"a", "b"}
    assert calls.count("a") > 3 < calls.count("b")
    for timing in timings.values():
        assert 0 < timing.p20 <= timing.p50 <= timing.p80
        assert timing.repeats >= 3


def test_what_took_long_before_is_not_warmed_up_again():
    calls = []
    alternate({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0, least=1, known={"a": 9.0, "b": 0.1})
    assert calls.count("a") == 1
    assert calls.count("b") > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_timed_eagerly_and_as_a_graph(measured):
    x = torch.ones(1 << 20, device="cuda")
    check = close_to(lambda: torch.full((1 << 20,), 2.0).double(), "float32")
    subject = tiny(Provider("ours", lambda: x + x, check=check, peak=True, gigabytes=8e-3))
    eager, graph = measured(subject, "--device", "cuda")
    assert (eager["provider"], graph["provider"]) == ("ours", "ours, CUDA graph")
    assert float(eager["peak_mb"]) == pytest.approx(4.2, rel=0.1)
    assert 0 < float(graph["p50_ms"]) < 10


def test_cold_calls_have_turns_of_their_own():
    calls = []
    (timing,) = alternate({"a": lambda: calls.append(0)}, seconds=0, least=2, cold=True).values()
    assert timing.repeats == 2
    assert len(calls) == 1 + 2 * 2  # to warm up, then one that does not count and one that does


@pytest.mark.skipif(not STATUS.exists(), reason="takes Linux's /proc")
def test_a_neighbour_is_noticed():
    neighbours = Neighbours()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    time.sleep(0.3)
    busy.kill()
    busy.wait()
    share = neighbours.share()
    assert 0.5 / (os.cpu_count() or 1) < share <= 1


def test_a_first_call_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="more than 1 s"):
        first_call(lambda: time.sleep(5), limit=1)
    assert first_call(lambda: 3)[0] == 3


def test_what_is_wrong_is_reported_and_not_timed(measured, capsys):
    def refuse():
        raise RuntimeError("no such kernel\nat line 3")

    rows = measured(
        tiny(
            Provider(
                "ours", lambda: torch.ones(2), check=close_to(lambda: torch.ones(2).double(), "float32")
            ),
            Provider("peer", lambda: 3, PEER, check=lambda found: f"gives {found}"),
            Provider("other peer", refuse, PEER),
        )
    )
    assert [row["provider"] for row in rows] == ["ours"]
    assert float(rows[0]["p50_ms"]) > 0
    assert float(rows[0]["first_call_ms"]) > 0
    printed = capsys.readouterr().out
    assert "peer, float32, forward: not timed, wrong: gives 3" in printed
    assert "other peer, float32, forward: not timed: no such kernel\n" in printed


def test_a_case_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def broken(_):
        raise ValueError("no such layout")

    good = tiny(Provider("a", lambda: 1), Provider("b", lambda: 2, check=broken))
    bad = Case("bad", broken, seconds=0)
    monkeypatch.setitem(registry.SUBJECTS, "tiny", replace(good, cases=(bad, *good.cases)))
    assert command(["bench", "tiny", "--output", str(tmp_path / "rows.csv")]) == 1
    assert [(row["case"], row["provider"]) for row in table.read(tmp_path / "rows.csv")] == [("tiny", "a")]
    printed = capsys.readouterr().out
    assert "not measured: no such layout" in printed
    assert "b, float32, forward: not timed: no such layout" in printed


def test_a_case_replaces_its_rows_and_no_others(measured):
    one, two = Provider("one", lambda: 1), Provider("two", lambda: 2)
    measured(tiny(one, two, cases=("a", "b", "gone")))
    rows = measured(tiny(two, cases=("a", "b")), "--cases", "a")
    assert [(row["case"], row["provider"]) for row in rows] == [("a", "two"), ("b", "one"), ("b", "two")]


def test_ratios_are_to_the_fastest_peer_of_the_same_kind(measured, capsys):
    def wait(seconds):
        return lambda: time.sleep(seconds)

    rows = measured(
        tiny(
            Provider("ours", wait(0.002)),
            Provider("slow", wait(0.008), PEER),
            Provider("slower", wait(0.012), PEER),
            Provider("fast elsewhere", wait(0.001), PEER, direction="inverse"),
            Provider("fast otherwise", wait(0.001), PEER, dtype="float64"),
        )
    )
    assert table.best_peer(rows[0], rows)["provider"] == "slow"
    ratio = table.milliseconds(rows[1]) / table.milliseconds(rows[0])
    assert f"x{ratio:.2f}" in next(x for x in capsys.readouterr().out.splitlines() if "  ours" in x)


def test_bfloat16_is_measured_where_there_is_arithmetic_for_it(measured, monkeypatch, capsys):
    def found():
        rows = measured(tiny(Provider("wide", lambda: 1), Provider("narrow", lambda: 1, dtype="bfloat16")))
        return [row["provider"] for row in rows]

    monkeypatch.setattr(run.machine, "dtypes", lambda device: (torch.float32, torch.bfloat16))
    assert found() == ["wide", "narrow"]
    monkeypatch.setattr(run.machine, "dtypes", lambda device: (torch.float32,))
    assert found() == ["wide"]
    assert "no arithmetic for bfloat16" in capsys.readouterr().out


def test_part_of_the_providers_leaves_the_rows_alone(monkeypatch, capsys):
    monkeypatch.setitem(registry.SUBJECTS, "tiny", tiny(Provider("a", lambda: 1), Provider("b", lambda: 1)))
    monkeypatch.setattr(table, "replace", None)
    assert run.main(["tiny", "--providers", "b"]) == 0
    printed = capsys.readouterr().out
    assert "  b " in printed
    assert "  a " not in printed


def test_where_time_is_limited_every_subject_gets_its_turn(monkeypatch, tmp_path, capsys):
    cases = [
        Case(n, lambda _: [Provider("a", lambda: 1)], seconds=0, first=n == "best") for n in ("x", "best")
    ]
    for name in ("tiny", "other"):
        monkeypatch.setitem(registry.SUBJECTS, name, Subject(name, "a test", tuple(cases)))
    run.main(["tiny", "other", "--minutes", "1", "--output", str(tmp_path / "rows.csv")])
    printed = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert printed == ["tiny: best", "other: best", "tiny: x", "other: x"]


def test_time_ends_between_cases(measured, capsys):
    slow = tiny(Provider("a", lambda: time.sleep(0.05)), cases=("first", "second", "third"))
    rows = measured(slow, "--minutes", "0.004")
    assert [row["case"] for row in rows] == ["first"]
    assert "2 cases left out" in capsys.readouterr().out


def test_errors(capsys, tmp_path):
    assert command(["bench", "forest"]) == 2
    assert "unknown subject 'forest'; there are machine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["tree", "--cases", "nowhere"])
    assert "nothing to measure" in capsys.readouterr().err
    (tmp_path / "old.csv").write_text("subject,case\ntree,x\n")
    with pytest.raises(ValueError, match=r"expected the columns subject, case, provider"):
        table.read(tmp_path / "old.csv")


def test_an_installation_without_the_source_has_no_benchmark(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("usf_kernels.cli.bench.__file__", str(tmp_path / "a" / "b" / "bench.py"))
    assert command(["bench"]) == 2
    assert "run it in a source checkout" in capsys.readouterr().err


def test_threads(measured):
    before = torch.get_num_threads()
    (row,) = measured(tiny(Provider("a", lambda: 1)), "--threads", "1")
    torch.set_num_threads(before)
    assert (row["threads"], row["section_us"]) == ("1", "")
    (row,) = measured(tiny(Provider("a", lambda: 1)), "--threads", "2")
    torch.set_num_threads(before)
    assert 0 < float(row["section_us"]) < 1e5


@pytest.mark.skipif(not STATUS.exists(), reason="takes Linux's /proc")
def test_peak_memory():
    assert peak_bytes(lambda: torch.ones(50_000_000), CPU) == pytest.approx(2e8, rel=0.1)
    assert peak_bytes(lambda: None, CPU) < 1e7


def test_what_is_counted_is_freed():
    """A node that saves its own output."""
    nodes = []

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(y)
            nodes.append(weakref.ref(ctx))
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    x = torch.randn(50, requires_grad=True)
    assert saved_bytes(lambda: Exp.apply(x)) == 4 * 50
    gc.collect()
    assert [node() for node in nodes] == [None]


def test_saved_bytes_count_each_storage_once():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(5, 10)

    def forward():
        h = (x @ weight).tanh()  # keeps x, weight and h
        return (h * h).sum()  # keeps h, twice

    assert saved_bytes(forward, ignore=(weight,)) == 4 * (50 + 50)
    assert saved_bytes(forward, ignore=(weight, x)) == 4 * 50


def test_relative_error():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")
    assert relative_error(torch.full((3,), 2.2), torch.full((3,), 2.0)) == pytest.approx(0.1)
    off = torch.full((1, 3), 1.0005)
    assert "relative error 0.0005" in close_to(lambda: torch.ones(1, 3), "float32")(off)
    assert close_to(lambda: torch.ones(1, 3), "float32", slack=10)(off) is None
    assert "shape" in close_to(lambda: torch.ones(1, 3), "float32")(torch.ones(1, 2))
    assert "relative error 1" in close_to(lambda: torch.ones(1, 3), "float32")((torch.zeros(4, 3), 0))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD EPYC", "AMD EPYC family 25 model 17"),
        ("Intel(R) Xeon(R) Processor", "Intel Xeon Processor family 25 model 17"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon CPU @ 2.20GHz family 25 model 17"),
        ("AMD EPYC 9654", "AMD EPYC 9654"),
    ],
)
def test_processors_without_a_number_are_told_apart(tmp_path, monkeypatch, model, name):
    info = tmp_path / "cpuinfo"
    core = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {model}\nflags\t\t: a: b\n\n"
    info.write_text(core + core.replace("17", "18"))
    monkeypatch.setattr(machine, "CPU_INFO", info)
    assert machine.device_name(torch.device("cpu")).startswith(f"{name}, ")
    info.unlink()
    assert machine.device_name(torch.device("cpu"))


def test_a_wrong_log_determinant_is_noticed():
    z = torch.ones(2, 3)
    right = close_to(lambda: (z[:1], torch.tensor([0.5])), "float32")
    assert right((z, torch.tensor([0.5, 9.0]))) is None
    assert right(z) is None
    assert right((z, torch.tensor([-0.5, 9.0]))) == "relative error 1.9 of a log-determinant"
    assert close_to(lambda: (z, torch.tensor(0.0)), "float32")((z, torch.tensor(1e-7))) is None


@pytest.mark.parametrize("form", FORMS)
def test_a_flow_is_the_same_every_time_and_its_truth_inverts_it(form):
    shape = Shape(5, 4, 3, 2, depth=2)
    x = shape.input(CPU)
    z, again = our_flow(form, shape)(x)[0], our_flow(form, shape)(x)[0]
    assert torch.equal(z, again)
    assert close_to(lambda: truth(form, shape, "forward"), "float32")(z) is None
    assert close_to(lambda: x[:1].double(), "float32")(our_flow(form, shape).inverse(z)) is None


def test_a_peer_with_our_weights_computes_what_ours_does():
    pytest.importorskip("FrEIA")  # anomalib's takes ten seconds to import, and is checked before it is timed
    shape = Shape(5, 4, 3, 2, depth=3)
    ours = our_flow("affine, permutation", shape)
    theirs = peer_flow("FrEIA", ours, shape)
    x = shape.input(CPU)
    for rev, call in ((False, ours), (True, ours.inverse)):
        expected, expected_log_det = call(x)
        found, log_det = theirs(x, rev=rev)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-4)


def test_flops_of_a_block():
    shape = Shape(6, 4, 3, 2)  # halves of 3, 32 positions
    assert shape.gigaflops(outputs=1, product=False) == pytest.approx(2e-9 * 32 * 9 * (3 * 3 + 3 * 3))
    assert shape.gigaflops(outputs=2, product=True) == pytest.approx(2e-9 * 32 * (9 * (9 + 18) + 36))


def test_names_are_unique_and_every_shape_is_there():
    for subject in registry.SUBJECTS.values():
        names = [case.name for case in subject.cases]
        assert len(set(names)) == len(names)
    assert len(registry.SUBJECTS["blocks"].cases) == 2 * 2 * 3 * len(SHAPES) - 1


def test_rows_survive_a_round_trip(tmp_path):
    row = dict.fromkeys(table.FIELDS, "a, b") | {"p50_ms": "1.5", "section_us": "3"}
    table.write(tmp_path / "rows.csv", [row])
    assert table.read(tmp_path / "rows.csv") == [row]
    with open(tmp_path / "rows.csv") as file:
        assert next(csv.reader(file)) == list(table.FIELDS)
