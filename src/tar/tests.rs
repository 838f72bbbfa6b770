//! Tests of the reader on archives made here byte by byte.
use super::*;
