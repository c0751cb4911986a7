//! The sockets that the router listens on, and the secrets that it opens before it does.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::net::{TcpListener, ToSocketAddrs};

use super::Exit;
use crate::host;
use crate::router::{ApiKeys, KeysSource, Listeners, Tls};
use crate::topology::{ADMIN_KEY, API_KEYS, KvReady, RouterSettings};

/// Who may come in, and what is shown to them.
pub struct Credentials {
    pub keys: Option<ApiKeys>,
    pub admin: Option<ApiKeys>,
    pub tls: Option<Tls>,
}

impl Credentials {
    pub fn open(settings: &RouterSettings) -> Result<Self, Exit> {
        let open = |file: &Option<PathBuf>, variable| {
            let file = file.as_deref();
            let keys = ApiKeys::open(KeysSource { file, variable });
            keys.map_err(|error| Exit::Machine(error.into()))
        };
        let admin = open(&settings.admin_key_file, ADMIN_KEY)?;
        if settings.kv_ready == KvReady::Callback && admin.is_none() {
            return Err(Exit::Usage(anyhow::anyhow!(
                "KV that is announced at /kv_ready needs an admin key: set {ADMIN_KEY}, or name a file that holds one"
            )));
        }
        let tls = settings.tls.as_ref().map(Tls::open).transpose();
        Ok(Self {
            keys: open(&settings.api_keys, API_KEYS)?,
            admin,
            tls: tls.map_err(|error| Exit::Machine(error.into()))?,
        })
    }
}

/// `clients` and `metrics` are told by the names that a person wrote for them.
pub async fn listen(
    clients: impl ToSocketAddrs,
    clients_name: impl Display,
    metrics: Option<SocketAddr>,
) -> Result<Listeners, Exit> {
    let clients = bind(clients, clients_name).await?;
    let metrics = match metrics {
        Some(addr) => Some(bind(addr, format_args!("{addr} for metrics")).await?),
        None => None,
    };
    Ok(Listeners { clients, metrics })
}

async fn bind(addr: impl ToSocketAddrs, name: impl Display) -> Result<TcpListener, Exit> {
    TcpListener::bind(addr).await.map_err(|error| {
        let what = format!("cannot listen on {name}; is another server there?");
        Exit::Machine(anyhow::Error::new(error).context(what))
    })
}

/// A request may have three connections: the client's, and one to a node for each leg.
const FILES_PER_REQUEST: usize = 3;

/// Takes as many files as this process may have, and says if that is too few.
pub fn take_files(settings: &RouterSettings) {
    let max_in_flight = settings.max_in_flight;
    let wanted = max_in_flight.saturating_mul(FILES_PER_REQUEST);
    match host::raise_open_files() {
        Ok(limit) if limit < wanted as u64 => tracing::warn!(
            limit,
            max_in_flight,
            "the limit of open files (ulimit -Hn) is below {FILES_PER_REQUEST} for each request; raise it, or \
             lower max_in_flight"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
}
