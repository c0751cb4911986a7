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

/// Compiles `libcuda.so.1` (`cuda.c` says how it is scripted) into a directory.
#[allow(dead_code, reason = "not every test needs it")]
pub fn build_cuda(directory: &Path) {
    build_library(directory, "cuda.c", "libcuda.so.1", &[]);
}

fn compile(directory: &Path, flags: &[&str]) {
    build_library(directory, "nvml.c", "libnvidia-ml.so.1", flags);
}

fn build_library(directory: &Path, source: &str, library: &str, flags: &[&str]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fake_nvml")
        .join(source);
    let output = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror"])
        .args(flags)
        .arg("-o")
        .arg(directory.join(library))
        .arg(source)
        .output()
        .expect("a C compiler named cc");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
