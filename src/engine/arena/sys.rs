//! Two system calls that no crate offers safely.

use std::io;

use memmap2::MmapRaw;

use crate::plan::NumaPlan;

/// Bits of a node mask: as many as the kernel's most nodes.
const NODES: usize = 1024;
const WORD: usize = u64::BITS as usize;
/// How much the threads step back behind the rest.
const NICE: libc::c_int = 10;

/// Says on which NUMA nodes this part of the arena is to lie. Pages that are there already stay.
///
/// On normal pages it holds for the file, whoever touches it first; on huge ones (hugetlbfs has no
/// shared policy) for this mapping only.
pub fn place(mapping: &MmapRaw, numa: &NumaPlan) -> io::Result<()> {
    let (mode, nodes) = match numa {
        NumaPlan::Anywhere => return Ok(()),
        NumaPlan::Bind(node) => (libc::MPOL_BIND, std::slice::from_ref(node)),
        NumaPlan::Interleave(nodes) => (libc::MPOL_INTERLEAVE, &nodes[..]),
    };
    let mut mask = [0u64; NODES / WORD];
    for node in nodes {
        let node = usize::try_from(*node).map_err(io::Error::other)?;
        let word = mask.get_mut(node / WORD);
        *word.ok_or_else(|| io::Error::other(format!("there is no NUMA node {node}")))? |=
            1 << (node % WORD);
    }
    #[expect(unsafe_code, reason = "mbind has no safe wrapper")]
    // SAFETY: the range is exactly one live mapping; mbind changes where its pages come from and
    // never what they hold. `mask` outlives the call and has as many bits as the call is told; the
    // kernel takes one bit less than that number.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            mapping.as_mut_ptr(),
            mapping.len(),
            libc::c_long::from(mode),
            mask.as_ptr(),
            NODES + 1,
            0,
        )
    } != 0;
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets everybody else run before the calling thread.
pub fn step_back() {
    #[expect(unsafe_code, reason = "setpriority has no safe wrapper")]
    // SAFETY: it takes numbers only. On Linux, 0 names the calling thread alone.
    let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0;
    if failed {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "the arena is pre-faulted at normal priority");
    }
}
