//! HTTP/1.1 as the client of a node speaks it: the request's head, the reply's head and the reply's body, on bytes.
//! Nothing here waits or reads.
//!
//! ```text
//! reply ─▶ [1xx ...] head ─┬─ content-length ──▶ so many bytes ─▶ end, kept
//!                          ├─ chunked ─▶ size, data, ..., 0, trailers ─▶ end, kept
//!                          ├─ 204, 304, reply to HEAD ─▶ end, kept
//!                          └─ neither ──▶ all until the node hangs up
//! ```
//!
//! Of a reply the router needs the status, the type and the body. A general client keeps channels, maps and buffers
//! for each connection besides that: with ten thousand open streams they were most of the router's memory.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

/// Bytes of a reply's head, and of what is not data between two chunks.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 100;

/// Why what a node sent is no reply.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the head of its reply is no HTTP: {0}")]
    Head(#[from] httparse::Error),
    #[error("the head of its reply has more than {MAX_HEAD} bytes")]
    HeadTooLarge,
    #[error("its reply has the status {0}, which nobody asked for")]
    Status(u16),
    #[error("the length of its reply is not one number")]
    Length,
    #[error("a chunk of its reply is malformed")]
    Chunk,
}

/// The request's head; `path` is one that came as such, with its query. The length is left out where there is no body and none is expected.
pub(super) fn request_head(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    length: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| out.extend_from_slice(part));
    put(&[
        method.as_str().as_bytes(),
        b" ",
        path.as_bytes(),
        b" HTTP/1.1\r\n",
    ]);
    for (name, value) in headers {
        put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if length > 0 || matches!(*method, Method::POST | Method::PUT | Method::PATCH) {
        put(&[b"content-length: ", length.to_string().as_bytes(), b"\r\n"]);
    }
    put(&[b"\r\n"]);
    out
}

#[derive(Debug)]
pub(super) struct ReplyHead {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) body: Decoder,
    /// The node does not hang up after the body.
    pub(super) stays: bool,
}

/// Takes the head from the beginning of what was read; `None`: not all of it is there yet.
pub(super) fn reply_head(
    read: &mut BytesMut,
    method: &Method,
) -> Result<Option<ReplyHead>, WireError> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut reply = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = reply.parse(read)? else {
            return match read.len() {
                0..=MAX_HEAD => Ok(None),
                _ => Err(WireError::HeadTooLarge),
            };
        };
        let code = reply.code.unwrap_or_default();
        // Said before the reply, which follows.
        if (102..200).contains(&code) || code == 100 {
            read.advance(length);
            continue;
        }
        let status = StatusCode::from_u16(code).ok().filter(|_| code >= 200);
        let status = status.ok_or(WireError::Status(code))?;
        let found = Found::among(reply.headers)?;
        let body = match found.framing {
            _ if *method == Method::HEAD || matches!(code, 204 | 304) => State::End,
            Some(Framing::Chunked) => State::Chunks(Chunk::size()),
            Some(Framing::Length(0)) => State::End,
            Some(Framing::Length(length)) => State::Length(length),
            Some(Framing::Other) | None => State::Close,
        };
        let head = ReplyHead {
            status,
            content_type: found.content_type,
            stays: found.stays.unwrap_or(reply.version == Some(1)) && body != State::Close,
            body: Decoder { state: body },
        };
        read.advance(length);
        return Ok(Some(head));
    }
}

enum Framing {
    Length(u64),
    Chunked,
    Other,
}

/// What counts among a reply's headers.
#[derive(Default)]
struct Found {
    content_type: Option<HeaderValue>,
    framing: Option<Framing>,
    stays: Option<bool>,
}

impl Found {
    fn among(headers: &[httparse::Header<'_>]) -> Result<Self, WireError> {
        let mut found = Self::default();
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            let last = header.value.rsplit(|byte| *byte == b',').next();
            let last = last.unwrap_or_default().trim_ascii();
            if is("content-type") {
                found.content_type = HeaderValue::from_bytes(header.value).ok();
            } else if is("transfer-encoding") {
                // Stronger than a length.
                found.framing = Some(match last.eq_ignore_ascii_case(b"chunked") {
                    true => Framing::Chunked,
                    false => Framing::Other,
                });
            } else if is("content-length") {
                let length = number(header.value)?;
                match found.framing {
                    None => found.framing = Some(Framing::Length(length)),
                    Some(Framing::Length(other)) if other != length => {
                        return Err(WireError::Length);
                    }
                    Some(_) => {}
                }
            } else if is("connection") {
                let has = |word: &[u8]| {
                    let mut words = header.value.split(|byte| *byte == b',');
                    words.any(|given| given.trim_ascii().eq_ignore_ascii_case(word))
                };
                if has(b"close") {
                    found.stays = Some(false);
                } else if has(b"keep-alive") && found.stays.is_none() {
                    found.stays = Some(true);
                }
            }
        }
        Ok(found)
    }
}

