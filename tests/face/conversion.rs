//! Kills while what a container wrote becomes a layer that a virtual machine can attach: before and after each, the
//! snapshot is whole and has the same bytes, and the next Prepare makes the layer.
//!
//! ```text
//!   Prepare ─ tar, image, check, sync ─ rename, rename ─ sync ─ snapshot.json ─ delete the sandbox
//!             └── moments of its time ┘ └────── strace kills before that call of that file ──────┘
//! ```

use super::{Face, product, scratch, tar};
use containerd_api::snapshots::Kind;
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const BASE: &str = "default/2/sha256:base";
/// Kills spread over the time of a conversion.
const MOMENTS: u32 = 8;
/// Longest wait for a service that is killed, and for what a start deletes.
const SOON: Duration = Duration::from_mins(1);

/// A snapshot that a container wrote.
struct Written {
    name: String,
    text: String,
    folder: PathBuf,
    /// Its difference.
    tar: Vec<u8>,
}

/// What lies in a directory.
fn entries(folder: &Path) -> BTreeSet<OsString> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

impl Written {
    async fn new(face: &Face, number: u32) -> Self {
        let name = format!("default/4/written-{number}");
        // Some megabytes, so that each phase takes time; and text that no other snapshot has.
        let text = format!("written {number}\n").repeat(200_000);
        let folder = scratch::written(face, BASE, &name, &text).await;
        let tar = Self::diff(face, &name).await;
        let written = Self { name, text, folder, tar };
        // Nothing but the conversion is left to be done.
        let begin = Instant::now();
        while written.record().contains("\"unsynced\"") {
            assert!(begin.elapsed() < SOON, "the snapshot is not synced: {}", written.record());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        written
    }

    async fn diff(face: &Face, name: &str) -> Vec<u8> {
        let (left, right) =
            (face.view("default/6/left", BASE).await.unwrap(), face.view("default/6/right", name).await);
        let tar = face.diff(left, right.unwrap()).await.unwrap();
        face.remove("default/6/left").await.unwrap();
        face.remove("default/6/right").await.unwrap();
        tar
    }

    fn record(&self) -> String {
        fs::read_to_string(self.folder.join("snapshot.json")).unwrap()
    }

    /// Its record is the only commit point.
    fn is_converted(&self) -> bool {
        let record: serde_json::Value = serde_json::from_str(&self.record()).unwrap();
        record["state"] == "applied"
    }

    async fn assert_whole(&self, face: &Face, what: &str) {
        assert_eq!(face.stat(&self.name).await.unwrap().kind(), Kind::Committed, "{what}");
        assert!(Self::diff(face, &self.name).await == self.tar, "{what}: its difference is another");
    }

    /// The next Prepare makes the layer, if it is not made yet.
    async fn assert_becomes_layer(&self, face: &Face, what: &str) {
        let key = format!("default/7/{what}");
        face.prepare(&key, &self.name, &[]).await.unwrap();
        assert!(self.is_converted(), "{what}");
        assert!(scratch::file_in(&self.folder.join("layer.vhd"), "/etc/new") == self.text, "{what}");
        assert!(!self.folder.join("sandbox.vhdx").exists(), "{what}: the sandbox is left");
        self.assert_whole(face, what).await;
        face.remove(&key).await.unwrap();
    }
}

impl Face {
    /// Starts the product after a kill; it deletes what the conversion left.
    async fn start_again(&mut self, before: &BTreeSet<OsString>, what: &str) {
        self.spawn_again(product);
        self.wait_until_ready().await;
        let begin = Instant::now();
        loop {
            let left = entries(&self.home);
            if &left == before {
                return;
            }
            assert!(begin.elapsed() < SOON, "{what}: left {:?}", left.difference(before));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_moment_of_a_conversion_leaves_the_snapshot_whole() {
    let mut face = Face::start().await;
    face.unpack(BASE, "", &tar("etc/base", b"base")).await;
    let first = Written::new(&face, 0).await;
    let begin = Instant::now();
    first.assert_becomes_layer(&face, "undisturbed").await;
    let whole = begin.elapsed();
    let mut unconverted = 0;
    for moment in 1..=MOMENTS {
        let what = format!("moment {moment}");
        let written = Written::new(&face, moment).await;
        let before = entries(&face.home);
        {
            // Its connection breaks.
            let key = format!("default/5/{moment}");
            let preparing = face.prepare(&key, &written.name, &[]);
            let _ = tokio::time::timeout(whole * moment / MOMENTS, preparing).await;
        }
        face.kill();
        unconverted += u32::from(!written.is_converted());
        let made = entries(&face.home).iter().any(|entry| !before.contains(entry));
        face.spawn_again(product);
        face.wait_until_ready().await;
        written.assert_whole(&face, &what).await;
        // The Prepare may have come to its end.
        if made {
            let _ = face.remove(&format!("default/5/{moment}")).await;
        }
        written.assert_becomes_layer(&face, &what).await;
    }
    assert!(unconverted > 0, "no kill came before the end of a conversion");
}

/// What is in the snapshot's directory when the service is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Phase {
    record: bool,
    image: bool,
    converted: bool,
    sandbox: bool,
}

impl Written {
    fn phase(&self) -> Phase {
        let is = |name: &str| self.folder.join(name).exists();
        Phase {
            record: is("layer.exact"),
            image: is("layer.vhd"),
            converted: self.is_converted(),
            sandbox: is("sandbox.vhdx"),
        }
    }
}

impl Face {
    /// Starts the product under strace, and prepares a snapshot on `written`; false if strace has not killed it by then.
    async fn is_killed_by(&mut self, strace: &[String], written: &Written) -> bool {
        self.spawn_again(|arguments| {
            let mut command = Command::new("strace");
            command.args(["-f", "-qq", "-o", "/dev/null"]).args(strace).arg("--");
            command.arg(super::PROGRAM).args(arguments);
            command
        });
        let begin = Instant::now();
        let ready = loop {
            if self.child.try_wait().unwrap().is_some() {
                break false;
            }
            if self.stat("nothing").await.unwrap_err().code() == tonic::Code::NotFound {
                break true;
            }
            assert!(begin.elapsed() < SOON, "the service neither answers nor ends");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        if ready && self.prepare("default/5/cut", &written.name, &[]).await.is_ok() {
            // Killing strace would let its tracee go on.
            let strace = self.child.id();
            let traced = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children")).unwrap();
            let pid = traced.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a tracee");
            let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            self.child.wait().unwrap();
            return false;
        }
        while self.child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < SOON, "the service failed, and was not killed\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_before_each_change_of_the_store_leaves_the_snapshot_whole() {
    /// More renames than one thread makes in a conversion.
    const RENAMES: u32 = 12;
    let mut face = Face::start().await;
    face.unpack(BASE, "", &tar("etc/base", b"base")).await;
    // strace counts calls of each thread, and knows a call by its first path.
    let kill = |calls: &str, when: u32| vec!["-e".into(), format!("inject={calls}:signal=KILL:when={when}")];
    let on = |path: PathBuf| vec!["-P".to_owned(), path.to_str().unwrap().to_owned()];
    let mut seen = BTreeSet::new();
    let mut all_renames = false;
    for number in 0..RENAMES + 2 {
        let written = Written::new(&face, number).await;
        let before = entries(&face.home);
        face.kill();
        let strace = match number {
            0 => [on(written.folder.clone()), kill("fsync,fdatasync", 1)].concat(),
            1 => [on(written.folder.join("sandbox.vhdx")), kill("unlink,unlinkat", 1)].concat(),
            _ => kill("rename,renameat,renameat2", number - 1),
        };
        let what = format!("{} {}", number, strace.join(" ").replace('/', "|"));
        let killed = face.is_killed_by(&strace, &written).await;
        if killed {
            seen.insert(written.phase());
            face.start_again(&before, &what).await;
        } else {
            assert!(number > 1, "{what}: no such call was made");
            face.spawn_again(product);
            face.wait_until_ready().await;
            face.remove("default/5/cut").await.unwrap();
        }
        written.assert_whole(&face, &what).await;
        written.assert_becomes_layer(&face, &what).await;
        if !killed {
            all_renames = true;
            break;
        }
    }
    assert!(all_renames, "a thread makes more renames than {RENAMES}");
    for (record, image, converted) in
        [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
    {
        let phase = Phase { record, image, converted, sandbox: true };
        assert!(seen.contains(&phase), "no kill came in {phase:?}, only in {seen:?}");
    }
}
