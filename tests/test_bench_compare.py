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


def test_nothing_to_compare(compared, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compared([row("a", 1)], [row("a", 9)])
    assert "nothing to compare" in capsys.readouterr().err
    for name in ("none.csv", "."):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(tmp_path / "old.csv"), str(tmp_path / name)])


def test_what_is_no_longer_timed_is_told(compared):
    """It may be wrong now. A case that was not measured at all is no loss."""
    old = [row("a", 1), row("b", 1), row("peer", 2, "peer"), row("c", 1, case="other")]
    code, printed = compared(old, [row("a", 1), row("peer", 2, "peer")])
    assert code == 1
    assert "s: c: b, : no longer timed" in printed
    assert "other" not in printed


def test_other_threads_are_told_and_forgiven(compared):
    old = [row("a", 1, threads="2"), row("peer", 2, "peer", threads="2")]
    code, printed = compared(old, [row("a", 2, threads="1"), row("peer", 2, "peer", threads="1")])
    assert code == 0
    assert "(2.00x, with 1 threads, not 2)" in printed


def _row_with(**values):
    cells = (values.get(name, "") for name in table.FIELDS)
    return "\n".join([",".join(table.FIELDS), ",".join(cells)]).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected the columns"),
        (b"\xff\xfe\x00", "expected a CSV file"),
        (",".join(table.FIELDS).encode() + b"\na,b\n", "row 2: expected"),
        (_row_with(), "row 2: expected a time"),
        (_row_with(p50_ms="1", section_us="soon"), "row 2: expected a time in section_us, found 'soon'"),
    ],
)
def test_damaged_files_are_named(compared, tmp_path, capsys, content, said):
    (tmp_path / "bad.csv").write_bytes(content)
    table.write(tmp_path / "old.csv", [row("a", 1)])
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "old.csv"), str(tmp_path / "bad.csv")])
    error = capsys.readouterr().err
    assert "bad.csv" in error
    assert said in error


def test_speedups_and_their_mean():
    rows = [row("a", 2), row("p", 4, "peer"), row("a", 1, case="d"), row("p", 8, "peer", case="d")]
    found = table.speedups(rows, {"provider": "a"}, {"provider": "p"})
    assert found == {"c": 2.0, "d": 8.0}
    assert table.geometric_mean(found.values()) == pytest.approx(4)


def test_a_peer_in_another_precision_serves_if_there_is_no_other(compared):
    old = [row("a", 2, dtype="bfloat16"), row("peer", 4, "peer", dtype="float32")]
    code, printed = compared(old, [row("a", 3, dtype="bfloat16"), row("peer", 4, "peer", dtype="float32")])
    assert code == 1
    assert "0.5 -> 0.75 of peer (1.50x)" in printed


def test_rows_that_were_timed_alone_are_counted(compared):
    old = [row("a", 2), row("peer", 4, "peer"), row("alone", 2, case="other")]
    code, printed = compared(old, [row("a", 2), row("peer", 4, "peer"), row("alone", 9, case="other")])
    assert code == 0
    assert "1 rows were timed without a peer or a limit to compare them with" in printed
