"""Flower's messages as bytes and back, bit for bit, through its public classes and without pickle.

The layout is that of ``worker.proto``: a head that names everything, and behind it the bytes of all arrays. The
generated files come from::

    python -m pip install grpcio-tools==1.70.0   # generated code runs with this grpcio and protobuf 5.29, and newer
    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedllm/node/worker.proto
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict
from google.protobuf.message import DecodeError

from fedllm.errors import WorkerError
from fedllm.node import worker_pb2 as pb

_LARGEST_SIGNED = 2**63 - 1


@dataclass(frozen=True)
class Packed:
    """Something to send: its head, and the bytes of its arrays in the order of the head."""

    head: bytes
    data: Sequence[bytes] = ()


@dataclass(frozen=True)
class Job:
    """A message for the node, as its worker gets it.

    Flower's own context has a state too; fedllm's client keeps none there, so it stays where it is.

    Attributes:
        action: the function of :mod:`fedllm.client`: ``describe``, ``train`` or ``evaluate``.
        message: content and type are those of Flower's message; the rest of the metadata is made up.
        context: run, node and their configurations.
        folder: working directory of the process that got the message; relative paths count from there.
        module_folders: where that process finds modules before all others.
    """

    action: str
    message: Message
    context: Context
    folder: str
    module_folders: tuple[str, ...]


def pack_job(action: str, message: Message, context: Context) -> Packed:
    """A message as it goes to the worker, with what this process knows of where its files and modules are."""
    records, data = _pack_records(message.content)
    job = pb.Job(
        action=action,
        message_type=message.metadata.message_type,
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=_pack_items(context.node_config),
        run_config=_pack_items(context.run_config),
        content=records,
        folder=os.getcwd(),
        module_folders=_module_folders(),
    )
    return Packed(job.SerializeToString(), data)


def unpack_job(head: bytes, data: memoryview) -> Job:
    """The job behind a head and the bytes of its arrays.

    Raises:
        WorkerError: the bytes are no job.
    """
    job = _parse(pb.Job, head)
    context = Context(
        run_id=job.run_id,
        node_id=job.node_id,
        node_config=_unpack_items(job.node_config),
        state=RecordDict(),
        run_config=_unpack_items(job.run_config),
    )
    # The documented constructors need the identity that Flower gives its own processes.
    arguments: dict[str, Any] = {"metadata": _metadata(job)}
    message = Message(_unpack_records(job.content, data), **arguments)
    return Job(job.action, message, context, job.folder, tuple(job.module_folders))


def pack_answer(content: RecordDict) -> Packed:
    """The content of a reply as it goes back."""
    records, data = _pack_records(content)
    return Packed(records.SerializeToString(), data)


def unpack_answer(head: bytes, data: memoryview) -> RecordDict:
    """The content of a reply.

    Raises:
        WorkerError: the bytes are no reply.
    """
    return _unpack_records(_parse(pb.Records, head), data)


def _metadata(job: pb.Job) -> Metadata:
    return Metadata(
        run_id=job.run_id,
        message_id="",
        src_node_id=0,
        dst_node_id=job.node_id,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=sys.float_info.max,
        message_type=job.message_type,
    )


def _module_folders() -> list[str]:
    """The folders that were put in front of the interpreter's own: Flower puts that of the app there."""
    own = {os.path.realpath(folder) for folder in (sys.prefix, sys.base_prefix)}
    found = []
    for entry in sys.path:
        if not entry:
            continue
        if any(os.path.realpath(entry).startswith(folder + os.sep) for folder in own):
            break
        found.append(os.path.abspath(entry))
    return found


def _parse(kind: Callable[[], Any], head: bytes) -> Any:
    parsed = kind()
    try:
        parsed.ParseFromString(head)
    except DecodeError as error:
        raise WorkerError(f"{len(head)} bytes that are no {type(parsed).__name__}: {error}") from error
    return parsed


def _pack_records(content: RecordDict) -> tuple[pb.Records, list[bytes]]:
    records, data = [], []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = []
            for key, array in record.items():
                arrays.append(_pack_array(key, array))
                data.append(array.data)
            records.append(pb.Record(name=name, arrays=pb.Arrays(arrays=arrays)))
        elif isinstance(record, MetricRecord):
            records.append(pb.Record(name=name, metrics=pb.Items(items=_pack_items(record))))
        else:
            records.append(pb.Record(name=name, config=pb.Items(items=_pack_items(record))))
    return pb.Records(records=records), data


def _pack_array(name: str, array: Array) -> pb.Array:
    return pb.Array(name=name, dtype=array.dtype, shape=array.shape, stype=array.stype, size=len(array.data))


def _unpack_records(records: pb.Records, data: memoryview) -> RecordDict:
    content, start = RecordDict(), 0
    for record in records.records:
        kind = record.WhichOneof("kind")
        if kind == "arrays":
            arrays = {}
            for array in record.arrays.arrays:
                end = start + array.size
                if end > len(data):
                    raise WorkerError(f"array {array.name!r} of record {record.name!r} is cut short")
                arrays[array.name] = Array(
                    array.dtype, tuple(array.shape), array.stype, bytes(data[start:end])
                )
                start = end
            content[record.name] = ArrayRecord(arrays)
        elif kind == "metrics":
            content[record.name] = MetricRecord(_unpack_items(record.metrics.items))
        elif kind == "config":
            content[record.name] = ConfigRecord(_unpack_items(record.config.items))
        else:
            raise WorkerError(f"record {record.name!r} is of no kind")
    if start != len(data):
        raise WorkerError(f"{len(data) - start} bytes belong to no array")
    return content


def _pack_items(values: Mapping[str, Any]) -> list[pb.Item]:
    return [
        pb.Item(name=name, list=pb.Scalars(values=map(_pack_scalar, value)))
        if isinstance(value, list)
        else pb.Item(name=name, scalar=_pack_scalar(value))
        for name, value in values.items()
    ]


def _unpack_items(items: Sequence[pb.Item]) -> dict[str, Any]:
    return {
        item.name: [_unpack_scalar(value) for value in item.list.values]
        if item.WhichOneof("kind") == "list"
        else _unpack_scalar(item.scalar)
        for item in items
    }


def _pack_scalar(value: float | str | bytes) -> pb.Scalar:
    match value:
        case bool():
            return pb.Scalar(truth=value)
        case int():
            return pb.Scalar(unsigned=value) if value > _LARGEST_SIGNED else pb.Scalar(signed=value)
        case float():
            return pb.Scalar(real=value)
        case str():
            return pb.Scalar(text=value)
        case _:
            return pb.Scalar(raw=value)


def _unpack_scalar(scalar: pb.Scalar) -> Any:
    kind = scalar.WhichOneof("kind")
    if kind is None:
        raise WorkerError("a value is missing")
    return getattr(scalar, kind)
