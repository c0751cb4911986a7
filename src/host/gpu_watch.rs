//! Figures of the GPUs while nodes run on them.
//!
//! ```text
//! NVML ◀── one thread, each INTERVAL ──▶ the last figures ──▶ /metrics, status, /v1/fleet
//! ```
//!
//! NVML hangs with its driver, and a call that hangs cannot be ended. So only this thread makes calls:
//! readers get what it found last, marked as unanswered once that is older than [`STALE`], and the end
//! waits for the thread for [`END_LIMIT`] and then leaves it behind.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, EventSet, Nvml};
use serde::{Deserialize, Serialize};

use super::gpus::{devices, nvml};

const INTERVAL: Duration = Duration::from_secs(2);
const STALE: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_millis(500);
/// Events taken from one GPU in one round; a GPU that goes mad has more.
const EVENTS: usize = 64;

/// One GPU at one moment; what the driver does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuFigures {
    pub index: u32,
    pub uuid: String,
    pub name: String,
    /// The driver spoke of it within the last seconds; otherwise the figures are missing.
    pub answers: bool,
    pub memory_used: Option<u64>,
    pub memory_total: Option<u64>,
    /// Of the last seconds, the time in which anything ran.
    pub utilization_percent: Option<u32>,
    pub temperature_celsius: Option<u32>,
    /// Since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// Critical errors (Xid) since pegaflow watches; `None`: the driver reports none here.
    pub xids: Option<u64>,
    pub last_xid: Option<u64>,
}

impl GpuFigures {
    fn unanswered(&self) -> Self {
        Self {
            index: self.index,
            uuid: self.uuid.clone(),
            name: self.name.clone(),
            xids: self.xids,
            last_xid: self.last_xid,
            ..Self::default()
        }
    }
}

/// For readers; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct GpuWatch(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    figures: Vec<GpuFigures>,
    taken: Option<Instant>,
    stop: bool,
    ended: bool,
}

impl GpuWatch {
    /// By index; empty where nothing is watched.
    pub fn latest(&self) -> Vec<GpuFigures> {
        let state = self.0.lock();
        let fresh = state.taken.is_some_and(|taken| taken.elapsed() < STALE);
        match fresh {
            true => state.figures.clone(),
            false => state.figures.iter().map(GpuFigures::unanswered).collect(),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True: go on.
    fn pause(&self) -> bool {
        let state = self.lock();
        let waiting = |state: &mut State| !state.stop;
        let waited = self.changed.wait_timeout_while(state, INTERVAL, waiting);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.stop
    }
}

/// The running thread. Dropping it ends it.
#[derive(Debug)]
pub struct GpuWatcher(GpuWatch);

impl GpuWatcher {
    /// Watches these GPUs, by index; none: starts no thread.
    pub fn start(gpus: Vec<u32>) -> std::io::Result<Self> {
        let watch = GpuWatch::default();
        if gpus.is_empty() {
            watch.0.lock().ended = true;
            return Ok(Self(watch));
        }
        let shared = watch.0.clone();
        thread::Builder::new()
            .name("gpu-watch".to_owned())
            .spawn(move || {
                run(&gpus, &shared);
                shared.lock().ended = true;
                shared.changed.notify_all();
            })?;
        Ok(Self(watch))
    }

    pub fn watch(&self) -> GpuWatch {
        self.0.clone()
    }
}

impl Drop for GpuWatcher {
    fn drop(&mut self) {
        let shared = &self.0.0;
        let mut state = shared.lock();
        state.stop = true;
        shared.changed.notify_all();
        let running = |state: &mut State| !state.ended;
        let ended = shared.changed.wait_timeout_while(state, END_LIMIT, running);
        let (state, _) = ended.unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            tracing::warn!(
                "the GPU driver does not answer; the thread that asked it is left behind"
            );
        }
    }
}

fn run(gpus: &[u32], shared: &Shared) {
    let mut told = false;
    loop {
        // Returns when the driver has to be opened again: it was reloaded, or no GPU answers.
        let watched = nvml().and_then(|nvml| watch(&nvml, gpus, shared));
        if let Err(error) = watched
            && !std::mem::replace(&mut told, true)
        {
            tracing::warn!("the figures of the GPUs are not known: {error}");
        }
        if !shared.pause() {
            return;
        }
    }
}

fn watch(nvml: &Nvml, gpus: &[u32], shared: &Shared) -> Result<(), NvmlError> {
    let (found, _) = devices(nvml)?;
    let mut watched: Vec<Watched<'_>> = found
        .into_iter()
        .filter(|(gpu, _)| gpus.contains(&gpu.index))
        .map(|(gpu, device)| {
            let known = GpuFigures {
                index: gpu.index,
                uuid: gpu.uuid,
                name: gpu.name,
                ..GpuFigures::default()
            };
            Watched::new(nvml, device, known, shared)
        })
        .collect();
    loop {
        let figures: Vec<GpuFigures> = watched.iter_mut().map(Watched::look).collect();
        let answers = figures.iter().any(|figures| figures.answers);
        {
            let mut state = shared.lock();
            // Those that are lost while the driver is opened again stay listed.
            if answers || state.figures.is_empty() {
                state.figures = figures;
                state.taken = Some(Instant::now());
            }
        }
        if !answers || !shared.pause() {
            return Ok(());
        }
    }
}

struct Watched<'n> {
    device: Device<'n>,
    events: Option<EventSet<'n>>,
    last: GpuFigures,
}

