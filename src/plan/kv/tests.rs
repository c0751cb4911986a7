use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::fleet::Role;
use crate::host::{Gpu, Memlock, MemoryFacts};

const GIB: u64 = 1 << 30;
/// 2 MiB pages in a GiB.
const PAGES: u64 = 512;

fn topology(device: &str, kv: &str) -> Topology {
    let text = format!(
        "device = \"{device}\"\nmodel = \"a/b\"\n[kv]\n{kv}\n[[node]]\nrole = \"prefill\"\n[[node]]\nrole = \"decode\"\n"
    );
    Topology::parse(&text, Path::new("t.toml")).unwrap_or_else(|error| panic!("{error}"))
}

fn numa(id: u32, cpus: &[usize], available: u64) -> NumaNode {
    NumaNode {
        id,
        cpus: cpus.to_vec(),
        available,
        hugepages: HugePages::default(),
    }
}

/// 64 GiB on two nodes, with two cores and two GPUs each.
fn host() -> HostSnapshot {
    let gpu = |index: u32| Gpu {
        index,
        uuid: format!("GPU-{index}"),
        name: "H200".to_owned(),
        numa_node: Some(index / 2),
        ..Gpu::default()
    };
    HostSnapshot {
        cpus: vec![0, 1, 2, 3],
        memory_total: 64 * GIB,
        memory_available: 60 * GIB,
        memory: MemoryFacts {
            numa: vec![numa(0, &[0, 1], 28 * GIB), numa(1, &[2, 3], 32 * GIB)],
            ..MemoryFacts::default()
        },
        gpus: (0..4).map(gpu).collect(),
        ..HostSnapshot::default()
    }
}

fn on_gpus(gpus: &[u32]) -> Placement {
    Placement {
        gpus: gpus.to_vec(),
        ..Placement::default()
    }
}

fn on_cpus(cpus: &[usize]) -> Placement {
    Placement {
        cpus: cpus.to_vec(),
        ..Placement::default()
    }
}

fn planned(kv: &str, host: &HostSnapshot, placements: &[Placement]) -> (KvPlan, Found) {
    let mut found = Found::default();
    let sharing: Vec<&Placement> = placements.iter().collect();
    let plan = plan(&topology("cuda", kv), host, &[], &sharing, &mut found);
    (plan, found)
}

#[track_caller]
fn sound(kv: &str, host: &HostSnapshot, placements: &[Placement]) -> KvPlan {
    let (plan, found) = planned(kv, host, placements);
    assert_eq!(found.problems(), []);
    plan
}

#[test]
fn the_store_lies_beside_the_gpus_or_cores_that_share_it() {
    let host = host();
    let place = |placements: &[Placement]| sound("", &host, placements).arena.numa;
    assert_eq!(place(&[on_gpus(&[2]), on_gpus(&[3])]), NumaPlan::Bind(1));
    assert_eq!(place(&[on_cpus(&[0]), on_cpus(&[1])]), NumaPlan::Bind(0));
    let both = NumaPlan::Interleave(vec![0, 1]);
    assert_eq!(place(&[on_gpus(&[0]), on_gpus(&[3])]), both);
    // Nothing is known about where they are.
    assert_eq!(place(&[on_gpus(&[9])]), both);
}

#[test]
fn a_machine_with_one_node_has_no_choice() {
    let mut host = host();
    host.memory.numa.truncate(1);
    for kv in ["", "numa = \"interleave\"", "numa = [0]", "numa = \"none\""] {
        let plan = sound(kv, &host, &[on_gpus(&[0])]);
        assert_eq!(plan.arena.numa, NumaPlan::Anywhere, "{kv}");
    }
    host.memory.numa.clear();
    assert_eq!(
        sound("", &host, &[on_gpus(&[0])]).arena.numa,
        NumaPlan::Anywhere
    );
}

