"""The logs: last lines, and what comes, also after a rotation."""

from pathlib import Path

from infra.stack import journal


def test_the_last_lines(tmp_path: Path) -> None:
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    one.write_text("a\nb\nc\n", encoding="utf-8")
    two.write_bytes(b"\xff broken\n")
    files = {"one": one, "two": two, "none": tmp_path / "none.log"}
    assert list(journal.last(files, 2)) == [("one", "b"), ("one", "c"), ("two", "� broken")]
    assert list(journal.last(files, 0)) == []


def test_what_comes_is_followed_over_a_rotation(tmp_path: Path) -> None:
    file = tmp_path / "one.log"
    file.write_text("old\n", encoding="utf-8")
    tail = journal.Tail("one", file)
    assert tail.fresh() == []
    with file.open("a", encoding="utf-8") as log:
        log.write("new\nhalf")
    assert tail.fresh() == ["new"]
    with file.open("a", encoding="utf-8") as log:
        log.write(" and half\n")
    assert tail.fresh() == ["half and half"]
    file.rename(tmp_path / "one.log.1")
    assert tail.fresh() == []
    file.write_text("after\n", encoding="utf-8")
    assert tail.fresh() == ["after"]
