//! The Python packages are embedded in the program (`src/instance/shim.rs`): a new file there must
//! make a new build, which the embedding macro cannot ask for by itself. Their one native file is
//! compiled here, by the compiler that builds the program.

use std::path::Path;
use std::process::Command;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=python-shim");
    let folder = env::var("OUT_DIR").map_err(io::Error::other)?;
    let library = Path::new(&folder).join("pegaflow_copy.so");
    if !compile(&library)? {
        println!("cargo::warning=no native copy for this target: the shim will copy with NumPy");
        fs::write(&library, b"")?;
    }
    Ok(())
}

/// False where the target has no shared libraries.
fn compile(library: &Path) -> io::Result<bool> {
    let variable = |name| env::var(name).map_err(io::Error::other);
    let done = Command::new(variable("RUSTC")?)
        .args(["--edition=2024", "--crate-type=cdylib"])
        .args(["--crate-name=pegaflow_copy", "-Copt-level=3"])
        .args(["-Cpanic=abort", "-Cstrip=symbols", "--target"])
        .arg(variable("TARGET")?)
        .arg("-o")
        .arg(library)
        .arg("python-shim/native/copy.rs")
        .status()?;
    Ok(done.success() && library.exists())
}
