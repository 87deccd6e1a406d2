import pytest

from bench.accuracy.rows import Rows, complete


def table(folder, **changes):
    columns = {"keys": ("name",), "settings": ("epochs",), "values": ("score",)}
    return Rows(folder / "deep" / "rows.csv", **columns | changes)


def jobs(*names, epochs="3"):
    return [{"name": name, "epochs": epochs} for name in names]


def length(job):  # of the module, so that a worker process finds it
    if job["name"] == "broken":
        raise RuntimeError("no score for this one")
    return [{"score": len(job["name"]) / 3}]


def test_rows_come_and_stay(tmp_path, capsys):
    rows = table(tmp_path)
    assert rows.read() == []
    with pytest.raises(RuntimeError, match="1 of 2 runs failed, first broken: no score"):
        complete(rows, jobs("broken", "a"), length, title="lengths")
    assert [row["name"] for row in rows.read()] == ["a"]  # one failure does not cost what comes after it
    complete(rows, jobs("a", "bcd", "ef"), length, title="lengths")
    found = sorted(tuple(row.values()) for row in rows.read())
    assert found == [("a", "3", "0.333333"), ("bcd", "3", "1"), ("ef", "3", "0.666667")]
    capsys.readouterr()
    complete(rows, jobs("a", "bcd", "ef"), None, title="lengths")  # nothing is left to measure
    assert "3 of 3 are in" in capsys.readouterr().out


@pytest.mark.slow  # two processes that load PyTorch
def test_several_workers(tmp_path):
    rows = table(tmp_path)
    complete(rows, jobs("a", "bcd", "ef"), length, title="lengths", workers=2)
    assert {row["name"]: row["score"] for row in rows.read()} == {
        "a": "0.333333",
        "bcd": "1",
        "ef": "0.666667",
    }


def test_a_job_with_other_settings_replaces_its_rows(tmp_path):
    rows = table(tmp_path)
    (job, other) = jobs("a", "b")
    rows.put(job, [{"score": 1}, {"score": 2}])
    rows.put(other, [{"score": 3}])
    (again,) = jobs("a", epochs="4")
    assert rows.finished(job)
    rows.put(again, [{"score": 0.5}])
    assert [tuple(row.values()) for row in rows.read()] == [("b", "3", "3"), ("a", "4", "0.5")]
    assert [rows.finished(job), rows.finished(again)] == [False, True]


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    table(tmp_path).put(jobs("a")[0], [{"score": 1}])
    with pytest.raises(ValueError, match="expected the columns name, epochs, spread"):
        table(tmp_path, values=("spread",)).read()
