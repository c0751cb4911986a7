//! Recorded loads, in the formats in which others publish theirs.
//!
//! | format | known by | what of it is used |
//! |---|---|---|
//! | ShareGPT JSON | an array of `{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}` | the words; an answer is as long as the recorded one |
//! | Mooncake JSON lines | `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}` | when, how long, and which blocks of 512 tokens prompts have in common |
//! | Azure CSV | a first line with `TIMESTAMP,ContextTokens,GeneratedTokens` | when and how long |
//!
//! A recorded answer's tokens are not recorded: four characters are taken for one. Requests that are too long for the
//! model, and conversations that do not begin with a person's question, are left out and counted.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer as _, IgnoredAny, SeqAccess, Visitor};

/// Characters of a token, about.
const CHARACTERS: usize = 4;
/// Bytes of one line.
const MAX_LINE: u64 = 16 << 20;
const AZURE: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// What was recorded, as far as it is used.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// Of the file.
    pub name: String,
    pub(super) conversations: Vec<Conversation>,
    /// All of them tell when they came.
    pub is_timed: bool,
    /// That were left out.
    pub left_out: usize,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Conversation {
    /// After the first one.
    pub(super) at: Duration,
    pub(super) turns: Vec<Turn>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Turn {
    pub(super) prompt: Prompt,
    /// Tokens of the answer.
    pub(super) output: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    /// So many tokens: those of the blocks, which others have, too, and of nothing else than them where there are any.
    Tokens {
        count: u32,
        blocks: Vec<u64>,
    },
}

/// How much of a trace is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    pub requests: usize,
    /// Of a conversation, at most.
    pub turns: usize,
    /// Tokens of a prompt and its answer, at most.
    pub longest: u32,
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        problem: String,
    },
    #[error(
        "{} is no trace: it begins neither like ShareGPT's JSON (`[`) nor like Mooncake's JSON lines (`{{`), nor with \
         Azure's columns TIMESTAMP,ContextTokens,GeneratedTokens",
        path.display()
    )]
    Format { path: PathBuf },
    #[error("{} has no request of at most {longest} tokens", path.display())]
    Empty { path: PathBuf, longest: u32 },
}

impl Trace {
    /// The first that are wanted, in their order.
    pub fn read(path: &Path, wanted: Wanted) -> Result<Self, TraceError> {
        let reading = |source| TraceError::Read {
            path: path.to_owned(),
            source,
        };
        let mut file = BufReader::new(File::open(path).map_err(reading)?);
        let begin = file.fill_buf().map_err(reading)?;
        let first = begin.iter().find(|byte| !byte.is_ascii_whitespace());
        let mut reader = Reader {
            path,
            wanted,
            requests: 0,
            trace: Self {
                name: path
                    .file_name()
                    .unwrap_or(path.as_os_str())
                    .to_string_lossy()
                    .into_owned(),
                ..Self::default()
            },
        };
        match first {
            Some(b'[') => reader.sharegpt(file)?,
            Some(b'{') => reader.mooncake(file)?,
            _ => reader.azure(file)?,
        }
        let mut trace = reader.trace;
        if trace.conversations.is_empty() {
            return Err(TraceError::Empty {
                path: path.to_owned(),
                longest: wanted.longest,
            });
        }
        trace.conversations.sort_by_key(|one| one.at);
        let first = trace
            .conversations
            .first()
            .map_or(Duration::ZERO, |it| it.at);
        for one in &mut trace.conversations {
            one.at -= first;
        }
        Ok(trace)
    }

    /// From the first to the last.
    pub fn lasts(&self) -> Duration {
        self.conversations
            .last()
            .map_or(Duration::ZERO, |one| one.at)
    }

    pub fn requests(&self) -> usize {
        self.conversations.iter().map(|one| one.turns.len()).sum()
    }
}

struct Reader<'a> {
    path: &'a Path,
    wanted: Wanted,
    requests: usize,
    trace: Trace,
}

#[derive(Deserialize)]
struct ShareGpt {
    #[serde(default)]
    conversations: Vec<Said>,
}

#[derive(Deserialize)]
struct Said {
    from: String,
    value: String,
}

#[derive(Deserialize)]
struct Mooncake {
    /// Milliseconds.
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

impl Reader<'_> {
    fn keep(&mut self, mut conversation: Conversation) {
        let room = self.wanted.requests - self.requests;
        conversation.turns.truncate(self.wanted.turns.min(room));
        self.requests += conversation.turns.len();
        match conversation.turns.is_empty() {
            true => self.trace.left_out += 1,
            false => self.trace.conversations.push(conversation),
        }
    }

    fn is_full(&self) -> bool {
        self.requests >= self.wanted.requests
    }

    fn fits(&self, input: u32, output: u32) -> bool {
        input > 0 && output > 0 && input.saturating_add(output) <= self.wanted.longest
    }

