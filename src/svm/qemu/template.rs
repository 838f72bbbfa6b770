//! The saved state that machines are restored from.
//!
//! ```text
//!   boot once ─► agent greets ─► pause ─► <cache>/<key>/{memory, state, digest}   key = everything that must be equal
//!   restore   ─► memory mapped privately (pages are shared until written) + state through a pipe ─► 0.2 s
//! ```
//!
//! A saved state fits one QEMU, one command line, one accelerator and processor, one kernel, one initramfs: all of them
//! are in the key, so any change means a new template and never a machine that only half fits. Templates are written
//! under another name, synced and renamed, older ones deleted; one whose digest does not match is not used. The memory
//! holds nothing but a freshly booted guest: it has seen no layer. Called by `mod`.

use super::{
    find::Accelerator,
    machine::{Beginning, QemuMachine, Recipe, stream},
};
use crate::svm::{SvmError, guest_files, remote::RemoteAgent};
use lcow_sys::linux::fdpass;
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, time::timeout};

/// Version of the content of a template's directory.
const FORMAT: u32 = 2;
/// Prefix of a template that is being made.
const MAKING: &str = "making-";
/// Files of a template: the guest's memory, the devices' state, and the digest of both.
const MEMORY: &str = "memory";
const STATE: &str = "state";
const DIGEST: &str = "digest";
/// Largest state besides the memory; bytes.
const MAX_STATE: u64 = 64 << 20;
/// Kernel buffer of the state's pipe; bytes.
const STATE_BUFFER: usize = 1 << 20;
/// How long saving or restoring may take.
const STATE_TIME: Duration = Duration::from_secs(20);

/// A template that can be restored from.
#[derive(Debug, Clone)]
pub(super) struct Template {
    /// First digits of the key, for display.
    pub(super) key: String,
    memory: Arc<File>,
    state: Arc<[u8]>,
}

/// Kernel and initramfs, open.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: File,
    pub(super) initrd: File,
}

impl Image {
    /// Opens both.
    ///
    /// # Errors
    /// Everything that is wrong with either, and what the operator has to do.
    pub(super) fn open(kernel: &Path, initrd: &Path) -> Result<Self, String> {
        let [kernel, initrd] = guest_files::open(kernel, initrd, "scripts/build-svm-image")?;
        Ok(Self { kernel, initrd })
    }
}

/// Deletes templates that a killed daemon was making; says how many.
pub(super) fn reap(cache: &Path) -> usize {
    let Ok(entries) = fs::read_dir(cache) else { return 0 };
    let left = entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(MAKING));
    let free = left.filter(|e| {
        File::open(e.path()).is_ok_and(|f| flock(&f, FlockOperation::NonBlockingLockExclusive).is_ok())
    });
    free.filter(|e| fs::remove_dir_all(e.path()).is_ok()).count()
}

/// A digest of everything that a saved state depends on; hex.
pub(super) fn key(recipe: &Recipe, image: &Image) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(&FORMAT.to_le_bytes());
    add(recipe.qemu.version.as_bytes());
    // The distribution's own number is not in the version: a rebuilt QEMU has another size or time.
    let program = fs::metadata(&recipe.qemu.program)?;
    add(&program.len().to_le_bytes());
    add(format!("{:?}", program.modified()?).as_bytes());
    for argument in recipe.arguments(false) {
        add(argument.as_bytes());
    }
    if recipe.accelerator == Accelerator::Kvm {
        // -cpu host is what this processor is.
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        for line in cpuinfo.lines().filter(|l| l.starts_with("model") || l.starts_with("flags")).take(3) {
            add(line.as_bytes());
        }
    }
    for mut file in [&image.kernel, &image.initrd] {
        io::Seek::rewind(&mut file)?;
        let mut buffer = vec![0; 1 << 20];
        let mut digest = Sha256::new();
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
        }
        add(&digest.finalize());
    }
    Ok(hash.finalize().iter().fold(String::new(), |text, b| text + &format!("{b:02x}")))
}

