use super::*;

const ALL: Wanted = Wanted {
    requests: 100,
    turns: 1,
    longest: 10_000,
};

fn read(text: &str, wanted: Wanted) -> Result<Trace, TraceError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.trace");
    std::fs::write(&path, text).unwrap();
    Trace::read(&path, wanted)
}

#[test]
fn sharegpt_s_questions_are_asked_with_answers_as_long_as_theirs() {
    let text = r#" [
        {"id": "a", "conversations": [
            {"from": "human", "value": "What is a block?"}, {"from": "gpt", "value": "32 tokens, mostly."},
            {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "It is a multiple of 32."},
            {"from": "human", "value": "No answer"}]},
        {"id": "b", "conversations": [{"from": "gpt", "value": "I begin."}, {"from": "human", "value": "?"}]},
        {"id": "c"}
    ]"#;
    let trace = read(text, ALL).unwrap();
    assert_eq!(
        (trace.requests(), trace.left_out, trace.is_timed),
        (1, 2, false)
    );
    let turn = &trace.conversations[0].turns[0];
    assert_eq!(turn.prompt, Prompt::Text("What is a block?".to_owned()));
    assert_eq!(turn.output, 5);
    let both = read(text, Wanted { turns: 9, ..ALL }).unwrap();
    assert_eq!(both.conversations[0].turns.len(), 2);
    // The second turn has the first before it.
    let short = read(
        text,
        Wanted {
            turns: 9,
            longest: 12,
            ..ALL
        },
    )
    .unwrap();
    assert_eq!(short.conversations[0].turns.len(), 1);
    let few = read(
        text,
        Wanted {
            requests: 1,
            turns: 9,
            ..ALL
        },
    )
    .unwrap();
    assert_eq!(few.requests(), 1);
}

#[test]
fn mooncake_s_lines_tell_when_how_long_and_what_is_shared() {
    let text = "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 52, \"hash_ids\": [7, 8]}\n\
                {\"timestamp\": 1000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7, 9]}\n\
                {\"timestamp\": 4000, \"input_length\": 90000, \"output_length\": 5, \"hash_ids\": []}\n";
    let trace = read(text, ALL).unwrap();
    assert_eq!(
        (trace.requests(), trace.left_out, trace.is_timed),
        (2, 1, true)
    );
    let [first, second] = &trace.conversations[..] else {
        panic!("{trace:?}")
    };
    assert_eq!(
        (first.at, second.at),
        (Duration::ZERO, Duration::from_secs(2))
    );
    let blocks = vec![7, 9];
    assert_eq!(first.turns[0].prompt, Prompt::Tokens { count: 600, blocks });
}

#[test]
fn azure_s_columns_are_found_wherever_they_are() {
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n\
                2023-11-16 18:15:50.9951690,396,109\r\n";
    let trace = read(text, ALL).unwrap();
    assert_eq!(
        trace.conversations[1].at,
        Duration::from_nanos(4_314_579_000)
    );
    assert_eq!(trace.conversations[0].turns[0].output, 44);
    let text =
        "x,GeneratedTokens,ContextTokens,TIMESTAMP\n1,5,6,2024-05-10 00:00:00.009930+00:00\n";
    assert_eq!(read(text, ALL).unwrap().requests(), 1);
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    for (text, said) in [
        ("", "is no trace"),
        ("a,b\n1,2\n", "is no trace"),
        ("[{\"conversations\": 3}]", "a.trace:1: column"),
        ("[1", "a.trace:1: column"),
        ("{\"timestamp\": 1}\n", "a.trace:1: missing field"),
        (
            "{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 1}",
            "a.trace:1: ",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n",
            "a.trace:2: `yesterday`",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-1,2\n",
            "a.trace:2: `-1`",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n",
            "has no request of at most 10000 tokens",
        ),
        ("[]", "has no request"),
    ] {
        let error = read(text, ALL).unwrap_err().to_string();
        assert!(error.contains(said), "{text:?}: {error}");
    }
    let absent = Trace::read(Path::new("/nowhere/x"), ALL).unwrap_err();
    assert!(absent.to_string().contains("/nowhere/x"), "{absent}");
}
