//! Sandboxes that our ext4 reader does not know, with and without `lcow.guestmount`.
//!
//! ```text
//!   one script ─► fs (ours reads it) ─┬─ the same bytes with a feature bit that ours does not know ─┐
//!              ─► bigalloc ─┬─ clean ─┤                                                             ├─► guest's kernel
//!                           └─ dirty ─┘                                                             │
//!        own reader ─► tar, changes, size    ════ must be the same ════    tar, changes, size ◄─────┘
//! ```

use super::disks::{Mounted, run};
use crate::{
    files::{Files, noise, tree},
    suite::{Backend, END},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use lcow_graphdriver::svm::{
    Change, CompareJob, DiskSource, ExportJob, ExportKind, IdMaps, LayerDisk, LayerKind, LiveControl, Mode,
    ParentDisks, Pool, PoolConfig, Purpose, SvmError,
};
use std::{fs, io, path::Path, process::Command, sync::Arc, time::Duration};
use svm_protocol::ErrorKind;
use vhd_image::vhdx;

/// What a sandbox may hold; `$1` is the root of the file system, which is writable.
const CONTENT: &str = r#"
set -e
umask 022
cd "$1"
mkdir upper work
cd upper
mkdir d0 many deep deep/er deep/er/est
for n in $(seq 1 300); do echo "$n" > many/a-rather-long-name-to-fill-blocks-$n; done
head -c 300000 /dev/urandom > d0/f0
head -c 70000 /dev/zero > zeros
: > empty
printf x > tiny
ln d0/f0 deep/linked
ln -s d0/f0 short
ln -s "$(printf 'a%.0s' $(seq 1 200))" long
mkfifo fifo
mknod null c 1 3
mknod disk b 8 200000
mknod d0/f1 c 0 0
mknod d0/not-there c 0 0
truncate -s 3M holes
printf end >> holes
printf middle | dd of=holes bs=1 seek=1500000 conv=notrunc status=none
fallocate -l 400000 reserved
printf start | dd of=reserved conv=notrunc status=none
: > beyond
fallocate -l 200000 -n beyond
printf b >> beyond
printf name > "$(printf 'latin-\351')"
setfattr -n trusted.overlay.opaque -v y deep
setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" tiny
setfattr -n trusted.on.link -v l -h short
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 tiny
setfacl -m u:1234:rw,g:77:r zeros
setfacl -d -m u:5:rwx many
chown 1000:70000 tiny
chown -h 5:6 short
chmod 6755 tiny
chmod 1777 many
find . -print0 | xargs -0 touch -h -d '2031-02-03 04:05:06.789012345'
touch -h -d '1901-12-14 00:00:00.5' long
"#;

fn mke2fs(image: &Path, features: &str) {
    fs::File::create(image).unwrap().set_len(64 << 20).unwrap();
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-b", "4096", "-O", features]).arg(image));
}

/// Sets a bit of `s_feature_incompat`; the file system must be without checksums.
fn set_incompat(image: &Path, bit: u32) {
    let mut bytes = fs::read(image).unwrap();
    let field = &mut bytes[1024 + 0x60..][..4];
    let features = u32::from_le_bytes(field.try_into().unwrap()) | bit;
    field.copy_from_slice(&features.to_le_bytes());
    fs::write(image, bytes).unwrap();
}

/// `EXT4_FEATURE_INCOMPAT_ENCRYPT`: with no inode that is encrypted it means nothing but that ours does not know it.
const ENCRYPT: u32 = 0x1_0000;

/// The images of the picture above, and `base.vhd` to compare with.
async fn images(pool: &Pool, files: &Files) {
    files.apply(pool, "base", &tree(20, 5000, 1)).await.unwrap();
    let (script, point) = (files.path("script"), files.path("point"));
    fs::write(&script, CONTENT).unwrap();
    for (name, features) in
        [("fs", "^metadata_csum"), ("bigalloc", "bigalloc,inline_data"), ("fast", "fast_commit")]
    {
        mke2fs(&files.path(name), features);
        let _mounted = Mounted::new(&files.path(name), &point);
        if name == "fs" {
            run(Command::new("bash").arg(&script).arg(&point));
        } else {
            // The content has random bytes: it is the same content if it is a copy, reserved blocks and all.
            let (from, source) = (files.path("from"), files.path("fs"));
            let _from = Mounted::new(&source, &from);
            run(Command::new("bash").arg("-c").arg(COPY).arg("copy").arg(&from).arg(&point));
        }
        run(Command::new("sync").arg("-f").arg(&point));
        if name == "fast" {
            // The last word on it is a fast commit's alone.
            run(Command::new("bash").arg("-c").arg(FAST).arg("fast").arg(&point));
        }
        fs::copy(files.path(name), files.path(&format!("{name}.dirty"))).unwrap();
    }
    fs::copy(files.path("fs"), files.path("encrypt")).unwrap();
    set_incompat(&files.path("encrypt"), ENCRYPT);
    fs::copy(files.path("fs.dirty"), files.path("encrypt.dirty")).unwrap();
    set_incompat(&files.path("encrypt.dirty"), ENCRYPT);
    fs::copy(files.path("fs"), files.path("casefold")).unwrap();
    run(Command::new("tune2fs").args(["-O", "casefold"]).arg(files.path("casefold")));
    for name in ["encrypt.dirty", "bigalloc.dirty", "fast.dirty"] {
        let features = fs::read(files.path(name)).unwrap()[1024 + 0x60];
        assert_eq!(features & 4, 4, "{name} has a journal to replay");
    }
}

/// Copies a tree with holes, links, devices and attributes, then makes what a copy does not keep.
const COPY: &str = r#"
set -e
tar -C "$1" --xattrs --xattrs-include='*' --acls --sparse -c upper work |
    tar -C "$2" --xattrs --xattrs-include='*' --acls --sparse --same-owner -xp
cd "$2/upper"
for f in reserved beyond; do
    stamp=$(stat -c %y "$f")
    if [ "$f" = reserved ]; then
        rm reserved && fallocate -l 400000 reserved && printf start | dd of=reserved conv=notrunc status=none
    else
        fallocate -l 200000 -n beyond
    fi
    touch -d "$stamp" "$f"
done
find . -print0 | xargs -0 touch -h -d '2031-02-03 04:05:06.789012345'
touch -h -d '1901-12-14 00:00:00.5' long
"#;

const FAST: &str = r#"
set -e
cd "$1/upper"
chmod 700 tiny
sync -f tiny
chmod 6755 tiny
sync tiny
"#;

fn pool(backend: &Backend, mode: Mode, guest_mount: bool) -> Pool {
    let boot_timeout = Duration::from_mins(2);
    let config =
        PoolConfig { mode, spares: 0, max_vms: 6, boot_timeout, guest_mount, ..PoolConfig::default() };
    Pool::start(backend.clone(), config)
}

fn stack(files: &Files, disk: DiskSource) -> Vec<LayerDisk> {
    vec![LayerDisk { disk, kind: LayerKind::Sandbox }, files.layer("base")]
}

/// All that a sandbox over the base can be asked for.
#[derive(Debug, PartialEq)]
struct Answers {
    tar: Vec<u8>,
    squashed: Vec<u8>,
    changes: Vec<Change>,
    size: u64,
}

async fn ask(pool: &Pool, files: &Files, disk: &DiskSource) -> Result<Answers, SvmError> {
    let export = async |parent| {
        let target = stack(files, disk.clone());
        let kind = ExportKind::Canonical {
            target,
            parent,
            format: 1,
            id_maps: IdMaps::default(),
            source_date_epoch: None,
        };
        files.export(pool, "s", ExportJob { kind, live: None }).await
    };
    let compare = || CompareJob { target: stack(files, disk.clone()), parent: ParentDisks::Own, live: None };
    Ok(Answers {
        tar: export(ParentDisks::Own).await?,
        squashed: export(ParentDisks::None).await?,
        changes: pool.lease("s", Purpose::Work).await?.changes(compare()).await?,
        size: pool.lease("s", Purpose::Work).await?.diff_size(compare()).await?,
    })
}

/// The same bytes, whoever reads; the disks stay as they are, dirty ones too, and a VHDX is a disk like any other.
pub(crate) async fn the_guests_kernel_reads_what_our_reader_does_not_know(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global, true), Files::new());
    images(&pool, &files).await;
    let own = ask(&pool, &files, &files.readable("fs")).await.unwrap();
    assert!(own.tar.len() > 300_000 && own.changes.len() > 300 && own.size > 3_000_000);
    for name in ["encrypt", "encrypt.dirty", "bigalloc", "bigalloc.dirty", "fast.dirty", "casefold"] {
        let before = fs::read(files.path(name)).unwrap();
        let foreign = ask(&pool, &files, &files.readable(name)).await.unwrap();
        assert_eq!(foreign.changes, own.changes, "{name}");
        assert_eq!(foreign.size, own.size, "{name}");
        let same = foreign.tar == own.tar && foreign.squashed == own.squashed;
        assert!(same, "{name}: {} and {} bytes", foreign.tar.len(), own.tar.len());
        assert!(fs::read(files.path(name)).unwrap() == before, "{name}: a disk that is read was written");
        // Both readers in one operation: equal but for nothing.
        let parent = ParentDisks::Chain(stack(&files, files.readable("fs")));
        let target = stack(&files, files.readable(name));
        let lease = pool.lease("s", Purpose::Work).await.unwrap();
        let found = lease.changes(CompareJob { target, parent, live: None }).await.unwrap();
        assert_eq!(found, [], "{name}");
    }
    let image = fs::read(files.path("bigalloc")).unwrap();
    let options = vhdx::CreateOptions::new(image.len() as u64, uuid::Uuid::from_u128(7));
    vhdx::create(&*files.writable("s.vhdx").file, &options, &[(0, image)]).unwrap();
    assert!(ask(&pool, &files, &files.readable("s.vhdx").vhdx()).await.unwrap() == own);
    // Both at one time in one machine, and one whose reader goes away.
    let (a, b) = (files.readable("bigalloc"), files.readable("encrypt.dirty"));
    let (a, b) = tokio::join!(ask(&pool, &files, &a), ask(&pool, &files, &b));
    assert!(a.unwrap() == own && b.unwrap() == own);
    for _ in 0..3 {
        let target = stack(&files, files.readable("bigalloc"));
        let (parent, id_maps) = (ParentDisks::Own, IdMaps::default());
        let kind = ExportKind::Canonical { target, parent, format: 1, id_maps, source_date_epoch: None };
        let lease = pool.lease("s", Purpose::Export).await.unwrap();
        let mut tar = lease.layer_to_tar(ExportJob { kind, live: None }).await.unwrap();
        tar.next().await.unwrap().unwrap();
    }
    assert!(ask(&pool, &files, &files.readable("bigalloc")).await.unwrap() == own);
    assert_eq!(pool.snapshot().poisoned, 0);
    pool.shutdown(END).await;
}