/// Digest of a saved guest; hex. Pages of zeros do not count, so that it does not matter whether they are holes.
fn digest(memory: &File, state: &[u8]) -> io::Result<String> {
    /// Bytes read at once.
    const PIECE: usize = 1 << 20;
    /// Bytes of a page.
    const PAGE: usize = 4096;
    let mut hash = blake3::Hasher::new();
    hash.update(&(state.len() as u64).to_le_bytes());
    hash.update(state);
    let length = memory.metadata()?.len();
    hash.update(&length.to_le_bytes());
    let (mut buffer, mut at) = (vec![0; PIECE], 0);
    while at < length {
        let piece = &mut buffer[..PIECE.min(usize::try_from(length - at).unwrap_or(PIECE))];
        memory.read_exact_at(piece, at)?;
        for (page, bytes) in (at..).step_by(PAGE).zip(piece.chunks(PAGE)) {
            if bytes.iter().any(|b| *b != 0) {
                hash.update(&page.to_le_bytes());
                hash.update(bytes);
            }
        }
        at += piece.len() as u64;
    }
    Ok(hash.finalize().to_hex().to_string())
}

/// Publishes a template durably: after a power cut it is complete or absent. Deletes templates of other keys, which are
/// obsolete, but not those that other processes are making.
fn publish(folder: &Path, cache: &Path, key: &str, memory: &File, state: &[u8]) -> io::Result<()> {
    let sync_dir = |path: &Path| File::open(path)?.sync_all();
    let mut file = File::create_new(folder.join(STATE))?;
    file.write_all(state)?;
    file.sync_all()?;
    memory.sync_all()?;
    let mut file = File::create_new(folder.join(DIGEST))?;
    file.write_all(digest(memory, state)?.as_bytes())?;
    file.sync_all()?;
    sync_dir(folder)?;
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(MAKING) {
            match fs::remove_dir_all(entry.path()) {
                // Another daemon with the same cache deleted it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    fs::rename(folder, cache.join(key))?;
    sync_dir(cache)
}

impl Template {
    /// The template of `key` in `cache`, if it exists and is intact.
    ///
    /// Reads all of it: a guest with damaged memory would not fail, but compute wrong tars.
    pub(super) fn load(cache: &Path, key: &str) -> Option<Self> {
        let folder = cache.join(key);
        let read = || -> io::Result<Self> {
            let told = fs::read_to_string(folder.join(DIGEST))?;
            let mut state = Vec::new();
            File::open(folder.join(STATE))?.take(MAX_STATE + 1).read_to_end(&mut state)?;
            let memory = File::open(folder.join(MEMORY))?;
            if digest(&memory, &state)? != told.trim() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "its digest does not match"));
            }
            Ok(Self { key: key[..12].to_owned(), memory: Arc::new(memory), state: state.into() })
        };
        match read() {
            Ok(template) => Some(template),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !folder.exists() => None,
            Err(e) => {
                tracing::warn!(template = %folder.display(), "a saved guest cannot be used and is made again: {e}");
                None
            }
        }
    }

    /// Boots a guest and saves it. The machine is gone afterwards.
    pub(super) async fn make(
        recipe: &Recipe,
        image: &Image,
        kvm: Option<&File>,
        cache: &Path,
        key: &str,
        deadline: Duration,
    ) -> Result<Self, SvmError> {
        let failed = |reason: String| SvmError::Boot { reason, console: String::new() };
        fs::create_dir_all(cache).map_err(|e| failed(format!("{}: {e}", cache.display())))?;
        let folder = tempfile::Builder::new()
            .prefix(MAKING)
            .tempdir_in(cache)
            .map_err(|e| failed(format!("{}: {e}", cache.display())))?;
        // Held until the end: a directory that no process holds was left by a killed daemon.
        let holder = File::open(folder.path()).map_err(|e| failed(e.to_string()))?;
        flock(&holder, FlockOperation::NonBlockingLockExclusive).map_err(|e| failed(e.to_string()))?;
        let path = folder.path().join(MEMORY);
        let open = || -> io::Result<(File, File)> {
            let memory = File::options().read(true).write(true).create_new(true).open(&path)?;
            memory.set_len(recipe.memory)?;
            // The machine runs as another user and reopens what it was given; the directories above keep other users
            // out.
            memory.set_permissions(fs::Permissions::from_mode(0o666))?;
            let read = File::open(&path)?;
            Ok((memory, read))
        };
        let (memory, reader) = open().map_err(|e| failed(format!("{}: {e}", path.display())))?;
        let beginning = Beginning::Boot { kernel: &image.kernel, initrd: &image.initrd, memory: &memory };
        let mut machine = recipe.start(0, beginning, kvm).await?;
        let saved = timeout(deadline, save(&mut machine)).await;
        machine.process.kill_and_reap();
        let console = || machine.console.tail();
        let state = match saved {
            Ok(Ok(state)) => state,
            Ok(Err(e)) => {
                return Err(SvmError::Boot {
                    reason: format!("saving a booted guest: {e}"),
                    console: console(),
                });
            }
            Err(_) => {
                let reason = format!(
                    "the guest's agent did not greet within {}s under {}",
                    deadline.as_secs_f32(),
                    recipe.accelerator
                );
                return Err(SvmError::Boot { reason, console: console() });
            }
        };
        let (to, of) = (cache.to_owned(), key.to_owned());
        // Syncs and hashes the guest's whole memory.
        let published = super::on_a_thread(move || {
            let publish = || -> io::Result<()> {
                memory.set_permissions(fs::Permissions::from_mode(0o444))?;
                publish(folder.path(), &to, &of, &memory, &state)
            };
            publish().map_err(|e| format!("{}: {e}", to.display()))?;
            // Renamed: nothing is left to delete.
            let _ = folder.keep();
            Ok(state)
        });
        let state = published.await.map_err(failed)?;
        Ok(Self { key: key[..12].to_owned(), memory: Arc::new(reader), state: state.into() })
    }

    /// Starts a machine where the template stopped. It is paused.
    pub(super) async fn restore(
        &self,
        recipe: &Recipe,
        number: u64,
        kvm: Option<&File>,
    ) -> Result<QemuMachine, SvmError> {
        let io = |e: io::Error| SvmError::Boot { reason: e.to_string(), console: String::new() };
        let (ours, theirs) = fdpass::stream_pair(STATE_BUFFER).map_err(io)?;
        let beginning = Beginning::Restore { memory: &self.memory, state: theirs };
        let machine = recipe.start(number, beginning, kvm).await?;
        let restored = timeout(STATE_TIME, self.feed(&machine, ours)).await;
        let reason = match restored {
            Ok(Ok(())) => return Ok(machine),
            Ok(Err(e)) => e,
            Err(_) => format!("not finished within {}s", STATE_TIME.as_secs()),
        };
        Err(SvmError::Boot {
            reason: format!("restoring template {}: {reason}", self.key),
            console: machine.console.tail(),
        })
    }

    async fn feed(&self, machine: &QemuMachine, ours: OwnedFd) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut events = machine.qmp.events();
        let capabilities = json!({"capabilities": [
            {"capability": "x-ignore-shared", "state": true}, {"capability": "events", "state": true}]});
        machine.qmp.run("migrate-set-capabilities", capabilities).await.map_err(|e| text(&e))?;
        let uri = format!("fd:{}", lcow_sys::linux::launch::FIRST_FD + 5);
        machine.qmp.run("migrate-incoming", json!({ "uri": uri })).await.map_err(|e| text(&e))?;
        let mut pipe = stream(ours).map_err(|e| text(&e))?;
        let state = self.state.clone();
        let feeding = async {
            pipe.write_all(&state).await.map_err(|e| e.to_string())?;
            pipe.shutdown().await.map_err(|e| e.to_string())
        };
        let waiting = async {
            loop {
                let event = events.recv().await.map_err(|e| e.to_string())?;
                if event.name == "MIGRATION" {
                    match event.data["status"].as_str() {
                        Some("completed") => return Ok(()),
                        Some("failed") => return Err("qemu could not read the state".to_owned()),
                        _ => {}
                    }
                }
            }
        };
        tokio::try_join!(feeding, waiting).map(|_| ())
    }
}

