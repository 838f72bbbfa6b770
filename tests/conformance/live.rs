//! A sandbox that others write to while a VM reads it: nothing that the VM remembers is taken for what is there now.
//!
//! ```text
//!   freeze 1: the sandbox as it was ─► … ─► freeze 2: another sandbox's bytes in its file, as a kernel would write them
//! ```

use super::disks::run;
use crate::{
    files::{Files, noise},
    suite::Backend,
};
use futures_util::future::BoxFuture;
use lcow_graphdriver::svm::{
    CopyDisk, ExportJob, ExportKind, IdMaps, LayerDisk, LayerKind, LiveControl, Mode, ParentDisks, Pool,
    PoolConfig, SvmError,
};
use std::{
    fs::{self, File},
    io::{self, Write},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// Changes the sandbox's file at the second freeze, or if there is none, when the writers go on for the first time.
struct Writer {
    /// What the file becomes.
    after: Vec<u8>,
    file: File,
    copies: Option<CopyDisk>,
    freezes: AtomicU32,
}

impl LiveControl for Writer {
    fn copies(&self) -> BoxFuture<'_, io::Result<Option<CopyDisk>>> {
        Box::pin(async { Ok(self.copies.clone()) })
    }

    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        self.freezes.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async {
            if self.freezes.load(Ordering::SeqCst) == 1 {
                rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Start(0))?;
                (&self.file).write_all(&self.after)?;
            }
            Ok(())
        })
    }
}

pub(crate) async fn what_others_write_to_a_sandbox_is_seen(backend: Backend) {
    let files = Files::new();
    let pool = Pool::start(backend, PoolConfig { mode: Mode::Global, ..PoolConfig::default() });
    let upper = files.path("tree/upper");
    fs::create_dir_all(&upper).unwrap();
    fs::write(upper.join("file"), noise(3 << 20, 1)).unwrap();
    fs::write(upper.join("other"), noise(300_000, 2)).unwrap();
    let image = files.path("sandbox");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-d"])
        .arg(files.path("tree"))
        .arg(&image));
    let before = fs::read(&image).unwrap();
    run(Command::new("debugfs")
        .args(["-w", "-R", "set_inode_field /upper/file ctime 20310101000000"])
        .arg(&image));
    let after = fs::read(&image).unwrap();
    assert!(before != after);
    let job = |copies: bool| {
        fs::write(&image, &before).unwrap();
        let disk = files.readable("sandbox").window(0, before.len() as u64);
        let target = vec![LayerDisk { disk, kind: LayerKind::Sandbox }];
        let kind = ExportKind::Canonical {
            target,
            parent: ParentDisks::Own,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        let copies = copies.then(|| CopyDisk {
            scratch: files.writable("scratch"),
            since: 0,
            changed: Vec::new(),
            most_bytes: 256 << 20,
            most_time: Duration::from_mins(5),
        });
        let file = File::options().write(true).open(&image).unwrap();
        let writer = Arc::new(Writer { after: after.clone(), file, copies, freezes: AtomicU32::new(0) });
        (ExportJob { kind, live: Some(writer.clone()) }, writer)
    };
    // Twice: the second time the VM has seen the disk before.
    for round in 0..2 {
        let (export, writer) = job(false);
        match files.export(&pool, "s", export).await {
            Err(SvmError::Refused(refused)) => {
                assert!(refused.message.contains("\"file\" changed"), "{}", refused.message);
                assert_eq!(refused.changed.len(), 1);
            }
            other => panic!("round {round}: {:?}", other.map(|tar| tar.len())),
        }
        assert_eq!(writer.freezes.load(Ordering::SeqCst), 2);
        let (export, writer) = job(true);
        let tar = files.export(&pool, "s", export).await.unwrap();
        assert!(
            tar.windows(1 << 20).step_by(512).any(|w| *w == noise(3 << 20, 1)[..1 << 20]),
            "round {round}"
        );
        assert_eq!(writer.freezes.load(Ordering::SeqCst), 1, "all was copied");
    }
    pool.shutdown(Duration::from_secs(10)).await;
}
