//! A request body as its top-level keys; the values stay the client's bytes.
//!
//! A prompt can be megabytes long, and its text must reach both legs unchanged (the KV hashes
//! depend on it). So values are only delimited, never decoded.

use std::borrow::Cow;
use std::fmt;

use axum::body::{Body, HttpBody as _};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::RouterError;
use crate::plan::RouterPlan;

/// More top-level keys than this are refused: the search among them is linear.
const MAX_KEYS: usize = 512;

/// What a client sends, all of it, within the plan's limits.
pub(super) async fn read(body: Body, plan: &RouterPlan) -> Result<Bytes, RouterError> {
    let (limit, patience) = (plan.max_body, plan.body_timeout);
    if body.size_hint().lower() > limit as u64 {
        return Err(RouterError::BodyTooLarge { limit });
    }
    let collect = Limited::new(body, limit).collect();
    match tokio::time::timeout(patience, collect).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(RouterError::BodyTooLarge { limit })
        }
        Ok(Err(error)) => Err(RouterError::Body(error)),
        Err(_) => Err(RouterError::BodyTimeout(patience)),
    }
}

/// Why a body is not a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the body is not valid JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    #[error("the body must be a JSON object with at most {MAX_KEYS} keys: {0}")]
    NotAnObject(#[source] serde_json::Error),
}

/// The top-level keys of one JSON object, in order of first appearance. Of a key that appears
/// twice the last value counts, as for every JSON reader behind us.
#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    entries: Vec<(Cow<'a, str>, &'a RawValue)>,
    changed: bool,
}

impl<'a> Fields<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, BodyError> {
        serde_json::from_slice(body).map_err(|error| {
            if error.is_data() {
                BodyError::NotAnObject(error)
            } else {
                BodyError::NotJson(error)
            }
        })
    }

    /// The value's JSON text.
    pub(super) fn get(&self, key: &str) -> Option<&'a str> {
        self.iter()
            .find_map(|(name, raw)| (name == key).then_some(raw))
    }

    /// The value's JSON text, unless it is `null`.
    pub(super) fn present(&self, key: &str) -> Option<&'a str> {
        self.get(key).filter(|raw| *raw != "null")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &'a str)> {
        self.entries
            .iter()
            .map(|(key, raw)| (key.as_ref(), raw.get()))
    }

    /// The original bytes say something that [`Fields::iter`] does not: a key twice, or what was replaced.
    pub(super) fn differ(&self) -> bool {
        self.changed
    }

    /// Another value for a key that is there.
    pub(super) fn replace(&mut self, key: &str, value: &'a RawValue) {
        if let Some(entry) = self.entries.iter_mut().find(|(name, _)| *name == key) {
            entry.1 = value;
            self.changed = true;
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Fields::default();
                while let Some((Key(key), raw)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    let full = fields.entries.len() == MAX_KEYS;
                    match fields.entries.iter_mut().find(|(name, _)| *name == key) {
                        Some(entry) => {
                            entry.1 = raw;
                            fields.changed = true;
                        }
                        None if full => {
                            return Err(A::Error::custom("too many keys"));
                        }
                        None => fields.entries.push((key, raw)),
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// Writes a JSON object from keys and ready-made JSON values.
pub(super) struct ObjectWriter {
    out: Vec<u8>,
}

impl ObjectWriter {
    pub(super) fn with_capacity(bytes: usize) -> Self {
        let mut out = Vec::with_capacity(bytes);
        out.push(b'{');
        Self { out }
    }

    pub(super) fn field(&mut self, key: &str, raw: &str) {
        if self.out.len() > 1 {
            self.out.push(b',');
        }
        let plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
        if key.bytes().all(plain) {
            self.out.push(b'"');
            self.out.extend_from_slice(key.as_bytes());
            self.out.push(b'"');
        } else {
            let quoted = serde_json::Value::from(key).to_string();
            self.out.extend_from_slice(quoted.as_bytes());
        }
        self.out.push(b':');
        self.out.extend_from_slice(raw.as_bytes());
    }

    pub(super) fn finish(mut self) -> Bytes {
        self.out.push(b'}');
        self.out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_bytes() {
        let body = r#" { "a" : [1, 2 , {"x":"\u00e9é"}] ,"b":1.50,"c\n":null } "#;
        let fields = Fields::parse(body.as_bytes()).unwrap();
        assert_eq!(fields.get("a"), Some(r#"[1, 2 , {"x":"\u00e9é"}]"#));
        assert_eq!(fields.get("b"), Some("1.50"));
        assert_eq!(fields.get("c\n"), Some("null"));
        assert_eq!(fields.present("c\n"), None);
        assert!(!fields.differ());
    }

    #[test]
    fn the_last_of_two_equal_keys_counts() {
        let fields = Fields::parse(br#"{"n":1,"x":0,"\u006e":2}"#).unwrap();
        assert_eq!(fields.get("n"), Some("2"));
        assert_eq!(fields.iter().count(), 2);
        assert!(fields.differ());
    }

    #[test]
    fn a_value_that_is_replaced_stays_in_its_place() {
        let mut fields = Fields::parse(br#"{"a":1,"model":"x","b":2}"#).unwrap();
        let other: &RawValue = serde_json::from_str("\"y\"").unwrap();
        fields.replace("absent", other);
        assert!(!fields.differ());
        fields.replace("model", other);
        assert!(fields.differ());
        let all: Vec<_> = fields.iter().collect();
        assert_eq!(all, [("a", "1"), ("model", "\"y\""), ("b", "2")]);
    }

    #[test]
    fn what_is_no_object_is_told_from_what_is_no_json() {
        for body in ["[1]", "1", "\"x\"", "null"] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(matches!(error, BodyError::NotAnObject(_)), "{body}");
        }
        for body in [
            "",
            "{",
            "{\"a\":}",
            "{\"a\":1}x",
            "{\"a\":\"\u{1}\"}",
            "nul",
        ] {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert!(matches!(error, BodyError::NotJson(_)), "{body}");
        }
        let not_utf8 = Fields::parse(b"{\"a\":\"\xff\"}").unwrap_err();
        assert!(matches!(not_utf8, BodyError::NotJson(_)));
    }

    #[test]
    fn too_many_keys_are_refused() {
        let body = |keys: usize| {
            let entries: Vec<_> = (0..keys).map(|key| format!("\"{key}\":0")).collect();
            format!("{{{}}}", entries.join(","))
        };
        assert!(Fields::parse(body(MAX_KEYS).as_bytes()).is_ok());
        assert!(Fields::parse(body(MAX_KEYS + 1).as_bytes()).is_err());
    }

    #[test]
    fn the_writer_escapes_keys() {
        let mut writer = ObjectWriter::with_capacity(0);
        writer.field("a\"b", "1");
        writer.field("c", "[]");
        assert_eq!(writer.finish(), r#"{"a\"b":1,"c":[]}"#);
        assert_eq!(ObjectWriter::with_capacity(0).finish(), "{}");
    }
}
