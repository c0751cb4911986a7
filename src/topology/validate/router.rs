//! `[router]`: what its keys may hold, and what goes together.

use super::{Findings, NodeSettings, ProblemKind, Topology, bad};

pub(super) fn router(topology: &Topology, findings: &mut Findings<'_>) {
    let settings = &topology.router;
    for (index, origin) in settings.cors_origins.iter().enumerate() {
        if origin != "*" && !is_origin(origin) {
            let found = format!("the string {origin:?}");
            let instead =
                "a scheme and a host without a path, like \"https://chat.example.com\", or \"*\"";
            findings.add(
                &format!("router.cors_origins[{index}]"),
                bad(found, instead),
            );
        }
    }
    let port = settings.listen.port();
    if settings
        .metrics_listen
        .is_some_and(|metrics| metrics.port() == port)
    {
        let other = "[router] listen".to_owned();
        findings.add(
            "router.metrics_listen",
            ProblemKind::PortCollision { port, other },
        );
    }
    aliases(topology, findings);
}

fn aliases(topology: &Topology, findings: &mut Findings<'_>) {
    if findings.is_bad("served_model_name") || findings.is_bad("model") {
        return;
    }
    let served = topology.served_names();
    for (alias, model) in &topology.router.aliases {
        let key = format!("router.aliases.{alias}");
        if alias.trim().is_empty() {
            findings.add(
                "router.aliases",
                bad("a name without letters", "a name for a model"),
            );
        } else if served.contains(alias.as_str()) {
            let conflict = ProblemKind::Conflict {
                with: format!("the model that is served as {alias:?}"),
                instead: "leave it out: that is a model's own name".to_owned(),
            };
            findings.add_at_key(&key, conflict);
        } else if !served.contains(model.as_str()) && !serve_more(topology) {
            let known: Vec<_> = served.iter().map(|name| format!("{name:?}")).collect();
            let conflict = ProblemKind::Conflict {
                with: "the models here".to_owned(),
                instead: format!("{model:?} is none of them; write {}", known.join(" or ")),
            };
            findings.add(&key, conflict);
        }
    }
}

/// What nodes of others serve, and adapters, nodes say when they are asked.
fn serve_more(topology: &Topology) -> bool {
    let more = |node: &NodeSettings| !node.is_own() || node.flag("--lora-modules").is_some();
    topology.nodes.iter().any(more)
}

/// As a browser writes it: a scheme, a host, perhaps a port.
pub fn is_origin(text: &str) -> bool {
    let rest = ["http://", "https://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    rest.is_some_and(|host| {
        let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        !host.is_empty() && host.bytes().all(allowed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        for origin in [
            "http://localhost:3000",
            "https://chat.example.com",
            "https://[::1]:8",
        ] {
            assert!(is_origin(origin), "{origin}");
        }
        for other in [
            "",
            "*",
            "https://",
            "chat.example.com",
            "https://a/",
            "ftp://a",
            "https://a b",
        ] {
            assert!(!is_origin(other), "{other}");
        }
    }
}
