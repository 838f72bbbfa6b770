//! What containerd's keys tell of a snapshot.
//!
//! ```text
//!   default/6/sha256:…                             <namespace>/<number>/<client's key>, made by containerd's metadata store
//!   default/3/extract-617573825-32Yj sha256:…      to be unpacked into: made by its unpacker and all its clients
//! ```
//!
//! Keys of other clients of the socket are free text, without a namespace. Pure functions. Called by the other parts of this
//! module, `containerd` and `cli`.

/// Part of the key of a snapshot that a layer is to be unpacked into (`core/unpack/unpacker.go`, `UnpackKeyPrefix`).
const EXTRACTION_KEY: &str = "extract-";

/// Namespace and the client's own key; the namespace is empty for keys of another form.
pub fn parts(name: &str) -> (&str, &str) {
    let mut parts = name.splitn(3, '/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(namespace), Some(number), Some(key))
            if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) =>
        {
            (namespace, key)
        }
        _ => ("", name),
    }
}

/// Whether a snapshot of this key is to be unpacked into.
pub(super) fn is_extraction(key: &str) -> bool {
    key.contains(EXTRACTION_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_containerd_have_a_namespace_and_others_do_not() {
        for (name, expected) in [
            ("default/6/sha256:ab", ("default", "sha256:ab")),
            ("k8s.io/12//tmp/x", ("k8s.io", "/tmp/x")),
            ("moby/7/48bf-init-key", ("moby", "48bf-init-key")),
            ("default/x/key", ("", "default/x/key")),
            ("default//key", ("", "default//key")),
            ("a/1", ("", "a/1")),
            ("free text", ("", "free text")),
            ("", ("", "")),
        ] {
            assert_eq!(parts(name), expected, "{name}");
        }
        assert!(is_extraction("default/3/extract-617573825-32Yj sha256:ab") && !is_extraction("default/3/x"));
    }
}
