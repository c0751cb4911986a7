//! Who may use the endpoint: those who know one of the API keys, or everybody where there are none. And who may use
//! [`kv_ready`]: those who know the admin key, or nobody.
//!
//! ```text
//! start:    file, PEGAFLOW_API_KEYS ─▶ digests       (a file that cannot be used: no start)
//! running:  the file changed ─▶ read again ─▶ digests (cannot be used: the old ones stay, and it is logged)
//! request:  Authorization: Bearer KEY, or x-api-key ─▶ digest ─▶ compared with every one of them
//! ```
//!
//! Kept are SHA-256 digests. They are compared: how long that takes depends on no key that somebody could guess
//! letter by letter. A key that was accepted here is ours, and is not passed on to a node.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, header};
use sha2::{Digest, Sha256};

use super::error::RouterError;
use super::private_file::{Stamp, read_private};
use super::{Context, kv_ready};

/// Between two looks at the file.
const LOOK: Duration = Duration::from_secs(1);
/// What is shorter can be tried out.
const LEAST: usize = 8;
/// Whether the fleet serves, and its figures: for probes and scrapers, and no secrets.
const OPEN: [&str; 3] = ["/health", "/metrics", "/metrics/all"];
const DASHBOARD: &str = "/dashboard";

/// Why a source of keys cannot be used. Never names a key.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("cannot read the API keys in {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{source_name}, key {number}: {why}")]
    Unusable {
        source_name: String,
        /// The line of the file, or the place in the variable, from 1.
        number: usize,
        why: &'static str,
    },
    #[error(
        "{source_name} has no API key; write one on a line of its own, or leave the setting out to let everybody in"
    )]
    Empty { source_name: String },
}

/// Where keys come from.
#[derive(Debug, Clone, Copy)]
pub struct KeysSource<'a> {
    pub file: Option<&'a Path>,
    /// The name of a variable of pegaflow's own environment, with commas between the keys.
    pub variable: &'a str,
}

type Known = [u8; 32];

/// The keys that are accepted. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct ApiKeys {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: Option<PathBuf>,
    from_environment: Vec<Known>,
    known: RwLock<Vec<Known>>,
}

impl ApiKeys {
    /// Those in its file (one a line; `#` begins a comment line) and in its variable. `None`: neither is given.
    pub fn open(source: KeysSource<'_>) -> Result<Option<Self>, KeysError> {
        let KeysSource {
            file,
            variable: name,
        } = source;
        let variable = std::env::var_os(name).filter(|keys| !keys.is_empty());
        // What is not UTF-8 keeps a character that no key may have, and is refused: it must not let everybody in.
        let variable = variable.as_ref().map(|keys| keys.to_string_lossy());
        Self::from(file, name, variable.as_deref())
    }

    fn from(
        file: Option<&Path>,
        name: &str,
        variable: Option<&str>,
    ) -> Result<Option<Self>, KeysError> {
        if file.is_none() && variable.is_none() {
            return Ok(None);
        }
        let from_environment = match variable {
            Some(keys) => digests(keys.split(','), name)?,
            None => Vec::new(),
        };
        let mut known = from_environment.clone();
        if let Some(file) = file {
            known.extend(read(file)?);
        }
        let shared = Shared {
            file: file.map(Path::to_owned),
            from_environment,
            known: RwLock::new(known),
        };
        Ok(Some(Self {
            shared: Arc::new(shared),
        }))
    }

    /// Reads the file again whenever it changed, for ever.
    pub(super) async fn follow(self) {
        let Some(file) = self.shared.file.clone() else {
            return;
        };
        let mut seen = Stamp::of(&file);
        loop {
            tokio::time::sleep(LOOK).await;
            let now = Stamp::of(&file);
            if now == seen {
                continue;
            }
            seen = now;
            match read(&file) {
                Ok(keys) => {
                    tracing::info!(keys = keys.len(), file = %file.display(), "the API keys were read again");
                    self.replace(keys);
                }
                Err(error) => {
                    let error = anyhow::Error::new(error);
                    tracing::warn!("the API keys stay as they were: {error:#}");
                }
            }
        }
    }

    fn replace(&self, mut keys: Vec<Known>) {
        keys.extend(&self.shared.from_environment);
        let known = self.shared.known.write();
        *known.unwrap_or_else(PoisonError::into_inner) = keys;
    }

