//! pegaflow: prefill/decode-disaggregated (P/D) vLLM serving on one machine.
//!
//! `pegaflow up topology.toml` is one process: it reads a [`topology`], looks at the [`host`], makes a
//! [`plan`], and then runs three parts that do not know each other and meet only in [`cli`]:
//!
//! - [`supervise`]: one actor per node; starts vLLM under a guard process, probes it, proves with a
//!   canary that its KV is right, restarts it. The only writer of the [`fleet`].
//! - [`engine`] (PegaEngine): owns the shared-memory arena and its index; vLLM workers copy KV in and
//!   out by themselves; tells the [`handoff`] board when a prompt's KV is complete.
//! - [`router`]: OpenAI-compatible HTTP; sends a request to a prefill node, waits on the hand-off
//!   board, and sends the same prompt to a decode node.
//!
//! - [`bench`]: a load on any OpenAI endpoint, and what it felt like there.
//! - [`notify`]: what a service manager is told.
//! - [`control`]: an API on a Unix socket for whoever operates it.
//!
//! Data flows one way: TOML -> Topology -> (host snapshot) -> Plan -> Fleet -> {supervise | engine |
//! router} -> observe. Imports only go downward in the order of the `mod` lines below
//! (`tests/tidy.rs` checks it).
//!
//! # Vocabulary
//!
//! - **Block**: the unit of vLLM's KV cache, in tokens. **Chunk**: the unit of the store: one block of
//!   one KV group, all ranks. **Slot**: a chunk's place in the arena. **Ref**: slot and generation.
//! - **Hand-off**: one prompt's KV on its way from a prefill to a decode node.
//! - **Lease**: a pin on chunks, held by a request. **Session**: one vLLM process's connection.
//! - **Incarnation**: one life of a node, numbered from 1. **Drain**: finish what runs, take nothing new.

pub mod bench;
pub mod cli;
pub mod control;
pub mod dashboard;
pub mod engine;
pub mod fleet;
pub mod handoff;
pub mod host;
pub mod instance;
pub mod live;
pub mod model;
pub mod notify;
pub mod observe;
pub mod plan;
pub mod reach;
pub mod router;
pub mod runtime;
pub mod shutdown;
pub mod supervise;
pub mod topology;
pub mod traffic;
