//! `[kv] connector = "nixl"`: what it means, and what has no meaning beside it.

use std::net::IpAddr;
use std::path::Path;

use pegaflow::topology::{Connector, ProblemKind as Kind, Topology};

use crate::{PD, assert_one, cuda, one, problems};

const NIXL: &str = "[kv]\nconnector = \"nixl\"\n";

fn with(kv: &str, nodes: &str) -> String {
    cuda(&format!("{kv}{nodes}"))
}

fn parse(text: &str) -> Topology {
    Topology::parse(text, Path::new("t.toml")).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn it_reaches_the_router_and_listens_on_loopback_unless_told_otherwise() {
    let topology = parse(&with(NIXL, PD));
    assert_eq!(topology.kv.connector, Connector::Nixl);
    assert_eq!(topology.router.connector, Connector::Nixl);
    assert!(topology.kv.side_channel_host.is_loopback());
    let there = format!("{NIXL}side_channel_host = \"10.0.0.7\"\n");
    let topology = parse(&with(&there, PD));
    assert_eq!(topology.kv.side_channel_host, IpAddr::from([10, 0, 0, 7]));
    assert_eq!(parse(&cuda(PD)).router.connector, Connector::Pegaflow);
}

#[test]
fn keys_of_the_store_have_no_meaning_with_it_and_its_own_none_without() {
    for key in [
        "capacity = \"1GiB\"",
        "hugepages = \"on\"",
        "numa = \"none\"",
        "handoff_deadline = \"5s\"",
        "save_decoded = true",
        "verify = true",
    ] {
        let (line, column, found, kind) = one(&with(&format!("{NIXL}{key}\n"), PD));
        let name = key.split(' ').next().unwrap();
        assert_eq!((line, column, found), (5, 1, format!("kv.{name}")));
        assert!(matches!(kind, Kind::Conflict { with, .. } if with.contains("nixl")));
    }
    let text = with("[kv]\nside_channel_host = \"10.0.0.7\"\n", PD);
    assert_one!(text, 4:1 "kv.side_channel_host", Kind::Conflict { .. });
    for host in ["0.0.0.0", "::", "node-1", ""] {
        let text = with(&format!("{NIXL}side_channel_host = \"{host}\"\n"), PD);
        assert_one!(text, 5:21 "kv.side_channel_host", Kind::BadValue { .. });
    }
    let text = with("[kv]\nconnector = \"nccl\"\n", PD);
    assert_one!(text, 4:13 "kv.connector", Kind::BadValue { .. });
}

#[test]
fn nodes_of_others_may_be_partners_of_ours_and_ranks_may_differ() {
    let other = "[[node]]\nname = \"far\"\nrole = \"decode\"\nurl = \"http://10.0.0.8:8000\"\n";
    let mixed = format!("{PD}{other}");
    parse(&with(NIXL, &mixed));
    assert!(!problems(&cuda(&mixed)).is_empty());
    let alone = "[[node]]\nname = \"p\"\nrole = \"prefill\"\n";
    parse(&with(NIXL, &format!("{alone}{other}")));
    parse(&with(NIXL, &format!("{PD}tensor_parallel = 2\n")));
}

#[test]
fn the_side_channel_is_ours_to_set() {
    for name in ["VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"] {
        let text = with(NIXL, &format!("{PD}env = {{ {name} = \"1\" }}\n"));
        let all = problems(&text);
        assert!(matches!(&all[..], [(.., Kind::OwnedEnv { .. })]), "{all:?}");
    }
}
