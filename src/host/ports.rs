//! Ports that nodes can listen on.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tokio::net::TcpSocket;

use super::HostError;

/// Each node gets this many ports in a row: the first for HTTP, the rest for vLLM's own sockets
/// (`VLLM_PORT`), which it picks first and binds later.
pub const PORTS_PER_NODE: u16 = 32;

const FIRST: u16 = 10_240;
/// Where Linux begins to hand out outgoing ports by default.
const DEFAULT_EPHEMERAL: u16 = 32_768;

/// Ranges of [`PORTS_PER_NODE`] ports. No other pegaflow is given them as long as this lives: a node binds
/// its port seconds or minutes after it was chosen, and again after each death.
#[derive(Debug)]
pub struct PortRanges {
    firsts: Vec<u16>,
    _claims: Vec<Claim>,
}

impl PortRanges {
    /// The first port of each.
    pub fn firsts(&self) -> &[u16] {
        &self.firsts
    }
}

/// A range's name among the abstract sockets. Like ports they belong to a network namespace, and the
/// kernel takes the name back from a process that is killed.
#[derive(Debug)]
struct Claim {
    /// `None`: the kernel does not give such names here.
    _name: Option<UnixDatagram>,
}

impl Claim {
    /// `None`: another pegaflow has it.
    fn new(first: u16) -> Option<Self> {
        let name = format!("pegaflow-ports-{first}");
        let bound = SocketAddr::from_abstract_name(name)
            .and_then(|address| UnixDatagram::bind_addr(&address));
        match bound {
            Ok(socket) => Some(Self {
                _name: Some(socket),
            }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            Err(_) => Some(Self { _name: None }),
        }
    }
}

/// `count` ranges, bindable on 127.0.0.1 a moment ago, and none of them holding a port of `avoid`.
///
/// They lie below the ephemeral range, so that no outgoing connection takes one before the node
/// binds it, and start at a random place.
pub fn claim_ports(count: usize, avoid: &[u16]) -> Result<PortRanges, HostError> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let candidates = candidates(ephemeral_start(&range));
    let start = rand::random_range(0..candidates.len().max(1));
    let (firsts, claims): (Vec<u16>, Vec<Claim>) = candidates
        .iter()
        .cycle()
        .skip(start)
        .take(candidates.len())
        .copied()
        .filter(|first| {
            !avoid
                .iter()
                .any(|port| (*first..*first + PORTS_PER_NODE).contains(port))
        })
        .filter_map(|first| Some((first, Claim::new(first)?)))
        .filter(|(first, _)| is_free(*first) && is_free(*first + 1))
        .take(count)
        .unzip();
    if firsts.len() < count {
        return Err(HostError::Ports {
            wanted: count,
            found: firsts.len(),
        });
    }
    Ok(PortRanges {
        firsts,
        _claims: claims,
    })
}

/// One can listen there.
pub fn is_own(address: IpAddr) -> bool {
    // Only that it is another's counts: all else is seen when a node starts.
    match UdpSocket::bind((address, 0)) {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::AddrNotAvailable,
    }
}

fn ephemeral_start(range: &str) -> u16 {
    let start = range.split_whitespace().next();
    start
        .and_then(|start| start.parse().ok())
        .unwrap_or(DEFAULT_EPHEMERAL)
}

/// The starts of all ranges. Where the ephemeral range leaves too little room below it, it is
/// ignored: a port that is taken between now and the bind is seen, and the node restarted.
fn candidates(ephemeral: u16) -> Vec<u16> {
    const ROOM: u16 = 64 * PORTS_PER_NODE;
    let end = if ephemeral >= FIRST + ROOM {
        ephemeral
    } else {
        u16::MAX
    };
    (FIRST..=end - PORTS_PER_NODE)
        .step_by(usize::from(PORTS_PER_NODE))
        .collect()
}

/// Nobody listens there, and nobody has bound it for later, as vLLM does while it loads its model.
fn is_free(port: u16) -> bool {
    // Without SO_REUSEADDR, which would overlook the latter.
    let bound =
        TcpSocket::new_v4().and_then(|socket| socket.bind((Ipv4Addr::LOCALHOST, port).into()));
    bound.is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn all() -> Vec<u16> {
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        candidates(ephemeral_start(&range.unwrap_or_default()))
    }

    #[test]
    fn ports_are_apart_free_and_not_avoided() {
        let all = all();
        let (kept, rest) = all.split_at(all.len() / 2);
        let avoid: Vec<u16> = rest.iter().map(|port| port + 5).collect();
        let mut ports = claim_ports(8, &avoid).unwrap().firsts().to_vec();
        assert_eq!(ports.len(), 8);
        assert!(ports.iter().all(|port| kept.contains(port)), "{ports:?}");
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 8);

        // A port that somebody listens on is not offered. (One test: binding is not private.)
        let port = claim_ports(1, &[]).unwrap().firsts()[0];
        let others: Vec<u16> = all.iter().copied().filter(|other| *other != port).collect();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let none = || {
            let found = claim_ports(1, &others);
            assert!(matches!(
                found,
                Err(HostError::Ports {
                    wanted: 1,
                    found: 0
                })
            ));
        };
        none();
        drop(taken);
        // Nor one that somebody has bound for later.
        let bound = TcpSocket::new_v4().unwrap();
        bound.set_reuseaddr(true).unwrap();
        bound.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
        none();
        drop(bound);

        // Nor is one that was given to somebody, who has not bound it yet.
        let claimed = claim_ports(1, &others).unwrap();
        assert_eq!(claimed.firsts(), [port]);
        none();
        drop(claimed);
        assert_eq!(claim_ports(1, &others).unwrap().firsts(), [port]);
    }

    #[test]
    fn an_address_of_another_machine_is_told_from_an_own_one() {
        for (address, own) in [
            ("127.0.0.1", true),
            ("127.0.0.9", true),
            ("192.0.2.1", false),
        ] {
            assert_eq!(is_own(address.parse().unwrap()), own, "{address}");
        }
    }

    #[test]
    fn ranges_lie_below_the_ephemeral_ports_where_there_is_room() {
        assert!(
            candidates(32_768)
                .iter()
                .all(|port| port + PORTS_PER_NODE <= 32_768)
        );
        assert!(candidates(1024).len() > 1000);
        assert_eq!(ephemeral_start("20000\t60999\n"), 20_000);
        assert_eq!(ephemeral_start(""), DEFAULT_EPHEMERAL);
    }
}
