use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn prefill(body: &str) -> Value {
    let fields = Fields::parse(body.as_bytes()).unwrap();
    serde_json::from_slice(&prefill_body(&fields, &"h".into(), Connector::Pegaflow)).unwrap()
}

fn decode(body: &str) -> Value {
    let fields = Fields::parse(body.as_bytes()).unwrap();
    serde_json::from_slice(&decode_body(
        &fields,
        &"h".into(),
        None,
        (Connector::Pegaflow, false),
    ))
    .unwrap()
}

fn whole(body: &'static str) -> Bytes {
    let original = Bytes::from_static(body.as_bytes());
    whole_body(&Fields::parse(&original).unwrap(), &original, false)
}

fn reason(endpoint: Endpoint, body: &str) -> Option<WholeReason> {
    never_split(endpoint, &Fields::parse(body.as_bytes()).unwrap())
}

/// As sent by the OpenAI Python client for a streamed chat with tools.
const CHAT: &str = r#"{"messages":[{"role":"user","content":"Wie geht's? \u00fc\n"}],"model":"tiny","max_completion_tokens":64,"n":2,"response_format":{"type":"json_object"},"stop":["\n\n"],"stream":true,"stream_options":{"include_usage":true},"temperature":0,"logprobs":true,"top_logprobs":3,"tool_choice":{"type":"function","function":{"name":"f"}},"tools":[{"type":"function","function":{"name":"f"}}],"min_tokens":4,"chat_template_kwargs":{"enable_thinking":false},"cache_salt":"s","store":true,"kv_transfer_params":{"do_remote_decode":true}}"#;

#[test]
fn a_recorded_chat_keeps_its_prompt_and_loses_its_output_wishes() {
    assert_eq!(
        prefill(CHAT),
        json!({
            "messages": [{"role": "user", "content": "Wie geht's? ü\n"}],
            "model": "tiny", "max_completion_tokens": 1, "n": 1, "stream": false,
            "temperature": 0, "tool_choice": "none",
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"enable_thinking": false}, "cache_salt": "s", "store": false,
            "kv_transfer_params": {"pegaflow": {"handoff": "h", "leg": "prefill"}},
        })
    );
    let mut expected: Value = serde_json::from_str(CHAT).unwrap();
    expected["kv_transfer_params"] = json!({"pegaflow": {"handoff": "h", "leg": "decode"}});
    assert_eq!(decode(CHAT), expected);
}