/// Without the permission, or without a kernel to do it, the error says what would help. What is in use is not mounted.
pub(crate) async fn a_foreign_sandbox_is_refused_with_advice(backend: Backend) {
    let files = Files::new();
    mke2fs(&files.path("foreign"), "bigalloc");
    {
        let point = files.path("point");
        let _mounted = Mounted::new(&files.path("foreign"), &point);
        fs::create_dir_all(point.join("upper")).unwrap();
    }
    for allowed in [false, true] {
        let pool = pool(&backend, Mode::Safe, allowed);
        files.apply(&pool, "base", &tree(2, 50, 1)).await.unwrap();
        let disk = files.readable("foreign");
        let e = match ask(&pool, &files, &disk).await {
            // A live one: never.
            Ok(_) => {
                assert!(allowed && backend.name() != "embedded");
                let target = stack(&files, disk.clone());
                let (parent, live) = (ParentDisks::Own, Some(Arc::new(Still) as Arc<dyn LiveControl>));
                let lease = pool.lease("s", Purpose::Work).await.unwrap();
                let e = lease.diff_size(CompareJob { target, parent, live }).await.unwrap_err();
                assert!(e.to_string().contains("in use"), "{e}");
                e
            }
            Err(e) => {
                assert!(e.to_string().contains("lcow.guestmount=true"), "{e}");
                e
            }
        };
        assert_eq!(e.refused_kind(), Some(ErrorKind::Unsupported), "{e}");
        assert!(e.to_string().contains("bigalloc"), "{e}");
        // A layer of ours is never shown to a kernel, whatever is in its place.
        let target = vec![LayerDisk { disk, kind: LayerKind::Applied }];
        let (parent, id_maps) = (ParentDisks::None, IdMaps::default());
        let kind = ExportKind::Canonical { target, parent, format: 1, id_maps, source_date_epoch: None };
        let e = files.export(&pool, "s", ExportJob { kind, live: None }).await.unwrap_err();
        assert_eq!(e.refused_kind(), Some(ErrorKind::Unsupported), "{e}");
        pool.shutdown(END).await;
    }
}

