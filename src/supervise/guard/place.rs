//! On which cores a node's tree runs, and from which NUMA nodes its memory comes. Every thread and
//! process to come inherits both.

use std::io::{self, ErrorKind};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Bits of a node mask: as many as the kernel's most nodes.
const NODES: usize = 1024;
const WORD: usize = u64::BITS as usize;
/// Prefers several nodes; the kernel has it since 5.15, the libc crate not yet.
const MPOL_PREFERRED_MANY: libc::c_int = 5;

/// vLLM itself binds its OpenMP threads only, and the others would run on the cores of other nodes.
pub(super) fn confine(cpus: &[usize]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    let confined = cpus
        .iter()
        .try_for_each(|&core| set.set(core))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    confined.map_err(|error| {
        let why = format!("cannot run on cores {cpus:?} ({error}); change the node's `cpus`");
        io::Error::new(ErrorKind::InvalidInput, why)
    })
}

/// Memory elsewhere is slower, not wrong: the nodes are preferred and not bound to, and where the
/// kernel forbids it (a container without `CAP_SYS_NICE`), the node's log says so.
pub(super) fn prefer_memory(nodes: &[u32]) {
    let mode = match nodes {
        [] => return,
        [_] => libc::MPOL_PREFERRED,
        _ => MPOL_PREFERRED_MANY,
    };
    let mut mask = [0u64; NODES / WORD];
    for node in nodes {
        let node = *node as usize;
        match mask.get_mut(node / WORD) {
            Some(word) => *word |= 1 << (node % WORD),
            None => return eprintln!("pegaflow guard: there is no NUMA node {node}"),
        }
    }
    if let Err(error) = set_mempolicy(mode, &mask) {
        eprintln!(
            "pegaflow guard: memory is not taken from NUMA nodes {nodes:?} first: {error}; in a \
             container, allow it (--cap-add SYS_NICE)"
        );
    }
}

fn set_mempolicy(mode: libc::c_int, mask: &[u64; NODES / WORD]) -> Result<(), Errno> {
    #[expect(unsafe_code, reason = "set_mempolicy has no safe wrapper")]
    // SAFETY: it changes where the calling thread's pages will come from, and nothing that is there.
    // `mask` outlives the call and has as many bits as the call is told; the kernel takes one bit
    // less than that number.
    let result = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::c_long::from(mode),
            mask.as_ptr(),
            NODES + 1,
        )
    };
    Errno::result(result).map(drop)
}