#[test]
fn a_limit_is_added_only_where_none_is() {
    assert_eq!(prefill(r#"{"prompt":"x"}"#)["max_tokens"], 1);
    let both = prefill(r#"{"prompt":"x","max_tokens":9,"max_completion_tokens":null}"#);
    assert_eq!(
        (&both["max_tokens"], &both["max_completion_tokens"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(
        prefill(r#"{"max_completion_tokens":9}"#).get("max_tokens"),
        None
    );
}

#[test]
fn a_free_tool_choice_is_left_alone() {
    assert_eq!(prefill(r#"{"tool_choice":"auto"}"#)["tool_choice"], "auto");
    assert_eq!(
        prefill(r#"{"tool_choice":"required"}"#)["tool_choice"],
        "none"
    );
}

#[test]
fn what_is_never_split() {
    use Endpoint::{Chat, Completions};
    let cases = [
        (Completions, r#"{"prompt":"x"}"#, None),
        (Completions, r#"{"prompt":[1,2]}"#, None),
        (
            Completions,
            r#"{"prompt":["x"],"max_tokens":null,"n":3}"#,
            None,
        ),
        (
            Completions,
            r#"{"prompt":[[1,2]],"echo":false,"best_of":1}"#,
            None,
        ),
        (Chat, r#"{"messages":[],"max_tokens":2}"#, None),
        (
            Completions,
            r#"{"prompt":"x","max_tokens":1}"#,
            Some(WholeReason::OneToken),
        ),
        (
            Completions,
            r#"{"prompt":"x","max_tokens":"0"}"#,
            Some(WholeReason::OneToken),
        ),
        (
            Chat,
            r#"{"messages":[],"max_completion_tokens":1}"#,
            Some(WholeReason::OneToken),
        ),
        (
            Completions,
            r#"{"prompt":"x","echo":1}"#,
            Some(WholeReason::Echo),
        ),
        (
            Completions,
            r#"{"prompt":"x","prompt_logprobs":0}"#,
            Some(WholeReason::PromptLogprobs),
        ),
        (
            Completions,
            r#"{"prompt":"x","truncate_prompt_tokens":-1}"#,
            Some(WholeReason::Truncation),
        ),
        (
            Completions,
            r#"{"prompt":"x","use_beam_search":true}"#,
            Some(WholeReason::BeamSearch),
        ),
        (
            Completions,
            r#"{"prompt":"x","n":2,"best_of":1}"#,
            Some(WholeReason::BestOf),
        ),
        (
            Completions,
            r#"{"prompt":"x","best_of":2}"#,
            Some(WholeReason::BestOf),
        ),
        (
            Completions,
            r#"{"prompt":["x","y"]}"#,
            Some(WholeReason::Batch),
        ),
        (
            Completions,
            r#"{"prompt":[ [1],[2]]}"#,
            Some(WholeReason::Batch),
        ),
        (Completions, r#"{"prompt":[]}"#, Some(WholeReason::Batch)),
        (
            Completions,
            r#"{"prompt":null,"messages":[]}"#,
            Some(WholeReason::NoPrompt),
        ),
        (
            Completions,
            r#"{"prompt":"x","prompt_embeds":"AA"}"#,
            Some(WholeReason::NoPrompt),
        ),
        (Chat, r#"{"prompt":"x"}"#, Some(WholeReason::NoPrompt)),
    ];
    for (endpoint, body, expected) in cases {
        assert_eq!(reason(endpoint, body), expected, "{body}");
    }
}

#[test]
fn a_client_cannot_steer_kv() {
    let untouched = r#"{ "prompt":"x", "vllm_xargs":{"a":1} }"#;
    assert_eq!(whole(untouched), untouched);
    assert_eq!(
        whole(r#"{"prompt":"x","kv_transfer_params":{}}"#),
        r#"{"prompt":"x"}"#
    );
    let hidden = r#"{"prompt":"x","vllm_xargs":{"\u006bv_transfer_params":"y","a": 1}}"#;
    assert_eq!(whole(hidden), r#"{"prompt":"x","vllm_xargs":{"a":1}}"#);
    assert_eq!(decode(hidden)["vllm_xargs"], json!({"a": 1}));
    assert_eq!(prefill(hidden)["vllm_xargs"], json!({"a": 1}));
}

#[test]
fn a_key_that_comes_twice_is_sent_once() {
    assert_eq!(
        whole(r#"{"n":1,"prompt":"x","n":2}"#),
        r#"{"n":2,"prompt":"x"}"#
    );
}

fn any_json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just(" 1.50e+3".to_owned()),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<String>().prop_map(|text| Value::from(text).to_string()),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4)
                .prop_map(|v| format!("[ {} ]", v.join(" ,"))),
            prop::collection::vec((any::<String>(), inner), 0..4).prop_map(|entries| {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|(key, raw)| format!("{} : {raw}", Value::from(key.as_str())))
                    .collect();
                format!("{{{}}}", entries.join(", "))
            }),
        ]
    })
}

fn any_key() -> impl Strategy<Value = String> {
    const NAMES: [&str; 12] = [
        "prompt",
        "messages",
        "model",
        "stream",
        "max_tokens",
        "n",
        "stop",
        "tool_choice",
        "tools",
        "cache_salt",
        "kv_transfer_params",
        "vllm_xargs",
    ];
    prop_oneof![
        prop::sample::select(&NAMES[..]).prop_map(str::to_owned),
        any::<String>()
    ]
}

proptest! {
    #[test]
    fn legs_keep_every_untouched_value_byte_for_byte(
        entries in prop::collection::vec((any_key(), any_json()), 0..8)
    ) {
        let text: Vec<_> = entries
            .iter()
            .map(|(key, raw)| format!("{}:{raw}", Value::from(key.as_str())))
            .collect();
        let original = Bytes::from(format!("{{{}}}", text.join(",")));
        let fields = Fields::parse(&original).unwrap();
        let legs = [
            prefill_body(&fields, &"h".into(), Connector::Pegaflow),
            decode_body(&fields, &"h".into(), None, (Connector::Pegaflow, false)),
            whole_body(&fields, &original, false),
        ];
        for (index, leg) in legs.iter().enumerate() {
            let sent = Fields::parse(leg).unwrap();
            prop_assert!(!sent.differ());
            for (key, raw) in fields.iter() {
                let touched = steers_kv(key, raw)
                    || (index == 0 && !matches!(on_prefill(key, raw), OnPrefill::Keep));
                if !touched {
                    prop_assert_eq!(sent.get(key), Some(raw));
                }
            }
            let known = |key: &str| key == "max_tokens" || key == KV_PARAMS;
            for (key, _) in sent.iter() {
                prop_assert!(known(key) || fields.get(key).is_some());
            }
        }
        prop_assert!(Fields::parse(&legs[2]).unwrap().get(KV_PARAMS).is_none());
    }
}

#[test]
fn what_prefill_s_connector_says_reaches_decode_s_and_nothing_else_does() {
    let reply =
        br#"{"id":"x","choices":[],"kv_transfer_params":{"remote_block_ids":[1,2],"pegaflow":1}}"#;
    let params = kv_transfer_params(reply).unwrap();
    let body = br#"{"prompt":"a","kv_transfer_params":{"remote_host":"evil"}}"#;
    let fields = Fields::parse(body).unwrap();
    let sent = decode_body(
        &fields,
        &"h".into(),
        Some(&params),
        (Connector::Pegaflow, false),
    );
    let sent: Value = serde_json::from_slice(&sent).unwrap();
    let mark = json!({"handoff": "h", "leg": "decode"});
    let expected = json!({"remote_block_ids": [1, 2], "pegaflow": mark});
    assert_eq!(sent["kv_transfer_params"], expected);
    for silent in [
        &br#"{"kv_transfer_params":null}"#[..],
        br#"{"kv_transfer_params":[1]}"#,
        b"{}",
        b"not JSON",
    ] {
        assert_eq!(kv_transfer_params(silent), None);
    }
}

#[test]
fn nixl_s_prefill_is_told_to_keep_the_kv_and_decode_gets_what_it_said_as_it_is() {
    let body = br#"{"prompt":"a","max_tokens":9,"kv_transfer_params":{"remote_host":"evil"}}"#;
    let fields = Fields::parse(body).unwrap();
    let id = "h".into();
    let read = |sent: Bytes| serde_json::from_slice::<Value>(&sent).unwrap();
    let sent = read(prefill_body(&fields, &id, Connector::Nixl));
    let keep = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null,
    });
    assert_eq!(
        sent,
        json!({"prompt": "a", "max_tokens": 1, "kv_transfer_params": keep})
    );
    let said = r#"{"do_remote_prefill":true,"remote_block_ids":[[1,2]],"remote_port":1.50}"#;
    let nixl = (Connector::Nixl, false);
    let sent = decode_body(&fields, &id, Some(said), nixl);
    let parsed = Fields::parse(&sent).unwrap();
    assert_eq!(parsed.get(KV_PARAMS), Some(said));
    assert_eq!(parsed.get("max_tokens"), Some("9"));
    let sent = read(decode_body(&fields, &id, None, nixl));
    assert_eq!(sent, json!({"prompt": "a", "max_tokens": 9}));
    let sent = release_body(said);
    let parsed = Fields::parse(&sent).unwrap();
    assert_eq!(parsed.get(KV_PARAMS), Some(said));
    assert_eq!(parsed.get("prompt"), Some("[0]"));
}

#[test]
fn ids_are_asked_for_once() {
    let original = Bytes::from_static(br#"{"prompt":"x","return_token_ids":false}"#);
    let fields = Fields::parse(&original).unwrap();
    let expected = br#"{"prompt":"x","return_token_ids":true}"#;
    assert_eq!(whole_body(&fields, &original, true), &expected[..]);
    let sent = decode_body(&fields, &"h".into(), None, (Connector::Pegaflow, true));
    let sent: Value = serde_json::from_slice(&sent).unwrap();
    assert_eq!(sent["return_token_ids"], true);
    assert_eq!(whole_body(&fields, &original, false), original);
}
