//! ext4: layout, writer, blank formatter, reader, checker.
pub mod format;
