//! What a node says that it serves: `GET /v1/models`.

use serde::Deserialize;

/// Bytes of the answer.
pub(super) const MAX_MODELS: usize = 1 << 20;
/// Names that are kept of one node.
const MAX_NAMES: usize = 256;

/// The names, as the node orders them: its model's own is the first, adapters follow. `None`: it is no such list.
pub(super) fn names(answer: &[u8]) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Models {
        data: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let models: Models = serde_json::from_slice(answer).ok()?;
    let names = models.data.into_iter().map(|model| model.id);
    Some(names.take(MAX_NAMES).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_order_and_are_bounded() {
        let answer = br#"{"object": "list", "data": [{"id": "qwen", "root": "/m"}, {"id": "a"}]}"#;
        assert_eq!(names(answer).unwrap(), ["qwen", "a"]);
        let many: Vec<_> = (0..300)
            .map(|id| serde_json::json!({"id": id.to_string()}))
            .collect();
        let many = serde_json::json!({"data": many}).to_string();
        assert_eq!(names(many.as_bytes()).unwrap().len(), 256);
        for other in [
            &b""[..],
            b"[]",
            b"{\"data\": [{\"id\": 1}]}",
            b"{\"error\": 1}",
        ] {
            assert_eq!(names(other), None);
        }
    }
}
