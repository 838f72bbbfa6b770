//! `/init` of a service VM's guest; everything is in the library. `scripts/build-svm-image` links it statically.

#[cfg(target_os = "linux")]
fn main() {
    if std::process::id() != 1 {
        eprintln!("lcow-agent: this is the first process of a service VM's guest; it is of no use elsewhere");
        std::process::exit(2);
    }
    svm_agent::guest::main()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("lcow-agent: runs in Linux guests only");
    std::process::exit(2);
}
