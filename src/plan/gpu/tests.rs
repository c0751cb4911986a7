use proptest::prelude::*;

use super::*;
use crate::fleet::Role;
use crate::host::{HugePages, Link, MemoryFacts, NumaNode};
use crate::plan::tests::{node, replicas_of};
use crate::topology::{NodeSettings, PciAddress};

const GB: u64 = 1 << 30;

fn gpu(index: u32, free: u64) -> Gpu {
    Gpu {
        index,
        uuid: format!("GPU-{index}"),
        pci: u8::try_from(index + 1).ok().map(|bus| PciAddress {
            domain: 0,
            bus,
            device: 0,
        }),
        name: "H200".to_owned(),
        memory_total: Some(100 * GB),
        memory_free: Some(free * GB),
        ..Gpu::default()
    }
}

fn host_of(gpus: &[Gpu]) -> HostSnapshot {
    HostSnapshot {
        cpus: (0..8).collect(),
        gpus: gpus.to_vec(),
        ..HostSnapshot::default()
    }
}

/// Eight GPUs on two NUMA nodes of four cores; NVLink within a half, and one PCIe switch for each two.
fn two_halves() -> HostSnapshot {
    let mut host = host_of(&(0..8).map(|index| gpu(index, 99)).collect::<Vec<_>>());
    for gpu in &mut host.gpus {
        gpu.numa_node = Some(gpu.index / 4);
    }
    for a in 0..8u32 {
        for b in a + 1..8 {
            let link = match (a / 4 == b / 4, a / 2 == b / 2) {
                (_, true) => Link::NvLink,
                (true, false) => Link::HostBridge,
                (false, _) => Link::System,
            };
            host.gpu_paths.push(GpuPath { a, b, link });
        }
    }
    let numa = |id: u32, cpus: &[usize]| NumaNode {
        id,
        cpus: cpus.to_vec(),
        available: 100 * GB,
        hugepages: HugePages::default(),
    };
    host.memory = MemoryFacts {
        numa: vec![numa(0, &[0, 1, 2, 3]), numa(1, &[4, 5, 6, 7])],
        ..MemoryFacts::default()
    };
    host
}

fn topology(kv: &str) -> Topology {
    let text = format!("model = \"o/n\"\n[kv]\n{kv}\n[[node]]\nrole = \"unified\"\n");
    Topology::parse(&text, std::path::Path::new("t.toml")).unwrap()
}

fn pinned_in(
    kv: &str,
    nodes: &[NodeSettings],
    host: &HostSnapshot,
) -> Result<(Vec<Placement>, Vec<String>), Vec<PlanProblem>> {
    let mut found = Found::default();
    let topology = topology(kv);
    let placements = pin(&topology, &replicas_of(nodes), host, &mut found);
    match found.problems() {
        problems if problems.is_empty() => {
            Ok((placements, found.into_warnings(&topology).unwrap()))
        }
        problems => Err(problems),
    }
}

fn pinned(nodes: &[NodeSettings], gpus: &[Gpu]) -> Result<Vec<Vec<u32>>, Vec<PlanProblem>> {
    let (placements, _) = pinned_in("", nodes, &host_of(gpus))?;
    Ok(placements.into_iter().map(|p| p.gpus).collect())
}

fn listed(name: &str, selectors: &[GpuSelector]) -> NodeSettings {
    let mut node = node(name);
    node.tensor_parallel = u32::try_from(selectors.len()).unwrap();
    node.gpus = GpuRequest::Listed(selectors.to_vec());
    node
}

fn at(name: &str, index: u32) -> NodeSettings {
    listed(name, &[GpuSelector::Index(index)])
}

fn of(role: Role, ranks: u32) -> NodeSettings {
    let mut node = node(&role.to_string());
    node.role = role;
    node.tensor_parallel = ranks;
    node
}

fn sharing(name: &str, fraction: f64) -> NodeSettings {
    let mut node = node(name);
    node.share_gpus = true;
    node.gpu_memory_fraction = fraction;
    node
}

#[test]
fn auto_takes_the_freest_and_leaves_the_named_ones() {
    let gpus = [gpu(0, 95), gpu(1, 100), gpu(2, 98), gpu(3, 10), gpu(4, 92)];
    let nodes = [
        node("auto"),
        listed("uuid", &[GpuSelector::Uuid("GPU-1".to_owned())]),
        at("index", 0),
        listed("address", &[GpuSelector::Pci("05:00.0".parse().unwrap())]),
    ];
    assert_eq!(
        pinned(&nodes, &gpus).unwrap(),
        [vec![2], vec![1], vec![0], vec![4]]
    );
}

