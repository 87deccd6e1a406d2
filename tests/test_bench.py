import csv

import pytest

from bench import registry, run
from bench.measure import alternate
from bench.subject import Case, Subject


def case(check=lambda providers: {}, **providers):
    return Case("tiny", "float32", 10, lambda: providers, check, seconds=0.01)


def test_every_provider_has_its_turns():
    calls = []
    timings = alternate({n: lambda n=n: calls.append(n) for n in "ab"}, seconds=0.01)
    assert set(timings) == {"a", "b"}
    assert calls.count("a") > 3 < calls.count("b")
    for timing in timings.values():
        assert 0 < timing.p20 <= timing.p50 <= timing.p80
        assert timing.repeats >= 3


def test_rows_are_appended_and_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    def broken():
        raise AssertionError("timed although it is wrong")

    tiny = case(lambda providers: {"peer": "gives 3"}, ours=lambda: 2, peer=broken)
    monkeypatch.setitem(registry.SUBJECTS, "tiny", Subject("tiny", "a test", (tiny,), {"nowhere": "pip"}))
    output = tmp_path / "new" / "rows.csv"
    for _ in range(2):
        run.main(["tiny", "--output", str(output)])
    with open(output) as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["ours", "ours"]
    assert all(row["subject"] == "tiny" and float(row["p50_ms"]) > 0 and row["versions"] for row in rows)
    printed = capsys.readouterr().out
    assert "peer: not timed, wrong: gives 3" in printed
    assert "nowhere is not installed" in printed


def test_unknown_subject(capsys):
    with pytest.raises(SystemExit):
        run.main(["forest"])
    assert "unknown subject 'forest'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["white 28^2", "smooth 28^2", "smooth_8bit 28^2"])
def test_the_tree_passes_its_own_check(name):
    subject = registry.SUBJECTS["tree"].case(name)
    providers = subject.providers()
    assert next(iter(providers)) == "usf_kernels"
    assert subject.check(providers) == {}
