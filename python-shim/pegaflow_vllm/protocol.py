"""Messages and frames of docs/protocol.md. Field order is the wire's."""

import struct

import msgspec
import numpy as np

VERSION = 3
MAX_FRAME = 16 * 1024 * 1024
LENGTH = struct.Struct("<I")

REF_BYTES = 8
REF_DTYPE = np.dtype([("slot", "<u4"), ("generation", "<u4")])
NO_SLOT = 0xFFFFFFFF
LOST_REF = struct.pack("<II", NO_SLOT, 0)
"""Stands for a chunk whose lease is gone: the worker reports its load as failed."""

MISS, HIT, PENDING = 0, 1, 2


class ProtocolError(Exception):
    """The peer sent something that docs/protocol.md does not allow."""


class Message(msgspec.Struct, tag_field="op", frozen=True, kw_only=True):
    pass


class Hello(Message, tag="hello"):
    version: int
    token: str
    node: str
    incarnation: int
    kind: str
    rank: int
    world: int
    replicated: bool
    namespace: dict[str, str]
    row_bytes: int
    pid: int


class Welcome(Message, tag="welcome"):
    epoch: int
    session: int
    slots: int
    stride: int
    rank_offset: int
    header_bytes: int
    arena_bytes: int
    checksum_offset: int


class Refused(Message, tag="refused"):
    code: str
    message: str


class Lookup(Message, tag="lookup"):
    seq: int
    request: str
    handoff: str | None
    keys: bytes
    key_len: int


class Found(Message, tag="found"):
    seq: int
    states: bytes
    refs: bytes


class Store(Message, tag="store"):
    seq: int
    request: str
    handoff: str | None
    keys: bytes
    key_len: int


class Granted(Message, tag="granted"):
    seq: int
    ok: bool
    new: bytes
    refs: bytes


class Open(Message, tag="open"):
    request: str
    handoff: str
    chunks: int


class Seal(Message, tag="seal"):
    handoff: str


class Abort(Message, tag="abort"):
    handoff: str


class Release(Message, tag="release"):
    request: str


class Finish(Message, tag="finish"):
    request: str


class Commit(Message, tag="commit"):
    refs: bytes
    bytes: int
    micros: int


class Discard(Message, tag="discard"):
    refs: bytes


class Loaded(Message, tag="loaded"):
    chunks: int
    bytes: int
    micros: int
    failed: int


class Damaged(Message, tag="damaged"):
    refs: bytes


Answer = Welcome | Refused | Found | Granted
"""What the engine sends."""

Ask = Hello | Lookup | Store | Open | Seal | Abort | Release | Finish | Commit | Discard | Loaded | Damaged
"""What this side sends."""

_encoder = msgspec.msgpack.Encoder()
_answers = msgspec.msgpack.Decoder(Answer)
_asks = msgspec.msgpack.Decoder(Ask)


def frame(message: Message) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"frame of {len(body)} bytes exceeds {MAX_FRAME}")
    return LENGTH.pack(len(body)) + body


def take_body(buffer: bytearray) -> bytes | None:
    """Removes one whole frame from the front of `buffer`, if it is there."""
    if len(buffer) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack_from(buffer)
    if size > MAX_FRAME:
        raise ProtocolError(f"frame of {size} bytes exceeds {MAX_FRAME}")
    end = LENGTH.size + size
    if len(buffer) < end:
        return None
    body = bytes(buffer[LENGTH.size : end])
    del buffer[:end]
    return body


def decode_answer(body: bytes) -> Answer:
    try:
        return _answers.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable answer: {error}") from error


def decode_ask(body: bytes) -> Ask:
    try:
        return _asks.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable request: {error}") from error


def join_keys(keys: list[bytes]) -> tuple[bytes, int]:
    """Concatenates keys of one length; returns the bytes and that length (0 for no keys)."""
    size = len(keys[0]) if keys else 0
    joined = b"".join(keys)
    if len(joined) != size * len(keys) or any(len(key) != size for key in keys):
        raise ProtocolError("keys of unequal length")
    return joined, size


def split_refs(refs: bytes) -> list[bytes]:
    return [refs[at : at + REF_BYTES] for at in range(0, len(refs), REF_BYTES)]
