//! The `lcow-graphdriver` program; everything is in the library.

fn main() -> std::process::ExitCode {
    lcow_graphdriver::cli::run()
}
