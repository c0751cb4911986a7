//! The nodes' phases for `/metrics`.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::fleet::{FleetWatch, Phase};

/// `pegaflow_node_*` and `pegaflow_build_info`.
#[derive(Debug)]
pub struct NodeCollector(pub FleetWatch);

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = ("pegaflow_build_info", "1; which pegaflow this is");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        ConstGauge::new(1_i64).encode(family.encode_family(&version)?)?;

        let fleet = self.0.now();
        if fleet.nodes().next().is_none() {
            return Ok(());
        }
        let (name, help) = ("pegaflow_node_ready", "1 while the node takes requests");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for node in fleet.nodes() {
            let role = node.role.to_string();
            let labels = [("node", node.id.as_str()), ("role", role.as_str())];
            ConstGauge::new(i64::from(node.is_ready())).encode(family.encode_family(&labels)?)?;
        }
        let (name, help) = (
            "pegaflow_node_hands_off",
            "1 while the node is ready and what it saves or loads has been proven right",
        );
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for node in fleet.nodes() {
            let labels = [("node", node.id.as_str())];
            let is = node.is_ready() && node.can_hand_off();
            ConstGauge::new(i64::from(is)).encode(family.encode_family(&labels)?)?;
        }
        let (name, help) = ("pegaflow_node_phase", "1 for the phase that the node is in");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for node in fleet.nodes() {
            for phase in Phase::LABELS {
                let labels = [("node", node.id.as_str()), ("phase", phase)];
                let is = node.phase.label() == phase;
                ConstGauge::new(i64::from(is)).encode(family.encode_family(&labels)?)?;
            }
        }
        let (name, help) = ("pegaflow_node_starts", "Times that the node was started");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for node in fleet.nodes().filter(|node| !node.external) {
            let labels = [("node", node.id.as_str())];
            ConstCounter::new(node.incarnation).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