#[test]
fn a_demanding_node_gets_the_gpu_that_only_it_needs() {
    let gpus = [gpu(0, 95), gpu(1, 50)];
    let mut modest = node("modest");
    modest.gpu_memory_fraction = 0.4;
    assert_eq!(
        pinned(&[modest, node("demanding")], &gpus).unwrap(),
        [vec![1], vec![0]]
    );
}

#[test]
fn an_assignment_is_found_where_the_greedy_choice_finds_none() {
    let mixed = [(1000, 100), (150, 60), (100, 65), (30, 28)];
    let gpus = (0..).zip(mixed).map(|(index, (total, free))| Gpu {
        memory_total: Some(total * GB),
        ..gpu(index, free)
    });
    let wish = |name, fraction, free: u64| NodeSettings {
        gpu_memory_fraction: fraction,
        gpu_memory_free: Some(free * GB),
        ..node(name)
    };
    // "b" may have 1 or 2, and 2 is freer; but "c" and "d" need 2 and 3.
    let nodes = [
        wish("a", 0.01, 90),
        wish("b", 0.3, 50),
        wish("c", 0.6, 1),
        wish("d", 0.6, 1),
    ];
    let mut chosen = pinned(&nodes, &gpus.collect::<Vec<_>>()).unwrap();
    chosen[2..].sort();
    assert_eq!(chosen, [[0], [1], [2], [3]]);
}

#[test]
fn the_least_free_memory_is_respected() {
    let gpus = [gpu(0, 95), gpu(1, 99)];
    let mut node = node("a");
    node.gpu_memory_free = Some(97 * GB);
    assert_eq!(pinned(std::slice::from_ref(&node), &gpus).unwrap(), [[1]]);
    node.gpus = GpuRequest::Listed(vec![GpuSelector::Index(0)]);
    assert!(matches!(
        pinned(&[node], &gpus).unwrap_err()[..],
        [PlanProblem::BusyGpu { index: 0, needed, .. }] if needed == 97 * GB
    ));
}

#[test]
fn prefill_and_decode_go_to_one_numa_node_beside_the_arena() {
    let mut host = two_halves();
    // The freest GPUs lie apart.
    host.gpus[0].memory_free = Some(100 * GB);
    host.gpus[7].memory_free = Some(100 * GB);
    let nodes = [of(Role::Prefill, 1), of(Role::Decode, 1)];
    let (placed, warnings) = pinned_in("", &nodes, &host).unwrap();
    let gpus: Vec<_> = placed.iter().map(|placed| placed.gpus[0]).collect();
    assert!(
        gpus == [0, 1] || gpus == [1, 0] || gpus == [6, 7] || gpus == [7, 6],
        "{gpus:?}"
    );
    assert_eq!(warnings, [] as [String; 0]);

    let (placed, _) = pinned_in("numa = [1]", &nodes, &host).unwrap();
    for placed in placed {
        assert!(placed.gpus[0] >= 6, "{placed:?}");
        assert_eq!((placed.cpus, placed.numa), (vec![4, 5, 6, 7], vec![1]));
    }
}

#[test]
fn a_partner_that_is_named_draws_the_other_to_it() {
    let mut prefill = of(Role::Prefill, 1);
    prefill.gpus = GpuRequest::Listed(vec![GpuSelector::Index(5)]);
    let (placed, _) = pinned_in("", &[prefill, of(Role::Decode, 1)], &two_halves()).unwrap();
    assert_eq!(placed[1].gpus, [4], "the other end of its NVLink");
}

#[test]
fn ranks_of_a_node_stay_together_also_when_a_neighbour_is_taken() {
    let host = two_halves();
    let nodes = [at("a", 0), of(Role::Prefill, 2), of(Role::Decode, 2)];
    let (placed, _) = pinned_in("", &nodes, &host).unwrap();
    let mut pairs = [placed[1].gpus.clone(), placed[2].gpus.clone()];
    pairs.sort();
    assert_eq!(pairs, [vec![4, 5], vec![6, 7]]);
}

#[test]
fn ranks_get_equal_gpus_where_there_are_enough() {
    let mut gpus = [gpu(0, 100), gpu(1, 99), gpu(2, 98), gpu(3, 97)];
    gpus[0].name = "H100".to_owned();
    gpus[2].name = "H100".to_owned();
    let nodes = [of(Role::Unified, 2)];
    assert_eq!(pinned(&nodes, &gpus).unwrap(), [[0, 2]]);
    let (_, warnings) = pinned_in("", &nodes, &host_of(&gpus[..2])).unwrap();
    assert!(warnings[0].contains("unequal GPUs"), "{warnings:?}");
}

