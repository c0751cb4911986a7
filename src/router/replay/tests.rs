use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::body::Fields;
use super::super::split::Endpoint;
use super::*;

fn recipe(endpoint: Endpoint, body: &Value) -> Option<Result<Recipe, Refusal>> {
    let body = body.to_string();
    Recipe::of(endpoint, &Fields::parse(body.as_bytes()).unwrap())
}

fn with(extra: Value) -> Value {
    let mut body =
        json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

fn transcript(endpoint: Endpoint, body: &Value) -> Transcript {
    Transcript::new(recipe(endpoint, body).unwrap().unwrap())
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

fn chunk(id: &str, choice: Value) -> Value {
    json!({"id": id, "object": "text_completion", "created": 7, "model": "m", "choices": [choice]})
}

fn asks(next: Next, model_len: Option<u64>) -> Option<Value> {
    let Next::Asks(continuation) = next else {
        panic!("it does not go on");
    };
    let body = continuation.body(model_len)?;
    Some(serde_json::from_slice(&body).unwrap())
}

fn refusal(next: Next) -> Refusal {
    match next {
        Next::Refused(refusal) => refusal,
        Next::Asks(_) | Next::Ends(_) => panic!("it goes on"),
    }
}

#[test]
fn what_goes_on_and_what_does_not() {
    let chat = |extra: Value| match recipe(Endpoint::Chat, &with(extra)) {
        None => "no stream",
        Some(Ok(_)) => "goes on",
        Some(Err(refusal)) => refusal.label(),
    };
    for (extra, expected) in [
        (json!({}), "goes on"),
        (json!({"stream": false}), "no stream"),
        (json!({"temperature": 0, "seed": 3}), "goes on"),
        (json!({"temperature": 0.5, "seed": 3}), "seed"),
        (json!({"seed": 3}), "seed"),
        (
            json!({"n": 1, "stop": [], "logprobs": false, "top_logprobs": 0}),
            "goes on",
        ),
        (
            json!({"n": 1, "stop": null, "tools": [], "presence_penalty": 0.0}),
            "goes on",
        ),
        (json!({"n": 2}), "choices"),
        (json!({"use_beam_search": true}), "choices"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"presence_penalty": 0.1}), "penalty"),
        (json!({"frequency_penalty": -1}), "penalty"),
        (json!({"bad_words": ["x"]}), "penalty"),
        (
            json!({"repetition_penalty": 1.2, "min_p": 0.1, "logit_bias": {"3": 1}}),
            "goes on",
        ),
        (json!({"stop": "x"}), "stop"),
        (json!({"stop": ["x"]}), "stop"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (
            json!({"tools": [{"type": "function"}], "tool_choice": "none"}),
            "goes on",
        ),
        (json!({"tool_choice": "required"}), "tools"),
        (json!({"response_format": {"type": "text"}}), "goes on"),
        (
            json!({"response_format": {"type": "json_object"}}),
            "guided",
        ),
        (json!({"structured_outputs": {"choice": ["a"]}}), "guided"),
        (json!({"guided_regex": "a"}), "guided"),
        (json!({"echo": true}), "echo"),
        (json!({"max_tokens": "many"}), "limit"),
        (json!({"vllm_xargs": {"a": 1}}), "unknown_field"),
        (json!({"something_new": 1}), "unknown_field"),
        (json!({"something_new": null}), "goes on"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
            "goes on",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "multimodal",
        ),
        (
            json!({"messages": [{"role": "user", "content": "say \"type\""}]}),
            "goes on",
        ),
    ] {
        assert_eq!(chat(extra.clone()), expected, "{extra}");
    }
    assert!(recipe(Endpoint::Other, &with(json!({}))).is_none());
}

#[test]
fn a_completion_goes_on_where_it_broke_off() {
    let body = json!({
        "model": "m", "stream": true, "prompt": "hello", "max_tokens": 10, "min_tokens": 4,
        "temperature": 0, "stream_options": {"include_usage": true}, "truncate_prompt_tokens": 5,
    });
    let mut transcript = transcript(Endpoint::Completions, &body);
    let first = chunk(
        "a",
        json!({"index": 0, "text": "x", "finish_reason": null, "prompt_token_ids": [1, 2, 3], "token_ids": [4]}),
    );
    let seen = transcript.take(event(&first));
    // As a node says it that is not asked for ids.
    let plain = chunk(
        "a",
        json!({"index": 0, "text": "x", "finish_reason": null, "prompt_token_ids": null, "token_ids": null}),
    );
    assert_eq!(read(&seen), [plain]);
    transcript.take(event(&chunk(
        "a",
        json!({"index": 0, "text": "yz", "finish_reason": null, "token_ids": [5, 6]}),
    )));

    let asked = asks(transcript.next(), None).unwrap();
    assert_eq!(
        asked,
        json!({
            "model": "m", "stream": true, "prompt": [1, 2, 3, 4, 5, 6], "max_tokens": 7, "min_tokens": 1,
            "temperature": 0, "stream_options": {"include_usage": true},
        })
    );

    let seen = transcript.take(event(&chunk(
        "b",
        json!({"index": 0, "text": "q", "finish_reason": null, "prompt_token_ids": [1, 2, 3, 4, 5, 6], "token_ids": [9]}),
    )));
    let plain = chunk(
        "a",
        json!({"index": 0, "text": "q", "finish_reason": null, "prompt_token_ids": null, "token_ids": null}),
    );
    assert_eq!(read(&seen), [plain]);
    let mut usage = chunk("b", json!({}));
    usage["choices"] = json!([]);
    usage["usage"] = json!({
        "prompt_tokens": 6, "completion_tokens": 1, "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 6},
    });
    let seen = transcript.take(event(&usage));
    let expected = json!({
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    });
    assert_eq!(read(&seen)[0]["usage"], expected);
    assert_eq!(
        transcript.take("data: [DONE]\n\n".into()),
        "data: [DONE]\n\n"
    );

    // Once more, from where the second one broke off.
    let asked = asks(transcript.next(), None).unwrap();
    assert_eq!(asked["prompt"], json!([1, 2, 3, 4, 5, 6, 9]));
    assert_eq!(asked["max_tokens"], 6);
    assert_eq!(asked.get("min_tokens"), None);
    asks(transcript.next(), None).unwrap();
    assert_eq!(refusal(transcript.next()), Refusal::TooOften);
}

fn read(events: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(events).unwrap();
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(|json| serde_json::from_str(json).unwrap())
        .collect()
}

#[test]
fn a_chat_goes_on_as_a_completion_and_stays_a_chat() {
    let mut transcript = transcript(Endpoint::Chat, &with(json!({"temperature": 0})));
    let chat = |choice: Value| {
        let mut chunk = chunk("a", choice);
        chunk["object"] = json!("chat.completion.chunk");
        chunk
    };
    let mut role = chat(json!({"index": 0, "delta": {"role": "assistant", "content": ""}}));
    role["prompt_token_ids"] = json!([1, 2]);
    let seen = transcript.take(event(&role));
    role["prompt_token_ids"] = Value::Null;
    assert_eq!(read(&seen), [role]);
    transcript.take(event(&chat(
        json!({"index": 0, "delta": {"content": "x", "reasoning": null, "tool_calls": []}, "finish_reason": null, "token_ids": [3]}),
    )));
    // No limit of its own: the model's.
    let next = transcript.next();
    let Next::Asks(continuation) = next else {
        panic!("it does not go on");
    };
    assert!(continuation.needs_model_len());
    let asked: Value = serde_json::from_slice(&continuation.body(Some(10)).unwrap()).unwrap();
    assert_eq!(asked["max_tokens"], 7);
    assert_eq!(asked["prompt"], json!([1, 2, 3]));
    assert_eq!(asked.get("messages"), None);

    let seen = transcript.take(event(&chunk(
        "b",
        json!({"index": 0, "text": "e", "finish_reason": null, "stop_reason": null, "prompt_token_ids": null, "token_ids": [8]}),
    )));
    let expected =
        json!({"index": 0, "delta": {"content": "e"}, "finish_reason": null, "token_ids": null});
    assert_eq!(read(&seen), [chat(expected)]);
    let seen = transcript.take(event(&chunk(
        "b",
        json!({"index": 0, "text": "é", "finish_reason": "stop", "stop_reason": null, "token_ids": [9]}),
    )));
    let expected = json!({"index": 0, "delta": {"content": "é"}, "finish_reason": "stop", "stop_reason": null, "token_ids": null});
    assert_eq!(read(&seen), [chat(expected)]);
    // Only the end was lost.
    let Next::Ends(end) = transcript.next() else {
        panic!("it is at its end");
    };
    assert_eq!(end, "data: [DONE]\n\n");
}

#[test]
fn a_model_without_room_is_not_asked() {
    for (model_len, goes_on) in [(None, false), (Some(3), false), (Some(4), true)] {
        let mut transcript = transcript(Endpoint::Chat, &with(json!({})));
        let mut first = chunk(
            "a",
            json!({"index": 0, "delta": {"content": "x"}, "token_ids": [3]}),
        );
        first["prompt_token_ids"] = json!([1, 2]);
        transcript.take(event(&first));
        assert_eq!(asks(transcript.next(), model_len).is_some(), goes_on);
    }
}

#[test]
fn a_lost_end_has_the_usage_that_was_asked_for_once() {
    let body = json!({
        "model": "m", "stream": true, "prompt": "p", "stream_options": {"include_usage": true},
    });
    let last = chunk(
        "a",
        json!({"index": 0, "text": "x", "finish_reason": "stop", "prompt_token_ids": [1], "token_ids": [2, 3]}),
    );
    let mut transcript = transcript(Endpoint::Completions, &body);
    transcript.take(event(&last));
    let Next::Ends(end) = transcript.next() else {
        panic!("it is at its end");
    };
    let end = String::from_utf8(end.to_vec()).unwrap();
    let usage = end.strip_suffix("data: [DONE]\n\n").unwrap();
    let usage = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
        == read(usage.as_bytes())[0]["usage"];
    assert!(usage, "{end}");
    transcript.take(r#"data: {"id":"a","choices":[],"usage":{}}"#.into());
    let Next::Ends(end) = transcript.next() else {
        panic!("it is at its end");
    };
    assert_eq!(end, "data: [DONE]\n\n");
}

#[test]
fn what_a_parser_made_does_not_go_on() {
    for delta in [
        json!({"reasoning": "hm"}),
        json!({"content": "x", "tool_calls": [{"index": 0}]}),
        json!({"content": "x", "something_new": 1}),
        json!({"content": null}),
        json!({}),
    ] {
        let mut transcript = transcript(Endpoint::Chat, &with(json!({})));
        let mut first = chunk("a", json!({"index": 0, "delta": delta, "token_ids": [3]}));
        first["prompt_token_ids"] = json!([1, 2]);
        transcript.take(event(&first));
        assert_eq!(refusal(transcript.next()), Refusal::Parsed, "{first}");
    }
}

#[test]
fn a_node_that_tells_no_ids_is_not_gone_on_from() {
    for first in [
        json!({"index": 0, "delta": {"content": "x"}}),
        json!({"index": 0, "delta": {"content": "x"}, "token_ids": null}),
    ] {
        let mut transcript = transcript(Endpoint::Chat, &with(json!({})));
        transcript.take(event(&chunk("a", first)));
        assert_eq!(refusal(transcript.next()), Refusal::NoIds);
    }
    let mut transcript = transcript(Endpoint::Chat, &with(json!({})));
    transcript.take(r#"data: {"id":"a","created":1,"model":"m","token_ids":[1,-2]}"#.into());
    assert_eq!(refusal(transcript.next()), Refusal::NoIds);
}

#[test]
fn ids_that_the_client_asked_for_stay() {
    let body = json!({"model": "m", "stream": true, "prompt": "p", "return_token_ids": true});
    let mut transcript = transcript(Endpoint::Completions, &body);
    let first = event(&chunk(
        "a",
        json!({"index": 0, "text": "x", "prompt_token_ids": [1], "token_ids": [2]}),
    ));
    assert_eq!(transcript.take(first.clone()), first);
    asks(transcript.next(), None).unwrap();
    let seen = transcript.take(event(&chunk(
        "b",
        json!({"index": 0, "text": "y", "prompt_token_ids": [1, 2], "token_ids": [3]}),
    )));
    let expected = chunk(
        "a",
        json!({"index": 0, "text": "y", "prompt_token_ids": null, "token_ids": [3]}),
    );
    assert_eq!(read(&seen), [expected]);
}

#[test]
fn text_that_looks_like_a_field_is_text() {
    let text = r#""token_ids":[1],"finish_reason":"stop" \"token_ids":[2]"#;
    let body = json!({"model": "m", "stream": true, "prompt": "p"});
    let mut transcript = transcript(Endpoint::Completions, &body);
    let told = chunk(
        "a",
        json!({"index": 0, "text": text, "prompt_token_ids": [7], "token_ids": [8]}),
    );
    let seen = transcript.take(event(&told));
    let expected = json!({"index": 0, "text": text, "prompt_token_ids": null, "token_ids": null});
    assert_eq!(read(&seen), [chunk("a", expected)]);
    assert_eq!(
        asks(transcript.next(), None).unwrap()["prompt"],
        json!([7, 8])
    );
}

proptest! {
    /// Whatever the order of the fields and the text: the ids are found, and nothing else is lost.
    #[test]
    fn ids_become_null_and_nothing_else_changes(
        text in ".{0,40}",
        ids in prop::collection::vec(any::<u32>(), 0..5),
        first in any::<bool>(),
        spaces in any::<bool>(),
    ) {
        let quoted = json!(text).to_string();
        let list = events::ids_json(ids.iter());
        let (colon, comma) = if spaces { ("\": ", ", ") } else { ("\":", ",") };
        let list = format!("\"token_ids\":{}{list}", if spaces { " " } else { "" });
        let rest = format!("\"text{colon}{quoted}");
        let inner = if first { format!("{list}{comma}{rest}") } else { format!("{rest}{comma}{list}") };
        let whole = Bytes::from(format!("data: {{\"choices\":[{{{inner}}}]}}\n\n"));
        let pieces = events::look(whole.clone(), false);
        prop_assert_eq!(&pieces.look.generated, &ids);
        prop_assert_eq!(read(&pieces.text), [json!({"choices": [{"text": text, "token_ids": null}]})]);
        prop_assert_eq!(events::look(whole.clone(), true).text, whole);
    }
}
