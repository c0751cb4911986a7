use std::io;

use super::super::finding::Status;
use super::*;
use crate::host::{GpuHolder, HugePages, Memlock};

const CUDA: Wanted = Wanted {
    device: Some(Device::Cuda),
    capacity: 8 * GIB,
};
const ANY: Wanted = Wanted {
    device: None,
    capacity: 8 * GIB,
};

fn gpu_with(free: u64) -> Gpu {
    Gpu {
        name: "H100".to_owned(),
        memory_total: Some(80 * GIB),
        memory_free: Some(free * GIB),
        ..Gpu::default()
    }
}

#[test]
fn no_driver_matters_where_gpus_are_wanted() {
    for nvml in [
        NvmlStatus::Available,
        NvmlStatus::Missing("m".to_owned()),
        NvmlStatus::Failed("f".to_owned()),
    ] {
        let host = HostSnapshot {
            nvml,
            ..HostSnapshot::default()
        };
        assert!(driver(&host, CUDA).failed());
        assert!(matches!(driver(&host, ANY).status, NotChecked(_)));
    }
    let host = HostSnapshot {
        gpus: vec![gpu_with(80)],
        ..HostSnapshot::default()
    };
    assert_eq!(driver(&host, CUDA).status, Status::Ok);
}

#[test]
fn gpus_that_are_lost_split_or_busy_are_told() {
    let mut busy = gpu_with(10);
    busy.holders = vec![GpuHolder {
        pid: 7,
        name: Some("python3".to_owned()),
        memory: Some(70 * GIB),
    }];
    let mut mig = gpu_with(80);
    mig.mig = true;
    let host = HostSnapshot {
        gpus: vec![gpu_with(79), busy, mig],
        lost_gpus: vec![3],
        ..HostSnapshot::default()
    };
    let found = gpus(&host);
    let statuses: Vec<_> = found.iter().map(|finding| &finding.status).collect();
    assert!(
        matches!(
            statuses[..],
            [Status::Ok, Warning(_), Warning(_), Failed(_)]
        ),
        "{found:?}"
    );
    assert!(found[1].what.contains("python3 (pid 7) 70.0 GiB"));
}

#[test]
fn huge_pages_and_locks_are_compared_with_the_store() {
    let mut host = HostSnapshot::default();
    let Warning(remedy) = hugepages(&host, ANY).status else {
        panic!("none are set aside")
    };
    assert!(remedy.contains("vm.nr_hugepages=4096"), "{remedy}");
    host.memory.hugepages = HugePages {
        total: 5000,
        free: 4096,
    };
    assert_eq!(hugepages(&host, ANY).status, Status::Ok);

    let limit = |hard, exempt| Memlock {
        soft: hard,
        hard,
        exempt,
    };
    for (memlock_is, device, warned) in [
        (limit(Some(GIB), false), Some(Device::Cuda), true),
        (limit(Some(GIB), false), None, true),
        (limit(Some(GIB), false), Some(Device::Cpu), false),
        (limit(Some(GIB), true), None, false),
        (limit(None, false), None, false),
    ] {
        host.memory.memlock = memlock_is;
        let wanted = Wanted { device, ..ANY };
        let found = memlock(&host, wanted);
        assert_eq!(matches!(found.status, Warning(_)), warned, "{found:?}");
    }
}

#[test]
fn room_is_judged() {
    let space = |total, free| Ok(Space { total, free });
    assert!(shm(space(64 * MIB, 64 * MIB)).failed());
    assert!(shm(Err(io::Error::other("gone"))).failed());
    assert!(matches!(shm(space(8 * GIB, GIB / 2)).status, Warning(_)));
    assert_eq!(shm(space(8 * GIB, 8 * GIB)).status, Status::Ok);
    let room = Room {
        check: "disk",
        path: "/x".into(),
        least: 10,
        good: 20,
        remedy: "make room",
    };
    assert!(room.judge(space(100, 9)).failed());
    assert!(matches!(room.judge(space(100, 19)).status, Warning(_)));
    assert_eq!(room.judge(space(100, 20)).status, Status::Ok);
    assert!(room.judge(Err(io::Error::other("gone"))).failed());
}
