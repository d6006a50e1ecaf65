"""All arrays of a record as one: a deployed Flower sends, stores and fetches every array by requests of its own.

An adapter has hundreds of arrays, each of them small. On the way between a server and a node that can unpack (it says
so when it describes itself) a record has a single array; whoever trains or aggregates never sees that.
"""

from __future__ import annotations

import json

from flwr.app import Array, ArrayRecord, RecordDict

from fedllm.errors import ReplyError

PACKED = "packed-arrays"
"""Key of a node's description: whether it takes packed records."""
_STYPE, _NAME = "fedllm.packed", "packed"
_HEAD = 8  # bytes that say how long the list of arrays is


def pack(content: RecordDict) -> RecordDict:
    """A copy of a message's content in which every record of several arrays has a single one."""
    return RecordDict(
        {
            name: _packed(record) if isinstance(record, ArrayRecord) and len(record) > 1 else record
            for name, record in content.items()
        }
    )


def unpack(content: RecordDict) -> bool:
    """Undo :func:`pack` in place; returns whether there was anything to undo.

    Raises:
        ReplyError: the list of arrays cannot be read, or does not fit the bytes.
    """
    packed = [
        name for name, record in content.items() if isinstance(record, ArrayRecord) and _is_packed(record)
    ]
    for name in packed:
        record = content[name]
        assert isinstance(record, ArrayRecord)
        content[name] = _unpacked(name, record[_NAME].data)
    return bool(packed)


def _is_packed(record: ArrayRecord) -> bool:
    return len(record) == 1 and _NAME in record and record[_NAME].stype == _STYPE


def _packed(record: ArrayRecord) -> ArrayRecord:
    entries = [
        [name, array.dtype, list(array.shape), array.stype, len(array.data)] for name, array in record.items()
    ]
    head = json.dumps(entries).encode()
    data = b"".join([len(head).to_bytes(_HEAD, "little"), head, *(array.data for array in record.values())])
    return ArrayRecord({_NAME: Array("uint8", (len(data),), _STYPE, data)})


def _unpacked(record_name: str, data: bytes) -> ArrayRecord:
    start = _HEAD + int.from_bytes(data[:_HEAD], "little")
    arrays: dict[str, Array] = {}
    try:
        entries = json.loads(data[_HEAD:start])
        if not isinstance(entries, list):
            raise ValueError("expected a list of arrays")
        for name, dtype, shape, stype, length in entries:
            if not (isinstance(name, str) and isinstance(length, int) and 0 <= length <= len(data) - start):
                raise ValueError(f"array {name!r} of {length!r} bytes")
            sizes = tuple(int(size) for size in shape)
            arrays[name] = Array(str(dtype), sizes, str(stype), data[start : start + length])
            start += length
    except (ValueError, TypeError) as error:
        raise ReplyError(f"{record_name!r} cannot be unpacked: {error}") from None
    if start != len(data):
        raise ReplyError(f"{record_name!r} has {len(data)} bytes, expected {start} by its list of arrays")
    return ArrayRecord(arrays)
