//! Runs cells side by side, each in a world of its own, and tells what came of them.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};

use crate::aftermath;
use crate::cell::{Cell, MOMENTS, SIGNALS, TARGETS};

/// Every wait of a cell has a limit of its own; this is for all of them together.
const CELL_LIMIT: Duration = Duration::from_secs(240);

/// How long it took until all was well again, if it was not all the time; or what went wrong.
pub type Outcome = Result<Option<Duration>, String>;

/// Plays all cells, `width` at a time. Those that have not begun at the end of `limit` have failed.
pub fn play(cells: &[Cell], width: usize, limit: Duration) -> Vec<(Cell, Outcome)> {
    // A process that dies of SEGV would leave its memory on the disk.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).unwrap();
    let end = Instant::now() + limit;
    let queue = Mutex::new(cells.iter().copied());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..width {
            scope.spawn(|| {
                loop {
                    let Some(cell) = queue.lock().unwrap().next() else {
                        return;
                    };
                    let outcome = if Instant::now() < end {
                        play_one(cell)
                    } else {
                        Err("not begun in time".to_owned())
                    };
                    eprintln!("{cell}: {}", told(&outcome));
                    done.lock().unwrap().push((cell, outcome));
                }
            });
        }
    });
    done.into_inner().unwrap()
}

fn play_one(cell: Cell) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let playing = || {
        runtime.block_on(async {
            let playing = tokio::time::timeout(CELL_LIMIT, aftermath::play(cell));
            playing.await.expect("the cell takes too long")
        })
    };
    catch_unwind(AssertUnwindSafe(playing)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "a panic without words".to_owned())
    })
}

/// Fails with a list of what failed.
pub fn check(outcomes: &[(Cell, Outcome)]) {
    let failed: Vec<String> = outcomes
        .iter()
        .filter_map(|(cell, outcome)| {
            let why = outcome.as_ref().err()?;
            Some(format!("{cell}: {why}"))
        })
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

fn told(outcome: &Outcome) -> String {
    match outcome {
        Ok(Some(took)) => took.as_millis().to_string(),
        Ok(None) => "unmoved".to_owned(),
        Err(_) => "**failed**".to_owned(),
    }
}

/// Markdown: a row for each process and signal, a column for each moment.
pub fn table(outcomes: &[(Cell, Outcome)]) -> String {
    let by_cell: HashMap<String, String> = outcomes
        .iter()
        .map(|(cell, outcome)| (cell.to_string(), told(outcome)))
        .collect();
    let mut text = "| | ".to_owned();
    text += &MOMENTS.map(|moment| moment.to_string()).join(" | ");
    text += " |\n|---|";
    text += &"---:|".repeat(MOMENTS.len());
    for target in TARGETS {
        for signal in SIGNALS {
            let _ = write!(text, "\n| {target} {} |", &signal.as_str()[3..]);
            for moment in MOMENTS {
                let cell = Cell {
                    target,
                    signal,
                    moment,
                };
                let told = by_cell.get(&cell.to_string()).map_or("", String::as_str);
                let _ = write!(text, " {told} |");
            }
        }
    }
    text
}
