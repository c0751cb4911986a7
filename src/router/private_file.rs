//! A file that is read again when it changes, and one of those that hold secrets: read whole, bounded, and only if
//! no other user may read it.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;
use std::{fs, io};

/// Bytes of such a file.
const MAX_FILE: u64 = 1 << 20;
/// What every user may do.
const OTHERS: u32 = 0o007;

/// Changes when the file does, also when another is renamed to its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp(Option<(SystemTime, u64, u64)>);

impl Stamp {
    pub(super) fn of(file: &Path) -> Self {
        let found = fs::metadata(file).ok();
        Self(found.and_then(|found| Some((found.modified().ok()?, found.len(), found.ino()))))
    }
}

/// The text of a file that everybody may read.
pub fn read_open(file: &Path) -> io::Result<String> {
    read(file, 0)
}

/// The text of a file that other users of the machine may not even read.
pub fn read_private(file: &Path) -> io::Result<String> {
    read(file, OTHERS)
}

fn read(file: &Path, forbidden: u32) -> io::Result<String> {
    use io::Read as _;
    let opened = fs::File::open(file)?;
    let kind = opened.metadata()?;
    if !kind.is_file() || kind.len() > MAX_FILE {
        return Err(io::Error::other("it is no file, or larger than 1 MiB"));
    }
    if kind.mode() & forbidden != 0 {
        let mode = kind.mode() & 0o777;
        return Err(io::Error::other(format!(
            "it holds a secret, and its mode {mode:03o} lets every user of this machine at it; run `chmod o= {}`",
            file.display()
        )));
    }
    let mut text = String::new();
    opened.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_secret_that_others_can_reach_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        fs::write(&file, "hidden").unwrap();
        for (mode, private) in [
            (0o600, true),
            (0o640, true),
            (0o644, false),
            (0o602, false),
            (0o601, false),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(read_private(&file).is_ok(), private, "{mode:o}");
            assert_eq!(read_open(&file).unwrap(), "hidden");
        }
        let why = read_private(&file).unwrap_err().to_string();
        assert!(
            why.contains("mode 601") && why.contains("chmod o="),
            "{why}"
        );
    }

    #[test]
    fn what_is_no_file_or_has_no_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_open(folder.path()).is_err());
        assert!(read_open(Path::new("/dev/zero")).is_err());
        let long = folder.path().join("long");
        fs::write(&long, vec![b'x'; (1 << 20) + 1]).unwrap();
        assert!(read_open(&long).is_err());
    }

    #[test]
    fn a_stamp_tells_an_absent_a_changed_and_a_replaced_file() {
        let folder = tempfile::tempdir().unwrap();
        let (file, next) = (folder.path().join("a"), folder.path().join("b"));
        let absent = Stamp::of(&file);
        fs::write(&file, "one").unwrap();
        let first = Stamp::of(&file);
        assert_ne!(absent, first);
        fs::write(&next, "two").unwrap();
        fs::rename(&next, &file).unwrap();
        assert_ne!(Stamp::of(&file), first);
    }
}
