//! VHD and VHDX disk images: fixed and dynamic VHD ([`vhd`]) and VHDX ([`vhdx`]).

pub mod vhd;
pub mod vhdx;