#[test]
fn what_is_written_about_nodes_is_done() {
    let host = host();
    for (numa, expected) in [
        ("\"none\"", NumaPlan::Anywhere),
        ("\"interleave\"", NumaPlan::Interleave(vec![0, 1])),
        ("[1, 0]", NumaPlan::Interleave(vec![1, 0])),
        ("[0]", NumaPlan::Bind(0)),
    ] {
        let plan = sound(&format!("numa = {numa}"), &host, &[on_gpus(&[2])]);
        assert_eq!(plan.arena.numa, expected, "{numa}");
    }
    let (_, found) = planned("numa = [0, 7]", &host, &[on_gpus(&[2])]);
    let nodes = vec![0, 1];
    assert_eq!(
        found.problems(),
        [PlanProblem::UnknownNumaNode { node: 7, nodes }]
    );
}

#[test]
fn a_store_is_not_bound_to_a_node_without_room_for_it() {
    let host = host();
    let (plan, found) = planned("capacity = \"30GiB\"", &host, &[on_gpus(&[0])]);
    assert_eq!(plan.arena.numa, NumaPlan::Interleave(vec![0, 1]));
    assert!(found.problems().is_empty() && found.has_warnings());
    let (plan, found) = planned("capacity = \"30GiB\"", &host, &[on_gpus(&[2])]);
    assert_eq!(plan.arena.numa, NumaPlan::Bind(1));
    assert!(!found.has_warnings());

    let (_, found) = planned("capacity = \"30GiB\"\nnuma = [0]", &host, &[on_gpus(&[0])]);
    let problem = PlanProblem::NumaNodeTooSmall {
        node: 0,
        capacity: 30 * GIB,
        available: 28 * GIB,
    };
    assert_eq!(found.problems(), [problem]);
}

#[test]
fn a_store_that_does_not_fit_is_refused_with_what_would() {
    let mut host = host();
    host.memory.limited = true;
    let (_, found) = planned("capacity = \"61GiB\"", &host, &[]);
    let problem = PlanProblem::StoreTooLarge {
        capacity: 61 * GIB,
        available: 60 * GIB,
        total: 64 * GIB,
        limited: true,
        instead: Some(54 * GIB),
    };
    assert!(problem.to_string().contains("\"54GiB\""), "{problem}");
    assert_eq!(found.problems(), [problem]);
    assert_eq!(sound("capacity = \"60GiB\"", &host, &[]).capacity, 60 * GIB);

    host.memory_available = 1 << 20;
    let (_, found) = planned("", &host, &[]);
    assert!(matches!(
        found.problems()[..],
        [PlanProblem::StoreTooLarge { instead: None, .. }]
    ));
}

#[test]
fn a_share_is_of_what_there_is() {
    let host = host();
    assert_eq!(sound("capacity = \"50%\"", &host, &[]).capacity, 32 * GIB);
    let (_, found) = planned("capacity = \"100%\"", &host, &[]);
    assert!(matches!(
        found.problems()[..],
        [PlanProblem::StoreTooLarge { .. }]
    ));
    let tiny = HostSnapshot {
        memory_total: 1000 << 20,
        ..host
    };
    assert_eq!(sound("capacity = \"1%\"", &tiny, &[]).capacity, 16 << 20);
}

#[test]
fn huge_pages_are_taken_where_enough_are_free() {
    let mut host = host();
    host.memory.hugepages = HugePages {
        total: 10 * PAGES,
        free: 8 * PAGES,
    };
    let plan = sound("", &host, &[]);
    assert_eq!(plan.arena.pages, [PageKind::Huge, PageKind::Normal]);
    assert_eq!(plan.page_note, None);
    let on = sound("hugepages = \"on\"", &host, &[]);
    assert_eq!(on.arena.pages, [PageKind::Huge]);
    let off = sound("hugepages = \"off\"", &host, &[]);
    assert_eq!(
        (&off.arena.pages[..], off.page_note),
        (&[PageKind::Normal][..], None)
    );

    // Their memory is not among what is available, and nothing else need be.
    host.memory_available = GIB;
    let plan = sound("", &host, &[]);
    assert_eq!(plan.arena.pages, [PageKind::Huge]);
}

