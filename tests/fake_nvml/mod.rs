//! Builds the scripted NVML library (`nvml.c` says how it is scripted).

use std::path::Path;
use std::process::Command;

/// Compiles `libnvidia-ml.so.1` into a directory, which then belongs on `LD_LIBRARY_PATH`.
pub fn build(directory: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nvml/nvml.c");
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .arg(directory.join("libnvidia-ml.so.1"))
        .arg(source)
        .output()
        .expect("a C compiler named cc");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
