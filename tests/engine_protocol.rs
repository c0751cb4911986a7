//! The golden bytes that this side and the Python side must both produce and accept.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic
)]

use pegaflow::engine::protocol::{
    ClientMessage, MAX_FRAME, ProtocolError, ServerMessage, body_len, decode, encode_frame,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const GOLDEN: &str = include_str!("golden/protocol.json");

fn bytes_of(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2));
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

/// `{"hex": ".."}` stands for a byte string; serde takes a list of numbers for one.
fn plain(value: &Value) -> Value {
    match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("hex") => {
            bytes_of(map["hex"].as_str().unwrap()).into()
        }
        Value::Object(map) => map.iter().map(|(k, v)| (k.clone(), plain(v))).collect(),
        other => other.clone(),
    }
}

fn check<T>(name: &str, message: &Value, hex: &str)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let message: T = serde_json::from_value(plain(message)).unwrap();
    let body = bytes_of(hex);
    let frame = encode_frame(&message).unwrap();
    assert_eq!(frame[4..], body, "{name}: encoding");
    let prefix = frame[..4].try_into().unwrap();
    assert_eq!(body_len(prefix, MAX_FRAME).unwrap(), body.len());
    assert_eq!(decode::<T>(&body).unwrap(), message, "{name}: decoding");

    for cut in 0..body.len() {
        let cut = decode::<T>(&body[..cut]);
        assert!(cut.is_err(), "{name}: accepted a part: {cut:?}");
    }
    let mut longer = body;
    longer.push(0xc0);
    assert!(matches!(
        decode::<T>(&longer),
        Err(ProtocolError::Trailing(1))
    ));
}

#[test]
fn every_message_has_its_golden_bytes() {
    let golden: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
    let mut ops = std::collections::BTreeSet::new();
    for entry in &golden {
        let name = entry["name"].as_str().unwrap();
        let (message, hex) = (&entry["message"], entry["hex"].as_str().unwrap());
        let op = message["op"].as_str().unwrap();
        ops.insert(op.to_owned());
        match op {
            "welcome" | "refused" | "found" | "granted" => {
                check::<ServerMessage>(name, message, hex);
            }
            _ => check::<ClientMessage>(name, message, hex),
        }
    }
    let all = "abort commit damaged discard finish found granted hello loaded lookup open refused \
               release seal store welcome";
    assert_eq!(
        ops.iter().map(String::as_str).collect::<Vec<_>>().join(" "),
        all
    );
}

#[test]
fn what_is_not_the_protocol_is_refused() {
    let refused = [
        serde_json::json!({"op": "format_disk"}),
        serde_json::json!({"handoff": "h"}),
        serde_json::json!({"op": "seal"}),
        serde_json::json!({"op": "seal", "handoff": 1}),
        serde_json::json!({"op": "seal", "handoff": "h", "more": 1}),
        serde_json::json!({"op": "lookup", "seq": 1, "request": "r", "keys": "", "key_len": 8}),
        serde_json::json!({"op": "seal", "handoff": {"a": {"b": {"c": {"d": {"e": {}}}}}}}),
        serde_json::json!(["seal"]),
        serde_json::json!(1),
    ];
    for value in refused {
        let body = rmp_serde::to_vec_named(&value).unwrap();
        let message = decode::<ClientMessage>(&body);
        assert!(
            matches!(message, Err(ProtocolError::Decode(_))),
            "{value}: {message:?}"
        );
    }
    assert!(matches!(
        body_len([0, 0, 0, 1], MAX_FRAME - 1),
        Err(ProtocolError::TooLong { .. })
    ));
}
