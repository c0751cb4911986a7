//! Builds the scripted NVML library (`nvml.c` says how it is scripted).

use std::path::Path;
use std::process::Command;

/// Compiles `libnvidia-ml.so.1` into a directory, which then belongs on `LD_LIBRARY_PATH`.
pub fn build(directory: &Path) {
    compile(directory, &[]);
}

/// The library of an old driver, which lacks most functions.
#[allow(dead_code, reason = "not every test needs it")]
pub fn build_old(directory: &Path) {
    compile(directory, &["-DOLD_DRIVER"]);
}

fn compile(directory: &Path, flags: &[&str]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nvml/nvml.c");
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror"])
        .args(flags)
        .arg("-o")
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
