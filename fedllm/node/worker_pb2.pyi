from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("opening", "head", "data", "started", "failure")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    opening: Opening
    head: bytes
    data: bytes
    started: Started
    failure: Failure
    def __init__(self, opening: _Optional[_Union[Opening, _Mapping]] = ..., head: _Optional[bytes] = ..., data: _Optional[bytes] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Opening(_message.Message):
    __slots__ = ("version", "head_bytes", "data_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    head_bytes: int
    data_bytes: int
    def __init__(self, version: _Optional[str] = ..., head_bytes: _Optional[int] = ..., data_bytes: _Optional[int] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "reason", "retry")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    retry: bool
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ..., retry: bool = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("action", "message_type", "run_id", "node_id", "node_config", "run_config", "content", "folder", "module_folders")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_CONFIG_FIELD_NUMBER: _ClassVar[int]
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    MODULE_FOLDERS_FIELD_NUMBER: _ClassVar[int]
    action: str
    message_type: str
    run_id: int
    node_id: int
    node_config: _containers.RepeatedCompositeFieldContainer[Item]
    run_config: _containers.RepeatedCompositeFieldContainer[Item]
    content: Records
    folder: str
    module_folders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, action: _Optional[str] = ..., message_type: _Optional[str] = ..., run_id: _Optional[int] = ..., node_id: _Optional[int] = ..., node_config: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., run_config: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., content: _Optional[_Union[Records, _Mapping]] = ..., folder: _Optional[str] = ..., module_folders: _Optional[_Iterable[str]] = ...) -> None: ...

class Records(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "arrays", "metrics", "config")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrays: Arrays
    metrics: Items
    config: Items
    def __init__(self, name: _Optional[str] = ..., arrays: _Optional[_Union[Arrays, _Mapping]] = ..., metrics: _Optional[_Union[Items, _Mapping]] = ..., config: _Optional[_Union[Items, _Mapping]] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("arrays",)
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    arrays: _containers.RepeatedCompositeFieldContainer[Array]
    def __init__(self, arrays: _Optional[_Iterable[_Union[Array, _Mapping]]] = ...) -> None: ...

class Array(_message.Message):
    __slots__ = ("name", "dtype", "shape", "stype", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stype: str
    size: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stype: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Items(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("name", "scalar", "list")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCALAR_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    name: str
    scalar: Scalar
    list: Scalars
    def __init__(self, name: _Optional[str] = ..., scalar: _Optional[_Union[Scalar, _Mapping]] = ..., list: _Optional[_Union[Scalars, _Mapping]] = ...) -> None: ...

class Scalars(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Scalar]
    def __init__(self, values: _Optional[_Iterable[_Union[Scalar, _Mapping]]] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("signed", "unsigned", "real", "truth", "text", "raw")
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    UNSIGNED_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TRUTH_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    signed: int
    unsigned: int
    real: float
    truth: bool
    text: str
    raw: bytes
    def __init__(self, signed: _Optional[int] = ..., unsigned: _Optional[int] = ..., real: _Optional[float] = ..., truth: bool = ..., text: _Optional[str] = ..., raw: _Optional[bytes] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("pid", "version", "started_at", "jobs_done", "jobs_failed", "jobs_waiting", "job", "busy_seconds", "resident_bytes", "device_bytes", "kept_bytes", "memory_limit", "models", "model_loads", "data_loads", "worked_seconds")
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    JOBS_DONE_FIELD_NUMBER: _ClassVar[int]
    JOBS_FAILED_FIELD_NUMBER: _ClassVar[int]
    JOBS_WAITING_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_LOADS_FIELD_NUMBER: _ClassVar[int]
    DATA_LOADS_FIELD_NUMBER: _ClassVar[int]
    WORKED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    version: str
    started_at: float
    jobs_done: int
    jobs_failed: int
    jobs_waiting: int
    job: str
    busy_seconds: float
    resident_bytes: int
    device_bytes: int
    kept_bytes: int
    memory_limit: int
    models: _containers.RepeatedScalarFieldContainer[str]
    model_loads: int
    data_loads: int
    worked_seconds: float
    def __init__(self, pid: _Optional[int] = ..., version: _Optional[str] = ..., started_at: _Optional[float] = ..., jobs_done: _Optional[int] = ..., jobs_failed: _Optional[int] = ..., jobs_waiting: _Optional[int] = ..., job: _Optional[str] = ..., busy_seconds: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., memory_limit: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ..., model_loads: _Optional[int] = ..., data_loads: _Optional[int] = ..., worked_seconds: _Optional[float] = ...) -> None: ...
