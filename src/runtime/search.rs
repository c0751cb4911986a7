//! Programs on PATH, and the Python behind a script.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// The first executable file of that name.
pub(super) fn find(name: &str, path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

pub(super) fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The interpreter that a script names in its first line, when that is a Python. Scripts of
/// relocatable environments start a shell that runs the `python` beside them.
pub(super) fn shebang_python(script: &Path, path: &OsStr) -> Option<PathBuf> {
    let mut start = Vec::new();
    File::open(script)
        .ok()?
        .take(1024)
        .read_to_end(&mut start)
        .ok()?;
    let start = String::from_utf8_lossy(&start);
    let mut words = start.lines().next()?.strip_prefix("#!")?.split_whitespace();
    let program = Path::new(words.next()?);
    let candidate = match program.file_name()?.to_str()? {
        "env" => {
            let name = words.find(|word| !word.starts_with('-'))?;
            find(name, path)?
        }
        "sh" | "bash" if start.lines().nth(1)?.contains("exec") => {
            script.canonicalize().ok()?.parent()?.join("python")
        }
        _ => program.to_owned(),
    };
    let is_python = candidate.file_name()?.to_str()?.starts_with("python");
    (is_python && is_executable(&candidate)).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn executable(path: &Path, text: &str) -> PathBuf {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_owned()
    }

    #[test]
    fn the_first_executable_of_an_absolute_directory_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::create_dir_all(one.join("vllm")).unwrap();
        fs::create_dir_all(&two).unwrap();
        let path = std::env::join_paths([Path::new("relative"), &one, &two]).unwrap();
        fs::write(two.join("vllm"), "not executable").unwrap();
        assert_eq!(find("vllm", &path), None);
        let program = executable(&two.join("vllm"), "#!/bin/sh\n");
        assert_eq!(find("vllm", &path), Some(program));
    }

    #[test]
    fn the_python_behind_a_script() {
        let dir = tempfile::tempdir().unwrap();
        let python = executable(&dir.path().join("python"), "");
        let python3 = executable(&dir.path().join("python3.11"), "");
        let path = dir.path().as_os_str();
        let relocatable = "#!/bin/sh\n'''exec' \"$(dirname -- \"$0\")\"/'python' \"$0\" \"$@\"\n";
        let cases = [
            (
                format!("#!{}\nimport x\n", python3.display()),
                Some(&python3),
            ),
            (format!("#!{} -I\n", python3.display()), Some(&python3)),
            ("#!/usr/bin/env python3.11\n".into(), Some(&python3)),
            ("#!/usr/bin/env -S python3.11 -I\n".into(), Some(&python3)),
            ("#!/usr/bin/env ruby\n".into(), None),
            ("#!/nowhere/python3\n".into(), None),
            ("#!/bin/bash\necho no python here\n".into(), None),
            ("\u{7f}ELF".into(), None),
            (relocatable.into(), Some(&python)),
        ];
        for (text, expected) in cases {
            let script = executable(&dir.path().join("vllm"), &text);
            let found = shebang_python(&script, path);
            let expected = expected.map(|path| {
                if text.starts_with("#!/bin/sh") {
                    path.canonicalize().unwrap()
                } else {
                    path.clone()
                }
            });
            assert_eq!(found, expected, "{text}");
        }
    }
}
