//! ext4: layout, writer, blank formatter, reader, checker.
