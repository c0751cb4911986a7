//! The GPUs' figures for `/metrics`.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::host::{GpuFigures, GpuWatch};

/// Reads what the watching thread found last; never asks the driver.
#[derive(Debug)]
pub struct GpuCollector(pub GpuWatch);

impl Collector for GpuCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        type Figure = fn(&GpuFigures) -> Option<u64>;
        let gauges: [(&str, &str, Figure); 6] = [
            ("up", "1 while the driver answers for it", |gpu| {
                Some(gpu.answers.into())
            }),
            ("memory_used_bytes", "Memory in use, by whomever", |gpu| {
                gpu.memory_used
            }),
            ("memory_total_bytes", "All of its memory", |gpu| {
                gpu.memory_total
            }),
            (
                "utilization_percent",
                "Of the last seconds, the time in which anything ran",
                |gpu| gpu.utilization_percent.map(u64::from),
            ),
            ("temperature_celsius", "Of the chip", |gpu| {
                gpu.temperature_celsius.map(u64::from)
            }),
            (
                "ecc_uncorrected_errors",
                "Memory errors since the driver was loaded",
                |gpu| gpu.ecc_uncorrected,
            ),
        ];
        let gpus = self.0.latest();
        if gpus.is_empty() {
            return Ok(());
        }
        for (name, help, figure) in gauges {
            let name = format!("pegaflow_gpu_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for gpu in &gpus {
                let Some(value) = figure(gpu) else { continue };
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                ConstGauge::new(value).encode(family.encode_family(&labels(gpu))?)?;
            }
        }
        let (name, help) = ("pegaflow_gpu_xid_errors", "Critical errors since the start");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for gpu in &gpus {
            if let Some(xids) = gpu.xids {
                ConstCounter::new(xids).encode(family.encode_family(&labels(gpu))?)?;
            }
        }
        Ok(())
    }
}

fn labels(gpu: &GpuFigures) -> [(&'static str, String); 2] {
    [("gpu", gpu.index.to_string()), ("uuid", gpu.uuid.clone())]
}
