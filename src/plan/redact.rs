//! Command lines and environments without what must not be shown: what came from variables, and what a
//! name or the form of a URL says is secret.

use std::collections::BTreeMap;

use crate::topology::Secrets;

const HIDDEN: &str = "***";
/// Words of a flag's or a variable's name.
const SECRET_WORDS: &[&str] = &[
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "KEY",
    "APIKEY",
    "CREDENTIAL",
    "CREDENTIALS",
    "AUTH",
];

pub(super) fn env(env: &BTreeMap<String, String>, secrets: &Secrets) -> BTreeMap<String, String> {
    let shown = |(name, value): (&String, &String)| {
        let value = match is_secret(name) && !value.is_empty() {
            true => HIDDEN.to_owned(),
            false => without_password(&secrets.redact(value)),
        };
        (name.clone(), value)
    };
    env.iter().map(shown).collect()
}

pub(super) fn argv(argv: &[String], secrets: &Secrets) -> Vec<String> {
    let mut hide_next = false;
    let shown = argv.iter().map(|word| {
        let hide = std::mem::take(&mut hide_next);
        let Some(flag) = word.strip_prefix("--") else {
            return match hide {
                true => HIDDEN.to_owned(),
                false => without_password(&secrets.redact(word)),
            };
        };
        match flag.split_once('=') {
            Some((name, _)) if is_secret(name) => format!("--{name}={HIDDEN}"),
            None if is_secret(flag) => {
                hide_next = true;
                word.clone()
            }
            _ => without_password(&secrets.redact(word)),
        }
    });
    shown.collect()
}

fn is_secret(name: &str) -> bool {
    name.to_ascii_uppercase()
        .split(['_', '-', '.'])
        .any(|word| SECRET_WORDS.contains(&word))
}

/// `scheme://***@host` for `scheme://user:password@host`.
fn without_password(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let end = rest.find(['/', '?', ' ']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://{HIDDEN}@{host}{path}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_by_their_names_and_forms() {
        let words = [
            "vllm",
            "--hf-token",
            "abc",
            "--api_key=def",
            "--max-num-batched-tokens",
            "8192",
            "--proxy=http://user:pw@host/x",
            "http://host/a@b",
        ]
        .map(str::to_owned);
        assert_eq!(
            argv(&words, &Secrets::default()),
            [
                "vllm",
                "--hf-token",
                "***",
                "--api_key=***",
                "--max-num-batched-tokens",
                "8192",
                "--proxy=http://***@host/x",
                "http://host/a@b",
            ]
        );
        let variables = [
            ("HF_TOKEN", "a"),
            ("TOKENIZERS_PARALLELISM", "1"),
            ("KEY", ""),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let shown = env(&BTreeMap::from(variables), &Secrets::default());
        let values: Vec<_> = shown.values().map(String::as_str).collect();
        assert_eq!(values, ["***", "", "1"]);
    }
}