    pub(super) fn admit(&self, headers: &HeaderMap) -> bool {
        given(headers).is_some_and(|key| {
            let digest = Known::from(Sha256::digest(key));
            let known = self.shared.known.read();
            let known = known.unwrap_or_else(PoisonError::into_inner);
            // All of them, whichever it is.
            known
                .iter()
                .fold(false, |found, known| found | (*known == digest))
        })
    }
}

/// OpenAI's clients send the one, Anthropic's the other.
fn given(headers: &HeaderMap) -> Option<&[u8]> {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let api_key = || headers.get("x-api-key").map(|value| value.as_bytes());
    authorization.or_else(api_key).map(<[u8]>::trim_ascii)
}

fn read(file: &Path) -> Result<Vec<Known>, KeysError> {
    let text = read_private(file).map_err(|source| KeysError::Read {
        path: file.to_owned(),
        source,
    })?;
    let lines = text.lines().map(|line| {
        let line = line.trim();
        if line.starts_with('#') { "" } else { line }
    });
    digests(lines, &file.display().to_string())
}

fn digests<'a>(
    keys: impl Iterator<Item = &'a str>,
    source_name: &str,
) -> Result<Vec<Known>, KeysError> {
    let source_name = source_name.to_owned();
    let mut known = Vec::new();
    for (index, key) in keys.map(str::trim).enumerate() {
        let why = match key {
            "" => continue,
            key if key.len() < LEAST => Some("it is too short; take 8 characters at least"),
            key if !key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Some("it has a space or a character beyond ASCII, which no client can send")
            }
            _ => None,
        };
        if let Some(why) = why {
            return Err(KeysError::Unusable {
                source_name,
                number: index + 1,
                why,
            });
        }
        known.push(Sha256::digest(key).into());
    }
    if known.is_empty() {
        return Err(KeysError::Empty { source_name });
    }
    Ok(known)
}

pub(super) async fn check(
    State(cx): State<Arc<Context>>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    // It has a key of its own.
    let open = OPEN.contains(&path)
        || path.starts_with(DASHBOARD)
        || (path == kv_ready::PATH && cx.admin.is_some());
    match &cx.keys {
        Some(keys) if !open && !keys.admit(request.headers()) => {
            RouterError::Unauthorized.response_for(request.headers())
        }
        _ => next.run(request).await,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use http::HeaderValue;

    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_key_is_known_by_either_header() {
        let keys = ApiKeys::from(None, "KEYS", Some("first-key, second-key"))
            .unwrap()
            .unwrap();
        for headers in [
            with("authorization", "Bearer first-key"),
            with("authorization", "bearer  second-key"),
            with("x-api-key", "second-key"),
        ] {
            assert!(keys.admit(&headers), "{headers:?}");
        }
        for headers in [
            HeaderMap::new(),
            with("authorization", "Bearer"),
            with("authorization", "Bearer "),
            with("authorization", "Bearer first-ke"),
            with("authorization", "Bearer first-key2"),
            with("authorization", "Basic first-key"),
            with("x-api-key", "first-key, second-key"),
        ] {
            assert!(!keys.admit(&headers), "{headers:?}");
        }
    }

    #[test]
    fn without_a_source_everybody_may_come() {
        assert!(ApiKeys::from(None, "KEYS", None).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_used_is_told_by_its_place_and_not_by_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let refused = |text: &str| {
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            ApiKeys::from(Some(&file), "KEYS", None)
                .unwrap_err()
                .to_string()
        };
        assert!(refused("# mine\ngood-enough\nsecret\n").contains("key 3: it is too short"));
        assert!(refused("good-enough\nse cret-words\n").contains("key 2: it has a space"));
        assert!(!refused("se cret-words\n").contains("cret"));
        let beyond = ApiKeys::from(None, "KEYS", Some("good-enough,secret-\u{fffd}")).unwrap_err();
        assert!(
            beyond
                .to_string()
                .contains("key 2: it has a space or a character beyond ASCII")
        );
        assert!(refused("\n# none\n").contains("has no API key"));
        let missing = ApiKeys::from(Some(&folder.path().join("other")), "KEYS", None).unwrap_err();
        assert!(missing.to_string().contains("cannot read the API keys in"));
        let folder_error = ApiKeys::from(Some(folder.path()), "KEYS", None).unwrap_err();
        assert!(matches!(folder_error, KeysError::Read { .. }));
    }
}
