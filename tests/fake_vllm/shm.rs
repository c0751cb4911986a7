//! Shared-memory files like those that vLLM's processes make.

use std::fs::File;
use std::path::PathBuf;

/// A mapped `/dev/shm` file, removed on drop and left behind by a kill.
#[derive(Debug)]
pub struct Segment {
    path: PathBuf,
    _map: memmap2::MmapMut,
}

impl Segment {
    /// As multiprocessing makes them: `psm_...`.
    pub fn create() -> Self {
        Self::named(format!("psm_fake_{}", std::process::id()))
    }

    /// As torch.distributed makes them; real vLLM leaves these behind even after a clean stop.
    pub fn create_left_behind() {
        let name = format!("vllm_dist_fake_{}-cpushm", std::process::id());
        std::mem::forget(Self::named(name));
    }

    #[expect(unsafe_code, reason = "mapping a file is unsafe")]
    fn named(name: String) -> Self {
        let path = PathBuf::from("/dev/shm").join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len(64 * 1024).unwrap();
        // SAFETY: nobody reads the mapping; it only has to show in /proc/<pid>/maps.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        map.fill(1);
        Self { path, _map: map }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