struct Still;

impl LiveControl for Still {
    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        async { Ok(()) }.boxed()
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        async { Ok(()) }.boxed()
    }
}

/// Damage is an error, or costs the machine; the next operation finds nothing of it. More mounts than there are devices.
pub(crate) async fn hostile_foreign_sandboxes_cost_one_operation(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global, true), Files::new());
    images(&pool, &files).await;
    let good = ask(&pool, &files, &files.readable("bigalloc")).await.unwrap();
    let image = fs::read(files.path("bigalloc")).unwrap();
    let size = async |disk: DiskSource| {
        let job = CompareJob { target: stack(&files, disk), parent: ParentDisks::Own, live: None };
        pool.lease("s", Purpose::Work).await?.diff_size(job).await
    };
    for (what, at, len) in [
        ("group descriptors", 4096, 4096),
        ("the journal and all before it", 8192, 4 << 20),
        ("all but the superblock", 4096, image.len() - 4096),
        ("the end", image.len() / 2, image.len() / 2),
    ] {
        let mut damaged = image.clone();
        damaged[at..at + len].copy_from_slice(&noise(len, at as u64));
        fs::write(files.path("damaged"), damaged).unwrap();
        let found = size(files.readable("damaged")).await;
        if what != "the end" {
            found.unwrap_err();
        }
        assert_eq!(size(files.readable("bigalloc")).await.unwrap(), good.size, "after {what}");
    }
    // One that asks the kernel to panic at the first error.
    run(Command::new("tune2fs").args(["-e", "panic"]).arg(files.path("bigalloc")));
    let image = fs::read(files.path("bigalloc")).unwrap();
    // Bytes here and there, in what mke2fs and the kernel have written.
    let mut refused = 0;
    for seed in 0..24u64 {
        let mut damaged = image.clone();
        for word in noise(8 * 64, seed + 100).chunks_exact(8) {
            let at = u64::from_le_bytes(word.try_into().unwrap());
            damaged[2048 + at as usize % (2 << 20)] ^= word[7] | 1;
        }
        fs::write(files.path("damaged"), damaged).unwrap();
        // Whatever it says, it says it, and goes on.
        refused += u32::from(size(files.readable("damaged")).await.is_err());
    }
    assert!(refused > 12, "{refused} of 24: the damage was not where it is seen");
    assert_eq!(pool.snapshot().poisoned, 0, "no machine died");
    // A file system that is cut off, and none at all.
    fs::write(files.path("damaged"), &image[..image.len() / 2]).unwrap();
    size(files.readable("damaged")).await.unwrap_err();
    let e = {
        fs::write(files.path("damaged"), vec![0; 1 << 20]).unwrap();
        size(files.readable("damaged")).await.unwrap_err()
    };
    assert_eq!(e.refused_kind(), Some(ErrorKind::Corrupt), "{e}");
    assert!(ask(&pool, &files, &files.readable("bigalloc")).await.unwrap() == good);
    pool.shutdown(END).await;
    assert!(pool.snapshot().vms.is_empty());
}

