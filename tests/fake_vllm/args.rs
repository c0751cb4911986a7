//! The part of vLLM's command line that matters here; everything else is skipped.

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Args {
    pub model: String,
    pub served_name: String,
    pub host: String,
    pub port: u16,
    pub block_size: usize,
    pub tensor_parallel: u32,
    pub max_model_len: usize,
    /// Requests that run at a time; more wait.
    pub max_num_seqs: usize,
    pub connector: bool,
    /// Only in a worker process.
    pub rank: u32,
}

impl Args {
    /// Accepts `serve MODEL --flags`, `-m MODULE --model MODEL --flags` and `ROLE --flags`.
    pub fn parse(argv: &[String]) -> Self {
        let mut model = None;
        let mut flags = Vec::new();
        let mut rest = argv.iter().peekable();
        while let Some(arg) = rest.next() {
            if arg == "serve" {
                model = rest.next_if(|next| !next.starts_with('-')).cloned();
            } else if arg == "-m" {
                rest.next();
            } else if let Some(flag) = arg.strip_prefix("--") {
                let (name, value) = match flag.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (flag, rest.next_if(|next| !next.starts_with("--")).cloned()),
                };
                flags.push((name.replace('_', "-"), value.unwrap_or_default()));
            }
        }
        let get = |name: &str| {
            let found = flags.iter().rev().find(|(flag, _)| flag == name);
            found.map(|(_, value)| value.clone())
        };
        let number = |name: &str, default: usize| {
            get(name).map_or(default, |value| {
                value.parse().unwrap_or_else(|_| panic!("--{name} {value}"))
            })
        };
        let model = get("model").or(model).unwrap_or_else(|| "fake".to_owned());
        Self {
            served_name: get("served-model-name").unwrap_or_else(|| model.clone()),
            model,
            host: get("host").unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: u16::try_from(number("port", 8000)).unwrap(),
            block_size: number("block-size", 16),
            tensor_parallel: u32::try_from(number("tensor-parallel-size", 1)).unwrap(),
            max_model_len: number("max-model-len", 40_960),
            max_num_seqs: number("max-num-seqs", 256),
            connector: get("kv-transfer-config").is_some_and(|value| !value.is_empty()),
            rank: u32::try_from(number("rank", 0)).unwrap(),
        }
    }

    /// The arguments for a child process, which parses them with [`Args::parse`].
    pub fn for_child(&self, role: &str, rank: u32) -> Vec<String> {
        let connector = if self.connector { "yes" } else { "" };
        vec![
            role.to_owned(),
            format!("--model={}", self.model),
            format!("--served-model-name={}", self.served_name),
            format!("--block-size={}", self.block_size),
            format!("--tensor-parallel-size={}", self.tensor_parallel),
            format!("--kv-transfer-config={connector}"),
            format!("--rank={rank}"),
        ]
    }
}
