//! Profile `hcsshim` held to hcsshim's `tar2ext4`: by hashes of what that tool made, and against the tool itself.

mod tars;
mod tool;