#[test]
fn without_huge_pages_the_store_takes_others_or_says_how_to_get_them() {
    let mut host = host();
    host.memory.hugepages = HugePages {
        total: 100,
        free: 60,
    };
    let plan = sound("", &host, &[]);
    assert_eq!(plan.arena.pages, [PageKind::Normal]);
    let command = format!("sudo sysctl -w vm.nr_hugepages={}", 40 + 8 * PAGES);
    assert!(plan.page_note.unwrap().contains(&command));

    let (_, found) = planned("hugepages = \"on\"", &host, &[]);
    let problem = PlanProblem::TooFewHugePages {
        needed: 8 * PAGES,
        free: 60,
        command,
    };
    assert_eq!(found.problems(), [problem]);
}

#[test]
fn a_bound_store_takes_the_huge_pages_of_its_node() {
    let mut host = host();
    host.memory.hugepages = HugePages {
        total: 16 * PAGES,
        free: 16 * PAGES,
    };
    for (node, gib) in host.memory.numa.iter_mut().zip([9, 7]) {
        node.hugepages = HugePages {
            total: gib * PAGES,
            free: gib * PAGES,
        };
    }
    let pages = |placements: &[Placement]| sound("", &host, placements).arena.pages;
    assert_eq!(pages(&[on_gpus(&[0])])[0], PageKind::Huge);
    assert_eq!(pages(&[on_gpus(&[2])]), [PageKind::Normal]);
    assert_eq!(pages(&[on_gpus(&[0]), on_gpus(&[2])])[0], PageKind::Huge);
    let (_, found) = planned("hugepages = \"on\"\nnuma = [1]", &host, &[]);
    let [PlanProblem::TooFewHugePages { command, .. }] = &found.problems()[..] else {
        panic!("{:?}", found.problems());
    };
    assert_eq!(
        *command,
        format!(
            "echo {} | sudo tee /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages",
            8 * PAGES
        )
    );
}

#[test]
fn transparent_huge_pages_are_the_middle_way() {
    let mut host = host();
    for (setting, auto, off) in [
        (ShmemThp::Never, PageKind::Normal, PageKind::Normal),
        (ShmemThp::Advise, PageKind::Transparent, PageKind::Normal),
        // The kernel does it unasked.
        (ShmemThp::Always, PageKind::Normal, PageKind::Normal),
    ] {
        host.memory.shmem_thp = setting;
        assert_eq!(sound("", &host, &[]).arena.pages, [auto]);
        let plan = sound("hugepages = \"off\"", &host, &[]);
        assert_eq!(plan.arena.pages, [off]);
    }
}

#[test]
fn a_lock_limit_below_the_store_is_warned_of_where_it_matters() {
    let mut host = host();
    let limit = |hard, exempt| Memlock {
        soft: Some(8192),
        hard,
        exempt,
    };
    for (memlock, warned) in [
        (limit(Some(8 * GIB), false), false),
        (limit(Some(8 * GIB - 1), false), true),
        (limit(Some(8192), true), false),
        (limit(None, false), false),
    ] {
        host.memory.memlock = memlock;
        let (_, found) = planned("", &host, &[]);
        assert_eq!(found.has_warnings(), warned, "{memlock:?}");
        let mut found = Found::default();
        plan(&topology("cpu", ""), &host, &[], &[], &mut found);
        assert!(!found.has_warnings(), "nothing is registered on the CPU");
    }
}

#[test]
fn the_nodes_need_memory_too() {
    let mut host = host();
    // Two nodes on the CPU take 5 GiB each.
    for (free, warned) in [(18, false), (17, true)] {
        host.memory_available = free * GIB;
        let mut found = Found::default();
        plan(&topology("cpu", ""), &host, &[], &[], &mut found);
        assert!(found.problems().is_empty());
        assert_eq!(found.has_warnings(), warned, "{free}");
    }
}

