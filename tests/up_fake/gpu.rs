//! `configs/1p1d.toml` as it is shipped, on a scripted libnvidia-ml.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::fake_nvml;
use crate::support::client::is_proven;
use crate::support::{self, Site, send};

const TWO_GPUS: &str =
    "0 GPU-aaaa 85899345920 85000000000 0\n1 GPU-bbbb 85899345920 85000000000 0\n";

/// `configs/1p1d.toml` as it is shipped, but for the port.
fn gpu_site(gpus: Option<&str>) -> Site {
    let mut site = Site::new();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for name in ["1p1d.toml", "1p1d-cpu.toml"] {
        let text = fs::read_to_string(shipped.join(name)).unwrap();
        let (old, new) = ("127.0.0.1:8000", format!("127.0.0.1:{}", site.port));
        assert!(text.contains(old), "{name}");
        fs::write(site.path(name), text.replace(old, &new)).unwrap();
    }
    fs::rename(site.path("1p1d.toml"), site.path("topology.toml")).unwrap();
    fs::rename(site.path("1p1d-cpu.toml"), site.path("topology-cpu.toml")).unwrap();
    site.env("HF_HUB_OFFLINE", "1");
    let library = site.path("nvml");
    fs::create_dir(&library).unwrap();
    site.env("LD_LIBRARY_PATH", library.to_str().unwrap());
    if let Some(gpus) = gpus {
        fake_nvml::build(&library);
        fs::write(library.join("gpus.txt"), gpus).unwrap();
        site.env("FAKE_NVML_FILE", library.join("gpus.txt").to_str().unwrap());
    }
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gpu_config_gives_each_node_its_own_gpu() {
    let site = gpu_site(Some(TWO_GPUS));
    let up = site.up_ready().await;
    let mut seen = Vec::new();
    for node in ["prefill", "decode"] {
        let addr = up.node(node).await["addr"].as_str().unwrap().to_owned();
        let text = support::client::get(&format!("http://{addr}/_fake/env"))
            .await
            .unwrap();
        let environment: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(environment["CUDA_DEVICE_ORDER"], "PCI_BUS_ID");
        seen.push(
            environment["CUDA_VISIBLE_DEVICES"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
    }
    seen.sort();
    assert_eq!(seen, ["0", "1"]);

    let view = up.node("decode").await;
    let incarnation = view["incarnation"].as_u64();
    send(
        u32::try_from(view["pid"].as_u64().unwrap()).unwrap(),
        Signal::SIGKILL,
    );
    let back =
        |view: &serde_json::Value| is_proven(view) && view["incarnation"].as_u64() > incarnation;
    up.wait_for_node("decode", back).await;
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_gpu_the_message_names_the_cpu_config() {
    for gpus in [None, Some("")] {
        let site = gpu_site(gpus);
        let mut up = site.up();
        let status = up.wait(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(4), "4: this machine cannot run it");
        assert!(up.output().contains("topology-cpu.toml"), "{}", up.output());
        site.assert_nothing_left(Duration::from_secs(1)).await;
    }
}
