import json
from pathlib import Path

import msgspec
import pytest

from pegaflow_vllm import protocol
from pegaflow_vllm.protocol import Found, ProtocolError

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "protocol.json"


def golden() -> list[dict]:
    cases = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
    # A missing fixture must show as a failure, not as nothing to test.
    return cases or [{"name": "missing", "message": None, "hex": ""}]


@pytest.mark.parametrize("case", golden(), ids=lambda case: case["name"])
def test_bytes_are_those_of_the_engine(case):
    assert case["message"] is not None, f"no golden messages at {GOLDEN}"
    body = bytes.fromhex(case["hex"])
    answers = ("welcome", "refused", "found", "granted")
    decode = protocol.decode_answer if case["message"]["op"] in answers else protocol.decode_ask
    message = decode(body)
    assert protocol.frame(message)[protocol.LENGTH.size :] == body
    fields = msgspec.structs.asdict(message)
    for name, value in case["message"].items():
        if name != "op":
            assert fields[name] == (
                bytes.fromhex(value["hex"]) if isinstance(value, dict) and "hex" in value else value
            )


def test_every_message_has_golden_bytes():
    kinds = {kind.__struct_config__.tag for kind in protocol.Message.__subclasses__()}
    assert kinds == {case["message"]["op"] for case in golden()}


def test_a_frame_in_pieces_is_taken_once_it_is_whole():
    frame = protocol.frame(Found(seq=1, states=b"\1", refs=bytes(8)))
    buffer = bytearray()
    for byte in frame[:-1]:
        buffer.append(byte)
        assert protocol.take_body(buffer) is None
    buffer += frame[-1:] + frame
    assert protocol.take_body(buffer) == frame[4:]
    assert protocol.take_body(buffer) == frame[4:]
    assert not buffer


def test_an_oversized_frame_is_refused_before_it_is_read():
    with pytest.raises(ProtocolError):
        protocol.take_body(bytearray(protocol.LENGTH.pack(protocol.MAX_FRAME + 1)))


@pytest.mark.parametrize("body", [b"", b"\x81\xa2op\xa5bogus", b"\x81\xa2op\xa5found", b"\xc1"])
def test_a_broken_answer_is_a_protocol_error(body):
    with pytest.raises(ProtocolError):
        protocol.decode_answer(body)


def test_keys_of_unequal_length_are_refused():
    assert protocol.join_keys([b"ab", b"cd"]) == (b"abcd", 2)
    with pytest.raises(ProtocolError):
        protocol.join_keys([b"a", b"bcd"])
