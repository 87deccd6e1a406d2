import pytest

from bench import compare, table


def row(provider, p50, role="ours", **columns):
    base = dict.fromkeys(table.FIELDS, "") | {"subject": "s", "case": "c", "noisy": "0", "role": role}
    return base | {"provider": provider, "p50_ms": str(p50)} | columns


@pytest.fixture
def compared(tmp_path, capsys):
    def go(old, new):
        for name, rows in (("old", old), ("new", new)):
            table.write(tmp_path / f"{name}.csv", rows)
        code = compare.main([str(tmp_path / "old.csv"), str(tmp_path / "new.csv")])
        return code, capsys.readouterr().out

    return go


def test_a_slower_machine_is_no_regression(compared):
    old = [row("a", 1), row("peer", 2, "peer")]
    code, printed = compared(old, [row("a", 3), row("peer", 6.1, "peer")])
    assert code == 0
    assert "1 rows compared: 0 more than 10 % slower" in printed


def test_a_smaller_lead_is_one(compared):
    old = [row("a", 1), row("peer", 2, "peer"), row("new peer", 1, "peer", case="other")]
    new = [row("a", 1), row("peer", 1.7, "peer"), row("other peer", 0.1, "peer")]
    code, printed = compared(old, new)
    assert code == 1
    assert "s: c: a, , : 0.5 -> 0.588 of peer (1.18x)" in printed


def test_noise_is_told_and_forgiven(compared):
    old = [row("a", 1), row("peer", 2, "peer")]
    code, printed = compared(old, [row("a", 2, noisy="1"), row("peer", 2, "peer")])
    assert code == 0
    assert "(2.00x, noisy)" in printed


def test_cores_that_moved_are_told_and_forgiven(compared):
    old = [row("a", 1, section_us="4.2"), row("peer", 2, "peer", section_us="4.2")]
    for now, code, said in (
        ("6.6", 0, "(2.00x, the cores moved)"),
        ("4.5", 1, "(2.00x)"),
        ("", 1, "(2.00x)"),
    ):
        new = [row("a", 2, section_us=now), row("peer", 2, "peer", section_us=now)]
        found, printed = compared(old, new)
        assert found == code
        assert said in printed


def test_without_a_peer_the_limit_serves(compared):
    old = [row("a", 2), row("bare", 1, "limit"), row("peer", 1, "peer", direction="inverse")]
    code, printed = compared(old, [row("a", 1), row("bare", 1, "limit")])
    assert code == 0
    assert "1 more than 10 % faster" in printed


def test_nothing_to_compare(compared, tmp_path):
    assert compared([row("a", 1)], [row("a", 9)]) == (
        0,
        "0 rows compared: 0 more than 10 % slower, 0 more than 10 % faster\n",
    )
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "old.csv"), str(tmp_path / "none.csv")])


def test_speedups_and_their_mean():
    rows = [row("a", 2), row("p", 4, "peer"), row("a", 1, case="d"), row("p", 8, "peer", case="d")]
    found = table.speedups(rows, {"provider": "a"}, {"provider": "p"})
    assert found == {"c": 2.0, "d": 8.0}
    assert table.geometric_mean(found.values()) == pytest.approx(4)