    fn sharegpt(&mut self, file: BufReader<File>) -> Result<(), TraceError> {
        let path = self.path.to_owned();
        let mut json = serde_json::Deserializer::from_reader(file);
        json.deserialize_seq(Conversations(self))
            .map_err(|error| TraceError::Line {
                path,
                line: error.line(),
                problem: format!("column {}: {error}", error.column()),
            })
    }

    /// Its turns up to the one that is too long, or has no answer.
    fn conversation(&self, said: ShareGpt) -> Conversation {
        let mut turns = Vec::new();
        let mut tokens: u32 = 0;
        let mut said = said.conversations.into_iter();
        while let (Some(question), Some(answer)) = (said.next(), said.next()) {
            let people = ["human", "user"].contains(&question.from.as_str());
            let input = estimate(&question.value).max(1);
            let output = estimate(&answer.value);
            tokens = tokens.saturating_add(input);
            if !people || !self.fits(tokens, output) {
                break;
            }
            tokens = tokens.saturating_add(output);
            let prompt = Prompt::Text(question.value);
            turns.push(Turn { prompt, output });
        }
        let at = Duration::ZERO;
        Conversation { at, turns }
    }

    fn mooncake(&mut self, file: BufReader<File>) -> Result<(), TraceError> {
        self.trace.is_timed = true;
        self.lines(file, |reader, line, text| {
            let recorded: Mooncake =
                serde_json::from_str(text).map_err(|error| reader.wrong(line, error))?;
            let at = Duration::try_from_secs_f64(recorded.timestamp / 1e3);
            let at = at.map_err(|error| reader.wrong(line, error))?;
            let (input, output) = (recorded.input_length, recorded.output_length);
            reader.timed(at, input, output, recorded.hash_ids);
            Ok(())
        })
    }

    fn azure(&mut self, file: BufReader<File>) -> Result<(), TraceError> {
        self.trace.is_timed = true;
        let mut columns: Option<[usize; 3]> = None;
        let path = self.path.to_owned();
        let format = || TraceError::Format { path: path.clone() };
        self.lines(file, |reader, line, text| {
            let fields: Vec<&str> = text.split(',').map(str::trim).collect();
            let Some(columns) = columns else {
                let place = |name: &str| fields.iter().position(|field| *field == name);
                let [Some(time), Some(input), Some(output)] = AZURE.map(place) else {
                    return Err(format());
                };
                columns = Some([time, input, output]);
                return Ok(());
            };
            let [time, input, output] =
                columns.map(|place| fields.get(place).copied().unwrap_or_default());
            let time = time.trim_end_matches("+00:00");
            let at = humantime::parse_rfc3339_weak(time)
                .map_err(|error| reader.wrong(line, format!("`{time}`: {error}")))?;
            let at = at.duration_since(std::time::SystemTime::UNIX_EPOCH);
            let count = |text: &str| {
                text.parse::<u32>()
                    .map_err(|error| reader.wrong(line, format!("`{text}`: {error}")))
            };
            let (input, output) = (count(input)?, count(output)?);
            reader.timed(at.unwrap_or_default(), input, output, Vec::new());
            Ok(())
        })?;
        match columns {
            Some(_) => Ok(()),
            None => Err(format()),
        }
    }

    fn timed(&mut self, at: Duration, count: u32, output: u32, blocks: Vec<u64>) {
        let prompt = Prompt::Tokens { count, blocks };
        let turns = match self.fits(count, output) {
            true => vec![Turn { prompt, output }],
            false => Vec::new(),
        };
        self.keep(Conversation { at, turns });
    }

    /// Until there are enough.
    fn lines(
        &mut self,
        file: BufReader<File>,
        mut read: impl FnMut(&mut Self, usize, &str) -> Result<(), TraceError>,
    ) -> Result<(), TraceError> {
        let mut file = file;
        let mut text = String::new();
        for line in 1.. {
            text.clear();
            let mut bounded = io::Read::take(&mut file, MAX_LINE);
            let length = bounded
                .read_line(&mut text)
                .map_err(|error| self.wrong(line, error))?;
            if length == 0 || self.is_full() {
                break;
            }
            if length as u64 == MAX_LINE {
                return Err(self.wrong(line, "a line this long is no request"));
            }
            if !text.trim().is_empty() {
                read(self, line, text.trim())?;
            }
        }
        Ok(())
    }

    fn wrong(&self, line: usize, problem: impl ToString) -> TraceError {
        TraceError::Line {
            path: self.path.to_owned(),
            line,
            problem: problem.to_string(),
        }
    }
}

/// Keeps what is wanted, and reads over the rest: files may be larger than memory.
struct Conversations<'r, 'a>(&'r mut Reader<'a>);

impl<'de> Visitor<'de> for Conversations<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<(), A::Error> {
        while !self.0.is_full() {
            let Some(said) = all.next_element::<ShareGpt>()? else {
                return Ok(());
            };
            let conversation = self.0.conversation(said);
            self.0.keep(conversation);
        }
        while all.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

fn estimate(text: &str) -> u32 {
    u32::try_from(text.chars().count().div_ceil(CHARACTERS)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
