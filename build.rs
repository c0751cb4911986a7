//! The Python packages are embedded in the program (`src/instance/shim.rs`): a new file there must
//! make a new build, which the embedding macro cannot ask for by itself.

fn main() {
    println!("cargo::rerun-if-changed=python-shim");
}
