//! `pegaflow status --watch` as a terminal shows it.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};

use crate::commands::told;
use crate::support::{HANG, Site};
use crate::wait_until;

const CLEAR: &[u8] = b"\x1b[2J";
const END_OF_FRAME: &[u8] = b"\x1b[?25h";

/// A command that has a terminal of its own.
struct Terminal {
    keyboard: File,
    tty: OwnedFd,
    child: Child,
    written: Arc<Mutex<Vec<u8>>>,
    size: (u16, u16),
}

impl Terminal {
    fn watch(site: &Site, (rows, columns): (u16, u16)) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let tty = || Stdio::from(pty.slave.try_clone().unwrap());
        // The terminal is the controlling one, so that Ctrl-C is a signal.
        let args = ["status", "--watch", "--interval", "100ms"];
        let mut command = site.command_under(&["setsid", "--ctty"], &args);
        command
            .env("TERM", "xterm")
            .stdin(tty())
            .stdout(tty())
            .stderr(tty());
        let child = command.spawn().unwrap();
        let written = Arc::new(Mutex::new(Vec::new()));
        let mut screen = File::from(pty.master.try_clone().unwrap());
        let seen = written.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = screen.read(&mut buffer) {
                seen.lock().unwrap().extend(&buffer[..count]);
            }
        });
        Self {
            keyboard: pty.master.into(),
            tty: pty.slave,
            child,
            written,
            size: (rows, columns),
        }
    }

    fn count(&self, part: &[u8]) -> usize {
        let written = self.written.lock().unwrap();
        let windows = written.windows(part.len());
        windows.filter(|window| *window == part).count()
    }

    async fn frames(&self, more: usize) {
        let before = self.count(END_OF_FRAME);
        let enough = async || self.count(END_OF_FRAME) >= before + more;
        wait_until(enough, "frames are drawn").await;
    }

    /// What stands on the screen now.
    fn screen(&self) -> vt100::Parser {
        let [rows, columns] = [self.size.0, self.size.1].map(|size| NonZero::new(size).unwrap());
        let mut parser = vt100::Parser::new(rows, columns, 0);
        parser.process(&self.written.lock().unwrap());
        parser
    }

    fn lines(&self) -> Vec<String> {
        let parser = self.screen();
        let rows = parser.screen().rows(0, self.size.1);
        rows.map(|row| row.trim_end().to_owned()).collect()
    }

    fn resize(&mut self, (rows, columns): (u16, u16)) {
        let size = [rows, columns].map(|number| number.to_string());
        let status = Command::new("stty")
            .args(["rows", &size[0], "cols", &size[1]])
            .stdin(self.tty.try_clone().unwrap())
            .status();
        assert!(status.unwrap().success());
        self.size = (rows, columns);
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(started.elapsed() < HANG, "the watch goes on");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_drawn_over_fits_the_terminal_and_ends_with_ctrl_c() {
    let site = Site::new();
    let up = site.up_ready().await;
    let name = format!("test-{}", site.port);
    let mut terminal = Terminal::watch(&site, (24, 80));
    terminal.frames(4).await;
    let lines = terminal.lines();
    assert!(lines[0].starts_with(&name), "{lines:#?}");
    let nodes = |line: &&String| line.starts_with("prefill ") || line.starts_with("decode ");
    assert_eq!(lines.iter().filter(nodes).count(), 2, "{lines:#?}");
    assert_eq!(terminal.count(CLEAR), 1, "cleared at the beginning only");

    // Too small for all of it: what fits, and how much does not.
    terminal.resize((5, 40));
    terminal.frames(3).await;
    assert_eq!(terminal.count(CLEAR), 2, "and once more for another size");
    let lines = terminal.lines();
    assert!(
        lines[0].starts_with(&name),
        "nothing was scrolled: {lines:#?}"
    );
    assert!(lines[3].contains("more lines"), "{lines:#?}");
    assert_eq!(lines[4], "");

    terminal.resize((24, 80));
    terminal.frames(2).await;
    terminal.keyboard.write_all(b"\x03").unwrap();
    assert_eq!(terminal.exit_code().await, Some(0));
    let parser = terminal.screen();
    assert!(!parser.screen().hide_cursor());
    assert!(parser.screen().cursor_position().0 >= 7, "below the table");
    up.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_look_stays_when_the_fleet_ends() {
    let site = Site::new();
    let mut up = site.up_ready().await;
    let mut terminal = Terminal::watch(&site, (24, 80));
    terminal.frames(2).await;
    told(&site, &["down"]).await;
    assert_eq!(up.wait(HANG).await.code(), Some(0));
    assert_eq!(terminal.exit_code().await, Some(6), "6: it runs no more");
    let has_ended = async || terminal.lines().join("\n").contains("error: ");
    wait_until(has_ended, "the end is told").await;
    let lines = terminal.lines();
    assert!(lines[0].contains(" up "), "{lines:#?}");
    assert!(!terminal.screen().screen().hide_cursor());
}

#[tokio::test(flavor = "multi_thread")]
async fn into_a_pipe_it_writes_one_table_after_the_other() {
    let site = Site::new();
    let up = site.up_ready().await;
    let args = ["status", "--watch", "--interval", "50ms"];
    let mut watch = site.command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let looks = tokio::task::spawn_blocking(move || {
        let mut looks = vec![vec![]];
        while looks.len() < 5 {
            let line = lines.next().unwrap().unwrap();
            assert!(!line.contains('\x1b'), "{line:?}");
            if line.starts_with("test-") {
                looks.push(vec![]);
            }
            looks.last_mut().unwrap().push(line);
        }
        looks
    });
    let looks = tokio::time::timeout(HANG, looks).await.unwrap().unwrap();
    assert!(looks[0].is_empty(), "it begins with the name");
    for look in &looks[1..3] {
        assert_eq!(look.last().unwrap(), "", "an empty line between: {look:#?}");
        assert!(look.iter().any(|line| line.starts_with("decode ")));
    }
    // The reader has left.
    let status = tokio::task::spawn_blocking(move || watch.wait());
    let status = tokio::time::timeout(HANG, status).await.unwrap().unwrap();
    assert_eq!(status.unwrap().code(), Some(0));
    up.stop().await;
}
