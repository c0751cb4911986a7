//! Where a node is that others started: `http://HOST:PORT` or `https://HOST:PORT`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Scheme, host and port of a node's OpenAI server; nothing else.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeUrl {
    https: bool,
    host: String,
    port: u16,
}

/// Why a text is not a node's URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("write http://HOST:PORT or https://HOST:PORT, like http://10.0.0.7:8000")]
    Form,
    #[error(
        "write http://HOST:PORT or https://HOST:PORT and no path; the router adds /v1/... itself"
    )]
    Path,
    #[error(
        "a user and password cannot be in the URL; a file has the node's key (`key_file`, --node-key-file)"
    )]
    Credentials,
}

impl NodeUrl {
    /// It speaks TLS.
    pub fn is_https(&self) -> bool {
        self.https
    }

    /// Host and port, as the header `Host` has them.
    pub fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// A name, or an IP address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for NodeUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let uri: http::Uri = text.parse().map_err(|_| UrlError::Form)?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(UrlError::Form),
        };
        let authority = uri.authority().ok_or(UrlError::Form)?;
        if authority.as_str().contains('@') {
            return Err(UrlError::Credentials);
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || text.contains('#') {
            return Err(UrlError::Path);
        }
        let port = authority.port_u16().filter(|port| *port != 0);
        let host = authority.host();
        let host = match host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
        {
            Some(inner) if inner.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) => inner,
            Some(_) => return Err(UrlError::Form),
            None => host,
        };
        match port {
            Some(port) if !host.is_empty() => Ok(Self {
                https,
                host: host.to_ascii_lowercase(),
                port,
            }),
            _ => Err(UrlError::Form),
        }
    }
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_a_port_are_taken_and_written_again() {
        for (text, host, written) in [
            ("http://10.0.0.7:8000", "10.0.0.7", "http://10.0.0.7:8000"),
            (
                "http://Node.local:80/",
                "node.local",
                "http://node.local:80",
            ),
            ("HTTP://[::1]:9000", "::1", "http://[::1]:9000"),
            (
                "HTTPS://node.local:443",
                "node.local",
                "https://node.local:443",
            ),
            ("https://[::1]:9000/", "::1", "https://[::1]:9000"),
        ] {
            let url: NodeUrl = text.parse().unwrap();
            assert_eq!((url.host(), url.to_string().as_str()), (host, written));
            assert_eq!(written.parse::<NodeUrl>().unwrap(), url);
            assert_eq!(url.is_https(), written.starts_with("https"));
        }
    }

    #[test]
    fn whatever_else_is_said_about_it_is_refused() {
        use UrlError::{Credentials, Form, Path};
        for (text, why) in [
            ("", Form),
            ("10.0.0.7:8000", Form),
            ("http://10.0.0.7", Form),
            ("http://10.0.0.7:0", Form),
            ("http://10.0.0.7:99999", Form),
            ("http://:8000", Form),
            ("http://[nonsense]:8000", Form),
            ("ftp://10.0.0.7:21", Form),
            ("https://10.0.0.7", Form),
            ("https://me@10.0.0.7:8000", Credentials),
            ("http://10.0.0.7:8000/v1", Path),
            ("http://10.0.0.7:8000/?a=b", Path),
            ("http://me:secret@10.0.0.7:8000", Credentials),
        ] {
            assert_eq!(text.parse::<NodeUrl>(), Err(why), "{text}");
        }
    }
}
