"""File records: serialized form of both algorithms, and verification."""

import hashlib

import pytest
import xxhash

from megagrow.common.checksums import READ_BYTES, FileRecord, check_file, problem_of
from megagrow.errors import InputError

CONTENT = bytes(range(256)) * (READ_BYTES // 256) + b"end"
SERIALIZED = {
    "xxh3_64": {"bytes": len(CONTENT), "xxh3_64": xxhash.xxh3_64_hexdigest(CONTENT)},
    "blake2b": {
        "size": len(CONTENT),
        "blake2b": hashlib.blake2b(CONTENT, digest_size=32).hexdigest(),
    },
}


@pytest.mark.parametrize("algorithm", SERIALIZED)
def test_record_round_trip(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    record = FileRecord.of(path, algorithm)
    assert list(record.to_json().items()) == list(SERIALIZED[algorithm].items())
    assert FileRecord.from_json(SERIALIZED[algorithm], algorithm) == record
    check_file(path, record)


@pytest.mark.parametrize(
    "values",
    [None, [], {}, {"bytes": 1}, {"bytes": "1", "xxh3_64": ""}, {"bytes": 1, "blake2b": ""}],
)
def test_other_values_are_refused(values):
    with pytest.raises(ValueError, match="xxh3_64"):
        FileRecord.from_json(values)


def test_damage_is_reported(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    record = FileRecord.of(path, "xxh3_64")
    path.write_bytes(CONTENT[:-1] + b"X")
    with pytest.raises(InputError, match="damaged, its checksum is"):
        check_file(path, record)
    path.write_bytes(CONTENT[:-1])
    assert "truncated or damaged" in str(problem_of(path, record))
    path.unlink()
    assert "is missing" in str(problem_of(path, record))