#[test]
fn needless_distance_is_told() {
    let mut prefill = of(Role::Prefill, 1);
    let mut decode = of(Role::Decode, 1);
    prefill.gpus = GpuRequest::Listed(vec![GpuSelector::Index(0)]);
    decode.gpus = GpuRequest::Listed(vec![GpuSelector::Index(4)]);
    let (_, warnings) = pinned_in("", &[prefill, decode], &two_halves()).unwrap();
    assert!(warnings[0].contains("NUMA nodes 0, 1"), "{warnings:?}");
    // All eight cannot lie on one.
    let nodes = [of(Role::Prefill, 4), of(Role::Decode, 4)];
    let (_, warnings) = pinned_in("", &nodes, &two_halves()).unwrap();
    assert_eq!(warnings, [] as [String; 0]);
}

#[test]
fn cores_follow_the_gpu_unless_the_node_says_otherwise() {
    let host = two_halves();
    let mut all = at("all", 1);
    all.cpus = CpuRequest::All;
    let mut own = at("own", 5);
    own.cpus = CpuRequest::Listed(vec![1]);
    let mut both = listed("both", &[GpuSelector::Index(2), GpuSelector::Index(6)]);
    both.cpus = CpuRequest::Auto;
    let (placed, _) = pinned_in("", &[at("a", 0), all, own, both], &host).unwrap();
    let found: Vec<_> = placed
        .iter()
        .map(|placed| (&placed.cpus[..], &placed.numa[..]))
        .collect();
    assert_eq!(
        found,
        [
            (&[0, 1, 2, 3][..], &[0][..]),
            (&[], &[0]),
            (&[1], &[1]),
            // Every core there is: nothing to confine.
            (&[], &[0, 1]),
        ]
    );
    let mut missing = at("a", 0);
    missing.cpus = CpuRequest::Listed(vec![99]);
    assert!(matches!(
        pinned_in("", &[missing], &host).unwrap_err()[..],
        [PlanProblem::UnknownCore { core: 99, .. }]
    ));
}

#[test]
fn a_gpu_is_shared_by_those_who_both_say_so_and_fit() {
    let gpus = [gpu(0, 99)];
    let pair = |a, b| [sharing("a", a), sharing("b", b)];
    assert_eq!(pinned(&pair(0.3, 0.6), &gpus).unwrap(), [[0], [0]]);
    let mut named = pair(0.5, 0.6);
    for node in &mut named {
        node.gpus = GpuRequest::Listed(vec![GpuSelector::Index(0)]);
    }
    assert!(matches!(
        &pinned(&named, &gpus).unwrap_err()[..],
        [PlanProblem::FullGpu { index: 0, others, .. }] if others == "a 0.5"
    ));
    named[1].gpu_memory_fraction = 0.5;
    // Together they take more than is free.
    assert!(matches!(
        pinned(&named, &gpus).unwrap_err()[..],
        [PlanProblem::BusyGpu { index: 0, .. }]
    ));
    named[1].gpu_memory_fraction = 0.4;
    assert_eq!(pinned(&named, &gpus).unwrap(), [[0], [0]]);
    named[0].share_gpus = false;
    assert!(matches!(
        pinned(&named, &gpus).unwrap_err()[..],
        [PlanProblem::DoubleBooked { index: 0, .. }]
    ));
    // Where there is a second GPU, nobody has to.
    let apart = pinned(&pair(0.3, 0.3), &[gpu(0, 99), gpu(1, 50)]).unwrap();
    assert_ne!(apart[0], apart[1]);
}

#[test]
fn sharing_without_a_fixed_cache_is_told() {
    let mut nodes = [sharing("a", 0.4), sharing("b", 0.4)];
    nodes[1].kv_cache = None;
    let (_, warnings) = pinned_in("", &nodes, &host_of(&[gpu(0, 99)])).unwrap();
    assert!(
        matches!(&warnings[..], [one] if one.contains("b shares GPU 0") && one.contains("`kv_cache`")),
        "{warnings:?}"
    );
}

