//! The guest side of the service VM's protocol: what runs where untrusted layer bytes are interpreted.
pub mod wire;