#[test]
fn threads_leave_half_of_the_cores_alone() {
    let mut host = host();
    for (cores, threads) in [(1, 1), (2, 1), (4, 2), (64, 4)] {
        host.cpus = (0..cores).collect();
        assert_eq!(sound("", &host, &[]).arena.prefault_threads, threads);
    }
}

proptest! {
    /// Whatever the machine, a plan without problems promises memory that was there.
    #[test]
    fn what_is_planned_was_free(
        total in 1..256u64,
        available in 0..256u64,
        capacity in 1..256u64,
        free_huge in 0..256u64,
        rooms in prop::collection::vec(0..256u64, 0..4),
        request in prop::sample::select(vec!["auto", "on", "off"]),
        gpu in 0..8u32,
    ) {
        let mut host = host();
        host.memory_total = total * GIB;
        host.memory_available = available.min(total) * GIB;
        let huge = HugePages { total: free_huge * PAGES, free: free_huge * PAGES };
        host.memory.hugepages = huge;
        host.memory.numa = (0..).zip(&rooms).map(|(id, room)| numa(id, &[], room * GIB)).collect();
        let kv = format!("capacity = \"{capacity}GiB\"\nhugepages = \"{request}\"");
        let (plan, found) = planned(&kv, &host, &[on_gpus(&[gpu])]);
        prop_assert_eq!(plan.capacity % HUGE_PAGE, 0);
        prop_assert!(!plan.arena.pages.is_empty());
        if found.problems().is_empty() {
            let from_pool = plan.arena.pages.contains(&PageKind::Huge);
            let from_memory = plan.arena.pages.iter().any(|kind| *kind != PageKind::Huge);
            prop_assert!(!from_pool || request != "off" && capacity <= free_huge);
            prop_assert!(!from_memory || request != "on" && capacity <= available.min(total));
            match plan.arena.numa {
                NumaPlan::Anywhere => prop_assert!(rooms.len() < 2),
                NumaPlan::Bind(node) => prop_assert!(from_pool || capacity <= rooms[node as usize]),
                NumaPlan::Interleave(nodes) => prop_assert!(nodes.len() > 1),
            }
        }
    }
}

#[test]
fn each_pool_gets_an_equal_part_of_the_capacity() {
    let node = |name: &str, role, pool: &str| crate::topology::NodeSettings {
        role,
        pool: pool.to_owned(),
        ..crate::plan::tests::node(name)
    };
    let nodes = [
        node("p0", Role::Prefill, "a"),
        node("p1", Role::Prefill, "b"),
        node("u", Role::Unified, "default"),
        node("d0", Role::Decode, "a"),
        node("d1", Role::Decode, "b"),
        node("d2", Role::Decode, "c"),
    ];
    let pools = super::pools(&crate::plan::tests::replicas_of(&nodes), 100 << 20);
    let shown: Vec<_> = pools
        .iter()
        .map(|pool| {
            let nodes: Vec<_> = pool.nodes.iter().map(NodeId::as_str).collect();
            (pool.name.as_str(), nodes.join(" "), pool.capacity >> 20)
        })
        .collect();
    let expected = [("a", "p0 d0", 32), ("b", "p1 d1", 32), ("c", "d2", 32)];
    assert_eq!(
        shown,
        expected.map(|(name, nodes, mib)| (name, nodes.to_owned(), mib))
    );
    assert_eq!(super::pools(&[], 7 << 20), [PoolPlan::only(6 << 20)]);
}

#[test]
fn bits_are_equal_where_the_processor_rounds_alike() {
    for (device, amx, kv, tolerance) in [
        ("cpu", false, "", 0.0),
        ("cpu", true, "", 0.05),
        ("cuda", false, "", 0.05),
        ("cpu", true, "canary_logprob_tolerance = 0.0", 0.0),
    ] {
        let host = HostSnapshot { amx, ..host() };
        let plan = plan(
            &topology(device, kv),
            &host,
            &[],
            &[],
            &mut Found::default(),
        );
        assert_eq!(
            plan.canary_logprob_tolerance, tolerance,
            "{device}, {amx}, {kv}"
        );
    }
}
