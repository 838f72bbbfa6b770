//! Labels of a snapshot: what an Update changes, and how large they may be.
//!
//! ```text
//!   labels now ─┐
//!   labels sent ┼─ mask: "" ∣ "labels" ∣ "labels.K" … ─► labels then, without empty values
//! ```
//!
//! The model is `UpdateInfo` of containerd's `core/snapshots/storage/bolt.go` with `WriteLabels` of its `boltutil`:
//!
//! | mask | labels then |
//! |---|---|
//! | no paths | those that were sent |
//! | `labels` | those that were sent |
//! | `labels.K` | those of now, with K as it was sent; K goes if it was not sent, or sent empty |
//! | several | one after the other |
//! | anything else | [`LabelError::Path`]; nothing changes |
//!
//! containerd stores no label with an empty value, whatever call sends it, and leaves it out of the reply: so [`stored`] is
//! for the labels of Prepare, View and Commit too. The limit of a label's size is enforced by containerd's metadata store
//! (`pkg/labels/validate.go`) above the snapshotter; here it holds for every client of the socket. Called by the service's
//! calls that take labels.

use std::collections::BTreeMap;

/// Bytes of a label's key and value together.
pub const MAX_LABEL: usize = 4096;
/// The path of all labels.
const ALL: &str = "labels";
/// What the path of one label starts with.
const ONE: &str = "labels.";
/// Bytes of a key that an error shows.
const SHOWN: usize = 64;

/// Labels.
pub type Labels = BTreeMap<String, String>;

/// Why labels are refused; `InvalidArgument` on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A mask's path that names no labels, escaped and cut.
    #[error("the field '{0}' of a snapshot cannot be updated; only labels can")]
    Path(String),
    /// A key and its value are too long.
    #[error("the label '{key}' has {bytes} bytes with its value, more than the limit of {MAX_LABEL}")]
    TooLong {
        /// The start of the key, escaped.
        key: String,
        /// Bytes of key and value.
        bytes: usize,
    },
    /// A key without characters.
    #[error("a label has no key")]
    NoKey,
}

/// The labels of a snapshot after an Update: its labels now, those that were sent, and the paths of the mask.
///
/// # Errors
/// [`LabelError`]: a path names something else, or a label is invalid.
pub fn updated<S: AsRef<str>>(now: &Labels, sent: &Labels, mask: &[S]) -> Result<Labels, LabelError> {
    if mask.is_empty() {
        return stored(sent);
    }
    let mut then = now.clone();
    for path in mask {
        let path = path.as_ref();
        if let Some(key) = path.strip_prefix(ONE) {
            then.insert(key.to_owned(), sent.get(key).cloned().unwrap_or_default());
        } else if path == ALL {
            then.clone_from(sent);
        } else {
            return Err(LabelError::Path(shown(path)));
        }
    }
    stored(&then)
}

/// Labels as they are kept: without empty values.
///
/// # Errors
/// [`LabelError`]: a label has no key, or is larger than [`MAX_LABEL`].
pub fn stored(labels: &Labels) -> Result<Labels, LabelError> {
    let mut kept = Labels::new();
    for (key, value) in labels {
        let bytes = key.len() + value.len();
        if bytes > MAX_LABEL {
            return Err(LabelError::TooLong { key: shown(key), bytes });
        }
        if value.is_empty() {
            continue;
        }
        if key.is_empty() {
            return Err(LabelError::NoKey);
        }
        kept.insert(key.clone(), value.clone());
    }
    Ok(kept)
}

/// The start of a client's text, escaped.
fn shown(text: &str) -> String {
    let end = text.floor_char_boundary(SHOWN);
    text[..end].escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_mask_chooses_what_changes() {
        let now = labels(&[("a", "1"), ("b", "2"), ("c.d/e", "3")]);
        let sent = labels(&[("b", "new"), ("c.d/e", ""), ("f", "4"), ("g", "")]);
        for (mask, then) in [
            (&[][..], &[("b", "new"), ("f", "4")][..]),
            (&["labels"], &[("b", "new"), ("f", "4")]),
            (&["labels.b"], &[("a", "1"), ("b", "new"), ("c.d/e", "3")]),
            (&["labels.f", "labels.b"], &[("a", "1"), ("b", "new"), ("c.d/e", "3"), ("f", "4")]),
            // Sent empty, and not sent.
            (&["labels.c.d/e"], &[("a", "1"), ("b", "2")]),
            (&["labels.a"], &[("b", "2"), ("c.d/e", "3")]),
            (&["labels.unknown"], &[("a", "1"), ("b", "2"), ("c.d/e", "3")]),
            // One after the other: the last path decides.
            (&["labels.a", "labels"], &[("b", "new"), ("f", "4")]),
            (&["labels", "labels.a"], &[("b", "new"), ("f", "4")]),
            // An empty key that was not sent removes nothing.
            (&["labels."], &[("a", "1"), ("b", "2"), ("c.d/e", "3")]),
        ] {
            assert_eq!(updated(&now, &sent, mask), Ok(labels(then)), "{mask:?}");
        }
    }

    #[test]
    fn a_mask_of_anything_but_labels_is_refused() {
        let now = labels(&[("a", "1")]);
        for path in ["", "name", "kind", "parent", "label", "Labels", "labels\n", "updated_at", "info.labels"]
        {
            for mask in [&[path][..], &["labels", path], &[path, "labels.a"]] {
                let refused = updated(&now, &labels(&[]), mask);
                assert!(matches!(refused, Err(LabelError::Path(_))), "{mask:?}: {refused:?}");
            }
        }
        let error = updated(&now, &now, &[format!("a\u{1b}{}", "ä".repeat(100))]).unwrap_err().to_string();
        assert!(error.starts_with(r"the field 'a\u{1b}ä") && error.len() < 200, "{error}");
    }

    #[test]
    fn a_label_has_at_most_4096_bytes() {
        let label = |key: usize, value: usize| labels(&[(&"k".repeat(key), &"v".repeat(value))]);
        for (key, value) in [(1, 4095), (4095, 1), (4096, 0), (0, 0)] {
            assert!(stored(&label(key, value)).is_ok(), "{key} + {value}");
        }
        for (key, value) in [(1, 4096), (4096, 1), (4097, 0), (5000, 5000)] {
            let refused = stored(&label(key, value)).unwrap_err();
            assert_eq!(refused, LabelError::TooLong { key: "k".repeat(key.min(64)), bytes: key + value });
        }
        // In bytes, not in characters.
        assert!(stored(&labels(&[("k", &"ä".repeat(2048))])).is_err());
        assert_eq!(stored(&labels(&[("", "v")])), Err(LabelError::NoKey));
        // What stays is checked again with what is sent.
        let now = label(1, 4096);
        assert!(updated(&now, &labels(&[]), &["labels.other"]).is_err());
    }
}
