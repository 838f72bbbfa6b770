//! Names of images, as Docker writes and shortens them.
//!
//! ```text
//!   busybox ─► docker.io/library/busybox:latest          ghcr.io/a/b@sha256:… ─► ghcr.io/a/b@sha256:…
//! ```
//!
//! Rules of `distribution/reference` (`normalize.go`), for comparison only: nothing is looked up by the result. Called by
//! `resolve`, `docker` and `registry`.

/// The registry of names without a host.
pub(crate) const DOCKER_HUB: &str = "docker.io";

/// The full form of a name.
pub(crate) fn full(name: &str) -> String {
    let (name, digest) = match name.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (name, None),
    };
    let (host, path) = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
        _ => (DOCKER_HUB, name),
    };
    let host = if host == "index.docker.io" { DOCKER_HUB } else { host };
    let library = if host == DOCKER_HUB && !path.contains('/') { "library/" } else { "" };
    let tagged = path.rsplit('/').next().is_some_and(|last| last.contains(':'));
    match digest {
        Some(digest) => format!("{host}/{library}{path}@{digest}"),
        None if tagged => format!("{host}/{library}{path}"),
        None => format!("{host}/{library}{path}:latest"),
    }
}

/// Whether an image that is listed as `listed` (a name, or a bare tag) is the one that `wanted` names.
pub(crate) fn matches(listed: &str, wanted: &str) -> bool {
    listed == wanted || full(listed) == full(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_in_full() {
        for (name, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("a/b", "docker.io/a/b:latest"),
            ("index.docker.io/a/b:c", "docker.io/a/b:c"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
            ("ghcr.io/a/b@sha256:00", "ghcr.io/a/b@sha256:00"),
        ] {
            assert_eq!(full(name), expected);
        }
        assert!(matches("docker.io/library/busybox:latest", "busybox"));
        assert!(matches("1.0", "1.0"));
        assert!(!matches("busybox:1", "busybox:2"));
    }
}
