import pytest

from interference_guard.errors import StateError
from interference_guard.files import check_digest, digest, replacing


def test_a_file_is_known_by_its_size_and_digest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    details = {"tensor_bytes": 3, "tensor_sha256": digest(path)}
    check_digest(path, details, "Copy it again.")
    for other in (b"on", b"two"):
        path.write_bytes(other)
        with pytest.raises(
            StateError, match=rf"it has {len(other)} bytes where 3 .* were written\. Copy it again"
        ):
            check_digest(path, details, "Copy it again.")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail():
        with replacing(path) as new:
            new.write_text("aft")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "before"
    with replacing(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
