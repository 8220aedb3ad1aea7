"""Files are whole or not there."""

import pytest

from granq_plugin.atomic import atomic_path, write_text


def test_a_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with atomic_path(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(type(error)) as caught, atomic_path(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    if isinstance(error, OSError):
        assert "cannot write" in str(caught.value) and "No space left" in str(caught.value)


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"), atomic_path(tmp_path / "no" / "a"):
        pytest.fail("work has begun")
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_path(tmp_path):
        pytest.fail("work has begun")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_path(target) as one, atomic_path(target) as other:
        assert one != other
        one.write_text("one"), other.write_text("other")
    assert target.read_text() == "one" and list(tmp_path.iterdir()) == [target]


def test_an_error_of_another_file_is_not_the_target_s(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "nowhere").read_text()
    assert "cannot write" not in str(caught.value) and not list(tmp_path.iterdir())
