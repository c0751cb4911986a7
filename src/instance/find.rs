//! Looking for instances, from outside. Changes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{InstanceError, InstanceInfo, Places, place, running_in};

/// Everything of this user's that runs, ordered by name.
pub fn all_running() -> Result<Vec<(String, InstanceInfo)>, InstanceError> {
    let places = Places::from_env()?;
    let mut found = Vec::new();
    for name in names_in(&places.run) {
        if let Some(info) = running_in(&places, &name)? {
            found.push((name, info));
        }
    }
    Ok(found)
}

/// Where the logs of an instance are, if it has ever run here.
pub fn logs_of(name: &str) -> Result<Option<PathBuf>, InstanceError> {
    place::check_name(name)?;
    let dir = logs_in(&Places::from_env()?, name);
    Ok(dir.is_dir().then_some(dir))
}

/// The instance that has written a log last, and where.
pub fn last_logs() -> Result<Option<(String, PathBuf)>, InstanceError> {
    let places = Places::from_env()?;
    let mut last: Option<(SystemTime, String)> = None;
    for name in names_in(&places.state) {
        let written = newest_file(&logs_in(&places, &name));
        if let Some(written) = written
            && last.as_ref().is_none_or(|(time, _)| *time < written)
        {
            last = Some((written, name));
        }
    }
    Ok(last.map(|(_, name)| {
        let dir = logs_in(&places, &name);
        (name, dir)
    }))
}

fn logs_in(places: &Places, name: &str) -> PathBuf {
    places.state.join(name).join("logs")
}

/// A directory that does not exist holds nothing.
fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names
        .filter(|name| place::check_name(name).is_ok())
        .collect();
    names.sort();
    names
}

fn newest_file(dir: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let times = entries.filter_map(|entry| entry.metadata().ok()?.modified().ok());
    times.max()
}
