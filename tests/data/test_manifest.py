"""The manifest's checksums name the file that is damaged."""

import io

import pytest
from rich.console import Console

from megagrow.data.manifest import verify
from megagrow.data.prepare import prepare
from megagrow.errors import InputError


def test_verify_names_the_file_that_differs(source, tmp_path, model_path):
    output = tmp_path / "out"
    manifest = prepare([str(source)], output, str(model_path), console=Console(file=io.StringIO()))
    assert verify(output) == manifest
    for name in manifest.files:
        content = (output / name).read_bytes()
        (output / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name}: checksum mismatch"):
            verify(output)
        (output / name).unlink()
        with pytest.raises(InputError, match=f"{name}: missing"):
            verify(output)
        (output / name).write_bytes(content)
    (output / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        verify(output)
