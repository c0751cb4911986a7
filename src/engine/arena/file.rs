//! The memory file: which pages it is made of, and where they are to lie.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::sys;
use crate::plan::{ArenaPlan, NumaPlan, PageKind};

/// A sealed memfd.
#[derive(Debug)]
pub struct MemoryFile {
    pub file: File,
    pub len: u64,
    pub pages: PageKind,
    pub numa: NumaPlan,
}

impl MemoryFile {
    /// A file of the first kind of pages that can be had.
    pub fn create(len: u64, plan: &ArenaPlan) -> io::Result<Self> {
        let mut refused = io::Error::other("no kind of pages was named");
        for (at, kind) in plan.pages.iter().enumerate() {
            match Self::of(*kind, len, &plan.numa) {
                Ok(file) => return Ok(file),
                Err(error) if at + 1 < plan.pages.len() => {
                    tracing::warn!(
                        "the arena gets no {kind:?} pages ({error}): were they taken since the \
                         start? It takes the next kind"
                    );
                }
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }

    fn of(pages: PageKind, len: u64, numa: &NumaPlan) -> io::Result<Self> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if pages == PageKind::Huge {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let file = File::from(memfd_create(c"pegaflow-kv", flags)?);
        file.set_len(len)?;
        let mut made = Self {
            file,
            len,
            pages,
            numa: numa.clone(),
        };
        // Mapping all of it once makes huge pages ours: none can be missing later on.
        let all = made.map(0, len)?;
        if let Err(error) = sys::place(&all, numa) {
            tracing::warn!(%error, "the arena lies where the kernel puts it, not on {numa:?}");
            made.numa = NumaPlan::Anywhere;
        }
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&made.file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(made)
    }

    /// Of huge pages, both numbers must be whole ones.
    pub fn map(&self, offset: u64, len: u64) -> io::Result<MmapRaw> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        MmapOptions::new()
            .offset(offset)
            .len(len)
            .map_raw(&self.file)
    }

    /// A part to pre-fault: mapped, and placed as the whole is.
    pub fn map_placed(&self, offset: u64, len: u64) -> io::Result<MmapRaw> {
        let part = self.map(offset, len)?;
        match self.pages {
            PageKind::Huge => sys::place(&part, &self.numa)?,
            // Where the kernel does not know it, the pages are merely small.
            PageKind::Transparent => drop(part.advise(Advice::HugePage)),
            PageKind::Normal => {}
        }
        Ok(part)
    }

    /// The same file, for another owner.
    pub fn share(&self) -> io::Result<Self> {
        Ok(Self {
            file: File::from(self.file.as_fd().try_clone_to_owned()?),
            len: self.len,
            pages: self.pages,
            numa: self.numa.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{HUGE_PAGE, HostSnapshot};

    fn plan(pages: &[PageKind], numa: NumaPlan) -> ArenaPlan {
        ArenaPlan {
            pages: pages.to_vec(),
            numa,
            prefault_threads: 0,
            ..ArenaPlan::default()
        }
    }

    /// What the kernel says about a mapping of ours.
    fn numa_maps(mapping: &MmapRaw) -> Option<String> {
        let address = format!("{:08x} ", mapping.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/numa_maps").ok()?;
        let line = maps.lines().find(|line| line.starts_with(&address))?;
        Some(line.to_owned())
    }

    #[test]
    fn memory_is_bound_for_whoever_maps_it() {
        let nodes = HostSnapshot::take().unwrap().memory.numa;
        let Some(node) = nodes.first() else {
            eprintln!("skipped: this kernel knows no NUMA nodes");
            return;
        };
        for (numa, expected) in [
            (NumaPlan::Bind(node.id), format!("bind:{}", node.id)),
            (
                NumaPlan::Interleave(vec![node.id]),
                format!("interleave:{}", node.id),
            ),
            (NumaPlan::Anywhere, "default".to_owned()),
        ] {
            let plan = plan(&[PageKind::Normal], numa.clone());
            let file = MemoryFile::create(HUGE_PAGE, &plan).unwrap();
            if numa != file.numa {
                eprintln!("skipped: mbind is not allowed here");
                return;
            }
            // Not the mapping that was bound.
            let mapping = file.share().unwrap().map(0, HUGE_PAGE).unwrap();
            if let Some(line) = numa_maps(&mapping) {
                assert!(line.contains(&expected), "{line}");
            }
        }
    }

    #[test]
    fn a_node_that_is_not_there_leaves_the_memory_unplaced() {
        for node in [1023, 5000] {
            let plan = plan(&[PageKind::Normal], NumaPlan::Bind(node));
            let file = MemoryFile::create(HUGE_PAGE, &plan).unwrap();
            assert_eq!(file.numa, NumaPlan::Anywhere);
        }
    }

    #[test]
    fn huge_pages_that_are_not_there_are_refused_or_replaced() {
        let free = HostSnapshot::take().unwrap().memory.hugepages.free;
        let len = (free + 64) * HUGE_PAGE;
        let on = plan(&[PageKind::Huge], NumaPlan::Anywhere);
        assert!(MemoryFile::create(len, &on).is_err());
        let auto = plan(&[PageKind::Huge, PageKind::Normal], NumaPlan::Anywhere);
        let file = MemoryFile::create(len, &auto).unwrap();
        assert_eq!(file.pages, PageKind::Normal);
        assert_eq!(file.file.metadata().unwrap().len(), len);
    }

    #[test]
    fn huge_pages_are_reserved_and_usable_where_there_are_any() {
        if HostSnapshot::take().unwrap().memory.hugepages.free < 4 {
            eprintln!("skipped: no huge pages are set aside here (vm.nr_hugepages)");
            return;
        }
        let on = plan(&[PageKind::Huge], NumaPlan::Anywhere);
        let file = MemoryFile::create(2 * HUGE_PAGE, &on).unwrap();
        let part = file.map_placed(HUGE_PAGE, HUGE_PAGE).unwrap();
        part.advise(Advice::PopulateWrite).unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.file.metadata().unwrap());
        assert_eq!(blocks * 512, HUGE_PAGE);
    }
}
