use proptest::prelude::*;

use super::*;

fn head(text: &str) -> Result<Option<ReplyHead>, WireError> {
    reply_head(&mut BytesMut::from(text), &Method::POST)
}

fn whole(text: &str) -> ReplyHead {
    head(text).unwrap().unwrap()
}

/// What comes out when the body arrives in these pieces; `None`: it is malformed.
fn decode<'a>(
    mut body: Decoder,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> Option<(Vec<u8>, bool)> {
    let (mut read, mut out) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        read.extend_from_slice(piece);
        out.extend_from_slice(&body.take(&mut read).ok()?);
        assert!(read.is_empty() || body.is_end());
    }
    Some((out, body.is_end()))
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

#[test]
fn a_request_is_written_with_its_length() {
    let mut headers = HeaderMap::new();
    headers.insert("host", HeaderValue::from_static("h:1"));
    let path = "/v1/x?y=1";
    let post = request_head(&Method::POST, path, &headers, 0);
    assert_eq!(
        post,
        b"POST /v1/x?y=1 HTTP/1.1\r\nhost: h:1\r\ncontent-length: 0\r\n\r\n"
    );
    let get = request_head(&Method::GET, path, &headers, 0);
    assert_eq!(get, b"GET /v1/x?y=1 HTTP/1.1\r\nhost: h:1\r\n\r\n");
}

#[test]
fn a_head_says_how_the_body_ends_and_whether_the_connection_stays() {
    for (text, state, stays) in [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            State::Length(5),
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            State::End,
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n",
            State::Length(5),
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: x, Close\r\n\r\n",
            State::Length(5),
            false,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n",
            State::Length(5),
            false,
        ),
        (
            "HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\n\r\n",
            State::Length(5),
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
            State::Chunks(Chunk::size()),
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\ncontent-length: 5\r\n\r\n",
            State::Close,
            false,
        ),
        ("HTTP/1.1 200 OK\r\n\r\n", State::Close, false),
        ("HTTP/1.1 204 No Content\r\n\r\n", State::End, true),
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
            State::End,
            true,
        ),
    ] {
        let head = whole(text);
        assert_eq!((head.body.state, head.stays), (state, stays), "{text}");
    }
    let text = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n";
    let reply = reply_head(&mut BytesMut::from(text), &Method::HEAD);
    assert!(reply.unwrap().unwrap().body.is_end());
}

#[test]
fn what_is_no_head_is_refused_and_what_is_not_all_of_it_is_waited_for() {
    for text in [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
        "SSH-2.0-x\r\n",
    ] {
        assert!(head(text).is_err(), "{text}");
    }
    assert!(matches!(head("HTTP/1.1 200 OK\r\nx: y\r\n"), Ok(None)));
    let long = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(MAX_HEAD));
    assert!(matches!(head(&long), Err(WireError::HeadTooLarge)));
}

#[test]
fn chunks_that_are_read_together_come_out_as_one() {
    let body = "5\r\nhello\r\n1;x=\"y\"\r\n \r\nA\r\nworld, all\r\n0\r\nx: y\r\n\r\nHTTP/1.1";
    let mut read = BytesMut::from(body);
    let mut decoder = whole(CHUNKED).body;
    assert_eq!(decoder.take(&mut read).unwrap(), "hello world, all");
    assert!(decoder.is_end());
    // Not the body's: somebody else has to say what it is.
    assert_eq!(read, "HTTP/1.1");
}

#[test]
fn malformed_chunks_are_refused() {
    for body in [
        "\r\n",
        "g\r\n",
        "1\nx\r\n",
        "1\r\nxy",
        "1\r\nx\n",
        "fffffffffffffffff\r\n",
        "-1\r\n",
        " 1\r\n",
    ] {
        assert_eq!(
            decode(whole(CHUNKED).body, [body.as_bytes()].into_iter()),
            None,
            "{body:?}"
        );
    }
}

#[test]
fn a_body_without_a_length_ends_when_the_node_hangs_up() {
    let mut body = whole("HTTP/1.1 200 OK\r\n\r\n").body;
    assert_eq!(body.take(&mut BytesMut::from("abc")).unwrap(), "abc");
    assert!(!body.is_end());
    assert!(body.hung_up());
    let mut body = whole(CHUNKED).body;
    assert_eq!(body.take(&mut BytesMut::from("5\r\nab")).unwrap(), "ab");
    assert!(!body.hung_up());
}

proptest! {
    #[test]
    fn a_body_is_the_same_however_it_is_cut(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
        cuts in prop::collection::vec(1usize..20, 1..30),
    ) {
        let mut text = Vec::new();
        for chunk in &chunks {
            text.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            text.extend_from_slice(chunk);
            text.extend_from_slice(b"\r\n");
        }
        text.extend_from_slice(b"0\r\n\r\n");
        let mut rest = text.as_slice();
        let pieces: Vec<_> = cuts.iter().cycle().map_while(|cut| {
            let (piece, left) = rest.split_at((*cut).min(rest.len()));
            rest = left;
            (!piece.is_empty()).then_some(piece)
        }).collect();
        prop_assert_eq!(decode(whole(CHUNKED).body, pieces.into_iter()), Some((chunks.concat(), true)));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = reply_head(&mut BytesMut::from(bytes.as_slice()), &Method::POST);
        let _ = decode(whole(CHUNKED).body, bytes.chunks(7));
    }
}
