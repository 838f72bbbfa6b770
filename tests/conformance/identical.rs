//! The same layers give the same bytes, whoever makes them, and any backend reads what another one wrote.

use crate::{
    files::{Files, Tar, body, noise, tree},
    suite::{Backend, END, pool},
};
use lcow_graphdriver::svm::{Mode, ParentDisks, Purpose};

/// The tars of [`bytes`]: a base, and a layer on it with whiteouts, changes and a link to a file of the base.
fn chain() -> [(&'static str, Vec<u8>); 2] {
    let top = Tar::default()
        .folder("d0/")
        .file("d0/.wh.f1", b"")
        .file("d0/f2", &noise(300_001, 99))
        .folder("d1/")
        .file("d1/.wh..wh..opq", b"")
        .file("d1/new", b"new")
        .entry("d1/linked", b'1', b"", "d0/f5")
        .end();
    [("base", tree(150, 7000, 3)), ("top", top)]
}

/// All bytes that a backend makes of the same layers: what it is called and the bytes. Images and records go to `files`.
pub(crate) async fn bytes(backend: Backend, files: &Files) -> Vec<(String, Vec<u8>)> {
    let pool = pool(&backend, Mode::Safe);
    let mut all = Vec::new();
    for (name, tar) in chain() {
        let lease = pool.lease(name, Purpose::Work).await.unwrap();
        let mut job = files.apply_job(name);
        if name == "top" {
            job.lowers = vec![files.layer("base")];
        }
        lease.tar_to_layer(job, body(&tar, 60_000)).await.unwrap();
        drop(lease);
        for kind in ["vhd", "record"] {
            let file = format!("{name}.{kind}");
            all.push((file.clone(), std::fs::read(files.path(&file)).unwrap()));
        }
        let exact = files.export(&pool, name, files.exact(name)).await.unwrap();
        assert!(exact == tar, "{name}: {} bytes came back of {}", exact.len(), tar.len());
        all.push((format!("exact diff of {name}"), exact));
    }
    for (what, parent) in [("canonical", ParentDisks::Own), ("squashed", ParentDisks::None)] {
        let job = files.canonical(&["top", "base"], parent);
        all.push((format!("{what} diff"), files.export(&pool, "top", job).await.unwrap()));
    }
    pool.shutdown(END).await;
    all
}

/// Layers that one backend wrote give the same diffs when another one reads them.
pub(crate) async fn reads_the_others_layers(backend: Backend, files: &Files, written: &[(String, Vec<u8>)]) {
    let pool = pool(&backend, Mode::Global);
    let expected = |what: &str| &written.iter().find(|(name, _)| name == what).unwrap().1;
    for name in ["base", "top"] {
        let exact = files.export(&pool, name, files.exact(name)).await.unwrap();
        assert!(exact == *expected(&format!("exact diff of {name}")), "{name}");
    }
    let own = files.canonical(&["top", "base"], ParentDisks::Own);
    assert!(files.export(&pool, "top", own).await.unwrap() == *expected("canonical diff"));
    pool.shutdown(END).await;
}
