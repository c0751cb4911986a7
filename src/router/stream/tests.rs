use proptest::prelude::*;

use super::*;

fn all(chunks: &[&[u8]]) -> (Vec<u8>, Result<(), LegError>) {
    let mut splitter = Splitter::new(Last::Done);
    let mut out = Vec::new();
    for chunk in chunks {
        match splitter.push(Bytes::copy_from_slice(chunk)) {
            Ok(events) => out.extend_from_slice(&events.unwrap_or_default()),
            Err(error) => return (out, Err(error)),
        }
    }
    let end = splitter
        .finish()
        .map(|rest| out.extend_from_slice(&rest.unwrap_or_default()));
    (out, end)
}

#[test]
fn only_whole_events_go_out_and_the_end_must_be_done() {
    let whole = b"data: {\"a\":1}\n\ndata: [DONE]\n\n";
    assert!(matches!(all(&[whole]), (out, Ok(())) if out == whole));
    let (out, end) = all(&[b"data: 1\n\ndata: {\"cut"]);
    assert_eq!(out, b"data: 1\n\n");
    assert!(matches!(end, Err(LegError::Truncated)));
    assert!(matches!(all(&[b"data: 1\n\n"]).1, Err(LegError::Truncated)));
    assert!(matches!(all(&[]).1, Err(LegError::Truncated)));
}

#[test]
fn done_counts_only_at_a_line_start() {
    let quoted: &[u8] = b"data: \"data: [DONE]\n\n";
    assert!(matches!(all(&[quoted]).1, Err(LegError::Truncated)));
    assert!(all(&[b"data: 1\r\n\r\ndata: [DONE]\r\n\r\n"]).1.is_ok());
    assert!(all(&[b"data: 1\n\ndata: [DONE]"]).1.is_ok());
}

#[test]
fn an_event_without_an_end_is_bounded() {
    let mut splitter = Splitter::new(Last::Done);
    let chunk = Bytes::from(vec![b'x'; MAX_EVENT]);
    assert!(matches!(splitter.push(chunk), Ok(None)));
    let more = splitter.push(Bytes::from_static(b"x"));
    assert!(matches!(more, Err(LegError::TooLarge { .. })));
}

#[test]
fn an_error_as_the_first_event_is_seen() {
    assert_eq!(
        error_code(b"data: {\"error\": {\"message\":\"x\",\"code\":400}}\n\n"),
        Some(400)
    );
    assert_eq!(
        error_code(b"data: {\"error\":{\"code\":\"dead\"}}\n\n"),
        Some(0)
    );
    assert_eq!(
        error_code(b"data: {\"object\":\"error\",\"code\":500}\n\n"),
        Some(500)
    );
    assert_eq!(error_code(b"data: {\"id\":\"x\",\"error\":null}\n\n"), None);
    assert_eq!(error_code(b"data: {\"text\":\"\\\"error\\\"\"}\n\n"), None);
    assert_eq!(error_code(b": ping\n\n"), None);
}

proptest! {
    #[test]
    fn the_cuts_of_the_network_do_not_matter(
        texts in prop::collection::vec("[a-zé\u{1F600}]{0,12}", 0..6),
        crlf in any::<bool>(),
        cuts in prop::collection::vec(0usize..200, 0..8),
    ) {
        let eol = if crlf { "\r\n" } else { "\n" };
        let mut text: String = texts.iter().map(|t| format!("data: {t}{eol}{eol}")).collect();
        text.push_str(&format!("data: [DONE]{eol}{eol}"));
        let bytes = text.as_bytes();
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let chunks: Vec<_> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        let (out, end) = all(&chunks);
        prop_assert!(end.is_ok());
        prop_assert_eq!(out, bytes);
    }
}