impl<'n> Watched<'n> {
    fn new(nvml: &'n Nvml, device: Device<'n>, known: GpuFigures, shared: &Shared) -> Self {
        let set = nvml.create_event_set().ok();
        let events = set.and_then(|set| {
            let wanted = EventTypes::CRITICAL_XID_ERROR;
            device.register_events(wanted, set).ok()
        });
        // What was counted before the driver was opened again still happened.
        let state = shared.lock();
        let before = state
            .figures
            .iter()
            .find(|before| before.uuid == known.uuid);
        let last = GpuFigures {
            xids: before
                .and_then(|before| before.xids)
                .or(events.as_ref().map(|_| 0)),
            last_xid: before.and_then(|before| before.last_xid),
            ..known
        };
        Self {
            device,
            events,
            last,
        }
    }

    fn look(&mut self) -> GpuFigures {
        self.count_events();
        let device = &self.device;
        let memory = device.memory_info().ok();
        let utilization = device.utilization_rates().ok();
        let temperature = device.temperature(TemperatureSensor::Gpu).ok();
        let answers = device.uuid().is_ok();
        if !answers {
            return self.last.unanswered();
        }
        GpuFigures {
            answers,
            memory_used: memory.as_ref().map(|memory| memory.used),
            memory_total: memory.as_ref().map(|memory| memory.total),
            utilization_percent: utilization.map(|rates| rates.gpu),
            temperature_celsius: temperature,
            ecc_uncorrected: device
                .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
                .ok(),
            ..self.last.clone()
        }
    }

    fn count_events(&mut self) {
        let Some(events) = &self.events else { return };
        for _ in 0..EVENTS {
            // No event: a timeout, at once.
            let Ok(event) = events.wait(0) else { return };
            self.last.xids = Some(self.last.xids.unwrap_or(0) + 1);
            if let Some(XidError::Value(xid)) = event.event_data {
                self.last.last_xid = Some(xid);
            }
            let GpuFigures {
                index, last_xid, ..
            } = &self.last;
            let xid = last_xid.map_or_else(|| "unknown".to_owned(), |xid| xid.to_string());
            tracing::error!(
                "GPU {index} reports a critical error, Xid {xid}: the kernel's log (dmesg) and NVIDIA's \
                 list of Xid errors say what it means"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(taken: Option<Instant>) -> GpuWatch {
        let watch = GpuWatch::default();
        let mut state = watch.0.lock();
        state.taken = taken;
        state.figures = vec![GpuFigures {
            uuid: "GPU-a".to_owned(),
            answers: true,
            memory_used: Some(7),
            xids: Some(2),
            last_xid: Some(79),
            ..GpuFigures::default()
        }];
        drop(state);
        watch
    }

    #[test]
    fn figures_of_a_driver_that_hangs_are_not_passed_on() {
        let fresh = watch(Some(Instant::now())).latest().remove(0);
        assert!(fresh.answers && fresh.memory_used == Some(7));
        for taken in [None, Instant::now().checked_sub(STALE)] {
            let stale = watch(taken).latest().remove(0);
            assert_eq!((stale.answers, stale.memory_used), (false, None));
            // What happened has happened.
            assert_eq!((stale.xids, stale.last_xid), (Some(2), Some(79)));
            assert_eq!(stale.uuid, "GPU-a");
        }
    }

    #[test]
    fn without_gpus_nothing_is_watched() {
        let watcher = GpuWatcher::start(Vec::new()).unwrap();
        assert_eq!(watcher.watch().latest(), []);
        let started = Instant::now();
        drop(watcher);
        assert!(started.elapsed() < END_LIMIT, "it waited for no thread");
    }
}