#[test]
fn what_cannot_be_had_is_refused_with_the_reason() {
    let mut mig = gpu(1, 100);
    mig.mig = true;
    let mut busy = gpu(2, 50);
    busy.holders = vec![
        GpuHolder {
            pid: 7,
            name: Some("python3".to_owned()),
            memory: Some(40 * GB),
        },
        GpuHolder {
            pid: 8,
            name: None,
            memory: None,
        },
    ];
    let gpus = [gpu(0, 100), mig, busy];
    let first = |nodes: &[_]| pinned(nodes, &gpus).unwrap_err().remove(0);
    assert!(matches!(
        first(&[at("a", 9)]),
        PlanProblem::UnknownGpu {
            selector: GpuSelector::Index(9),
            ..
        }
    ));
    assert!(matches!(
        first(&[at("a", 1)]),
        PlanProblem::MigGpu { index: 1, .. }
    ));
    let problem = first(&[at("a", 2)]);
    assert!(matches!(
        &problem,
        PlanProblem::BusyGpu { index: 2, free, .. } if *free == 50 * GB
    ));
    let text = problem.to_string();
    assert!(
        text.contains("held by python3 (pid 7) 40.0 GiB, pid 8;"),
        "{text}"
    );
    let uuid = listed("b", &[GpuSelector::Uuid("GPU-0".to_owned())]);
    assert!(matches!(
        first(&[at("a", 0), uuid]),
        PlanProblem::DoubleBooked { index: 0, other, .. } if other.as_str() == "a"
    ));
    assert!(matches!(
        first(&[node("a"), node("b")]),
        PlanProblem::TooFewGpus {
            wanted: 1,
            usable: 0,
            ..
        }
    ));
    let mut host = host_of(&gpus);
    host.lost_gpus = vec![3];
    assert!(matches!(
        pinned_in("", &[at("a", 3)], &host).unwrap_err()[..],
        [PlanProblem::LostGpu { index: 3, .. }]
    ));
    let (_, warnings) = pinned_in("", &[at("a", 0)], &host).unwrap();
    assert!(
        warnings[0].contains("GPU 3 does not answer"),
        "{warnings:?}"
    );
}

#[test]
fn unknown_memory_is_not_a_failure_but_the_last_choice() {
    let mut unknown = gpu(0, 0);
    unknown.memory_free = None;
    let gpus = [unknown, gpu(1, 95)];
    assert_eq!(pinned(&[node("a")], &gpus).unwrap(), [[1]]);
    let mut both = pinned(&[node("a"), node("b")], &gpus).unwrap();
    both.sort();
    assert_eq!(both, [[0], [1]]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_gpu_is_booked_twice_or_unfit(
        free in prop::collection::vec((0u64..=100, prop::bool::weighted(0.1)), 0..7),
        wants in prop::collection::vec(
            (1u32..=3, prop::option::of(0u32..8), 1u32..=100, any::<bool>()), 1..5),
    ) {
        let gpus: Vec<Gpu> = (0u32..).zip(&free).map(|(index, (free, mig))| {
            let mut gpu = gpu(index, *free);
            gpu.mig = *mig;
            gpu
        }).collect();
        let nodes: Vec<_> = wants.iter().enumerate().map(|(i, (count, index, percent, share))| {
            let mut node = match index {
                Some(index) => at(&format!("n{i}"), *index),
                None => { let mut node = node(&format!("n{i}")); node.tensor_parallel = *count; node }
            };
            node.gpu_memory_fraction = f64::from(*percent) / 100.0;
            node.share_gpus = *share;
            node
        }).collect();
        match pinned(&nodes, &gpus) {
            Ok(chosen) => {
                for (node, indices) in nodes.iter().zip(&chosen) {
                    let distinct: BTreeSet<_> = indices.iter().collect();
                    prop_assert_eq!(distinct.len(), node.tensor_parallel as usize);
                }
                for gpu in &gpus {
                    let users: Vec<_> = nodes.iter().zip(&chosen)
                        .filter(|(_, chosen)| chosen.contains(&gpu.index)).map(|(node, _)| node).collect();
                    let taken: f64 = users.iter().map(|node| node.gpu_memory_fraction).sum();
                    prop_assert!(users.is_empty() || !gpu.mig);
                    prop_assert!(taken <= 1.0 + 1e-6 && shortage(gpu, taken - 1e-6, 0).is_none());
                    prop_assert!(users.len() < 2 || users.iter().all(|node| node.share_gpus));
                }
            }
            Err(problems) => prop_assert!(!problems.is_empty()),
        }
        // With every GPU free and nobody choosy, enough GPUs are enough.
        let wanted: u32 = nodes.iter().map(|node| node.tensor_parallel).sum();
        let easy: Vec<Gpu> = (0..wanted).map(|index| self::gpu(index, 100)).collect();
        let auto: Vec<_> = nodes.into_iter().map(|mut node| {
            node.gpus = GpuRequest::Auto;
            node
        }).collect();
        prop_assert!(pinned(&auto, &easy).is_ok());
    }
}