/// Our reader and the guest's kernel on the same disk, in turn.
pub(crate) async fn speed(backend: Backend) {
    let (pool, files) = (pool(&backend, Mode::Global, true), Files::new());
    files.apply(&pool, "base", &tree(1, 5000, 1)).await.unwrap();
    let (own, foreign, point) = (files.path("fs"), files.path("encrypt"), files.path("point"));
    fs::File::create(&own).unwrap().set_len(256 << 20).unwrap();
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^metadata_csum"])
        .arg(&own));
    {
        let _mounted = Mounted::new(&own, &point);
        for n in 0..6000u64 {
            let folder = point.join(format!("upper/d{}", n / 100));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(format!("f{n}")), noise(18_000, n)).unwrap();
        }
    }
    fs::copy(&own, &foreign).unwrap();
    set_incompat(&foreign, ENCRYPT);
    for round in 0..4 {
        for name in ["fs", "encrypt"] {
            let target = || stack(&files, files.readable(name));
            let (parent, id_maps) = (ParentDisks::Own, IdMaps::default());
            let kind = ExportKind::Canonical {
                target: target(),
                parent,
                format: 1,
                id_maps,
                source_date_epoch: None,
            };
            let begin = std::time::Instant::now();
            let tar = files.export(&pool, "s", ExportJob { kind, live: None }).await.unwrap();
            let export = begin.elapsed();
            let begin = std::time::Instant::now();
            let lease = pool.lease("s", Purpose::Work).await.unwrap();
            let changes = CompareJob { target: target(), parent: ParentDisks::Own, live: None };
            let n = lease.changes(changes).await.unwrap().len();
            println!(
                "round {round} {name}: {} bytes in {export:?}, {n} changes in {:?}",
                tar.len(),
                begin.elapsed()
            );
        }
    }
    pool.shutdown(END).await;
}