/// Waits for the agent, pauses the machine and takes its state.
async fn save(machine: &mut QemuMachine) -> Result<Vec<u8>, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (input, output) = machine.agent.take().ok_or("the port was taken already")?.into_split();
    let agent = RemoteAgent::connect(input, output, None).await.map_err(|e| format!("agent: {e}"))?;
    agent.ping().await.map_err(|e| format!("agent: {e}"))?;
    let mut events = machine.qmp.events();
    machine.qmp.run("stop", json!({})).await.map_err(|e| text(&e))?;
    let capabilities = json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": true}, {"capability": "events", "state": true}]});
    machine.qmp.run("migrate-set-capabilities", capabilities).await.map_err(|e| text(&e))?;
    let (ours, theirs) = fdpass::stream_pair(STATE_BUFFER).map_err(|e| text(&e))?;
    machine
        .qmp
        .run_with("getfd", json!({"fdname": "state"}), &[theirs.as_fd()])
        .await
        .map_err(|e| text(&e))?;
    drop(theirs);
    machine.qmp.run("migrate", json!({"uri": "fd:state"})).await.map_err(|e| text(&e))?;
    let pipe = stream(ours).map_err(|e| text(&e))?;
    let mut state = Vec::new();
    pipe.take(MAX_STATE + 1).read_to_end(&mut state).await.map_err(|e| text(&e))?;
    loop {
        let event = events.recv().await.map_err(|e| text(&e))?;
        if event.name == "MIGRATION" {
            match event.data["status"].as_str() {
                Some("completed") => break,
                Some("failed") => return Err("qemu could not write the state".to_owned()),
                _ => {}
            }
        }
    }
    drop(agent);
    if state.len() as u64 > MAX_STATE {
        return Err(format!("a state of more than {MAX_STATE} bytes"));
    }
    Ok(state)
}