fn number(text: &[u8]) -> Result<u64, WireError> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(text).ok().filter(|_| digits);
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or(WireError::Length)
}

/// Where a reply's body ends, and what of the bytes is data.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    state: State,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    /// So many bytes are missing.
    Length(u64),
    Chunks(Chunk),
    Close,
    #[default]
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size {
        size: u64,
        digits: u8,
    },
    /// After the digits, up to the line's end.
    Extension {
        size: u64,
        skipped: usize,
    },
    SizeEnd {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataCr,
    DataEnd,
    /// A line of them that has so many bytes so far.
    Trailers {
        line: usize,
        skipped: usize,
    },
    TrailersEnd {
        line: usize,
        skipped: usize,
    },
    End,
}

impl Decoder {
    pub(super) fn is_end(&self) -> bool {
        self.state == State::End
    }

    /// How many more bytes are known to come.
    pub(super) fn expected(&self) -> u64 {
        match self.state {
            State::Length(left) | State::Chunks(Chunk::Data { left }) => left,
            _ => 0,
        }
    }

    /// The node has hung up: whether that is the end of the body.
    pub(super) fn hung_up(&mut self) -> bool {
        if self.state == State::Close {
            self.state = State::End;
        }
        self.is_end()
    }

    /// All data at the beginning of what was read, several chunks in one. Empty: more has to be read, or it is the
    /// end.
    pub(super) fn take(&mut self, read: &mut BytesMut) -> Result<Bytes, WireError> {
        match &mut self.state {
            State::End => Ok(Bytes::new()),
            State::Close => Ok(read.split().freeze()),
            State::Length(left) => {
                let all = usize::try_from(*left).unwrap_or(usize::MAX);
                let data = read.split_to(all.min(read.len()));
                *left -= data.len() as u64;
                if *left == 0 {
                    self.state = State::End;
                }
                Ok(data.freeze())
            }
            State::Chunks(chunk) => {
                let data = chunk.take(read)?;
                if *chunk == Chunk::End {
                    self.state = State::End;
                }
                Ok(data)
            }
        }
    }
}

impl Chunk {
    const fn size() -> Self {
        Self::Size { size: 0, digits: 0 }
    }

    fn take(&mut self, read: &mut BytesMut) -> Result<Bytes, WireError> {
        // What was looked at, and how much data lies, moved together, at the beginning.
        let (mut seen, mut kept) = (0, 0);
        while *self != Self::End {
            if let Self::Data { left } = *self {
                if kept == 0 {
                    read.advance(std::mem::take(&mut seen));
                }
                let here = usize::try_from(left).unwrap_or(usize::MAX);
                let here = here.min(read.len() - seen);
                if here == 0 {
                    break;
                }
                if seen > kept {
                    read.copy_within(seen..seen + here, kept);
                }
                (seen, kept) = (seen + here, kept + here);
                *self = match left - here as u64 {
                    0 => Self::DataCr,
                    left => Self::Data { left },
                };
                continue;
            }
            let Some(byte) = read.get(seen) else { break };
            *self = self.after(*byte).ok_or(WireError::Chunk)?;
            seen += 1;
        }
        let mut data = read.split_to(seen);
        data.truncate(kept);
        Ok(data.freeze())
    }

    /// One byte that is not data. `None`: it must not be here.
    fn after(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Size { size, digits }, _) if byte.is_ascii_hexdigit() && digits < 15 => {
                let digit = u64::from(char::from(byte).to_digit(16)?);
                Self::Size {
                    size: size * 16 + digit,
                    digits: digits + 1,
                }
            }
            (Self::Size { size, digits: 1.. }, b'\r') => Self::SizeEnd { size },
            (Self::Size { size, digits: 1.. }, b';' | b' ' | b'\t') => {
                Self::Extension { size, skipped: 0 }
            }
            (Self::Extension { size, .. }, b'\r') => Self::SizeEnd { size },
            (Self::Extension { size, skipped }, _) if byte != b'\n' && skipped < MAX_HEAD => {
                Self::Extension {
                    size,
                    skipped: skipped + 1,
                }
            }
            (Self::SizeEnd { size: 0 }, b'\n') => Self::Trailers {
                line: 0,
                skipped: 0,
            },
            (Self::SizeEnd { size }, b'\n') => Self::Data { left: size },
            (Self::DataCr, b'\r') => Self::DataEnd,
            (Self::DataEnd, b'\n') => Self::size(),
            (Self::Trailers { line, skipped }, b'\r') => Self::TrailersEnd { line, skipped },
            (Self::Trailers { line, skipped }, _) if byte != b'\n' && skipped < MAX_HEAD => {
                Self::Trailers {
                    line: line + 1,
                    skipped: skipped + 1,
                }
            }
            (Self::TrailersEnd { line: 0, .. }, b'\n') => Self::End,
            (Self::TrailersEnd { skipped, .. }, b'\n') => Self::Trailers { line: 0, skipped },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests;
