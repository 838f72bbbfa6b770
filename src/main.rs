//! The `lcow-graphdriver` program.
fn main() {}