/// Directory of the templates in a cache, which may also be a home: no layer's id begins with a dot.
pub(super) fn folder(cache: &Path) -> PathBuf {
    cache.join(".svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    /// A template that was made in `cache`, of memory with holes.
    fn made(cache: &Path, state: &[u8]) {
        let folder = tempfile::Builder::new().prefix(MAKING).tempdir_in(cache).unwrap();
        let path = folder.path().join(MEMORY);
        let memory = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        memory.set_len(5 << 20).unwrap();
        memory.write_all_at(b"guest", 3 << 20).unwrap();
        publish(folder.path(), cache, KEY, &memory, state).unwrap();
        let _ = folder.keep();
    }

    #[test]
    fn a_saved_guest_that_was_damaged_is_not_loaded() {
        let cache = tempfile::tempdir().unwrap();
        let path = |name: &str| cache.path().join(KEY).join(name);
        assert!(Template::load(cache.path(), KEY).is_none(), "nothing is there yet");
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 7] = [
            (MEMORY, |p| File::options().write(true).open(p).unwrap().write_all_at(b"G", 3 << 20).unwrap()),
            // What a power cut leaves of bytes that were never synced.
            (MEMORY, |p| File::options().write(true).open(p).unwrap().set_len(0).unwrap()),
            (MEMORY, |p| {
                let file = File::options().write(true).open(p).unwrap();
                file.set_len(3 << 20).unwrap();
                file.set_len(5 << 20).unwrap();
            }),
            (MEMORY, |p| File::options().write(true).open(p).unwrap().set_len(6 << 20).unwrap()),
            (STATE, |p| fs::write(p, b"stat\0").unwrap()),
            (DIGEST, |p| fs::write(p, b"").unwrap()),
            (DIGEST, |p| fs::remove_file(p).unwrap()),
        ];
        for (n, (file, damage)) in damages.into_iter().enumerate() {
            made(cache.path(), b"state");
            let good = Template::load(cache.path(), KEY).expect("whole");
            assert_eq!(&*good.state, b"state");
            damage(&path(file));
            assert!(Template::load(cache.path(), KEY).is_none(), "damage {n} to {file}");
        }
        // A newly made template replaces the damaged one.
        made(cache.path(), b"again");
        assert_eq!(&*Template::load(cache.path(), KEY).expect("whole").state, b"again");
    }

    #[test]
    fn what_others_are_making_is_left_alone_and_other_keys_go() {
        let cache = tempfile::tempdir().unwrap();
        let theirs = cache.path().join("making-theirs");
        fs::create_dir(&theirs).unwrap();
        fs::write(theirs.join(MEMORY), b"half").unwrap();
        let old = cache.path().join("feedfeedfeedfeed");
        fs::create_dir(&old).unwrap();
        made(cache.path(), b"state");
        assert!(theirs.join(MEMORY).exists() && !old.exists());
        // Nobody holds it: that is what a killed daemon left, and the next one's start clears it.
        let holder = File::open(&theirs).unwrap();
        flock(&holder, FlockOperation::LockExclusive).unwrap();
        assert_eq!(reap(cache.path()), 0);
        drop(holder);
        assert_eq!(reap(cache.path()), 1);
    }
}
