//! The `lcow-graphdriver` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        #[cfg(target_os = "linux")]
        Some((command, rest)) if command == "worker" => {
            use lcow_graphdriver::agent::{
                codec::{Codec, RealCodec},
                worker_main,
            };
            let codec: std::sync::Arc<dyn Codec> = std::sync::Arc::new(RealCodec);
            let status = worker_main(rest, &codec);
            ExitCode::from(u8::try_from(status).unwrap_or(1))
        }
        _ => ExitCode::from(2),
    }
}
