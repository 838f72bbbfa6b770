//! On-disk structures. (Placeholder of branch ext4r until ext4w's module is merged.)
pub mod journal;
