import pytest

from interference_guard.errors import StateError
from interference_guard.files import check_digest, digest


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
