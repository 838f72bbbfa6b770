//! What a new daemon finds after the cut, compared with what the clients know.
//!
//! ```text
//!   each name: there? in which state? ─► one of those that the world allows ─► content read back ─► one that fits
//!   parent missing, as it may be      ─► its children are missing
//!   writers: each file that was synced is there ─► new requests of both faces work ─► staging becomes empty
//! ```

use super::{
    PATIENCE,
    client::{Calls, Failure, LABEL},
    containers::{Shown, nth},
    daemon::homes,
    engine::Engine,
    room::Room,
    round::{Outcome, Writer},
    work::tar,
    world::{Content, Disk, Kind, Promise, Thing, World},
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::atomic::Ordering,
    time::Instant,
};

/// What a name stands for, as the daemon says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: Kind,
    parent: String,
    /// Of Docker's face.
    state: Option<String>,
    label: Option<String>,
}

pub(crate) struct Check<'a> {
    pub(crate) calls: Calls,
    pub(crate) room: &'a Room,
    pub(crate) engine: &'a Engine,
    pub(crate) outcome: &'a mut Outcome,
}

impl Check<'_> {
    fn lost(&mut self, text: String) {
        self.outcome.losses.push(text);
    }

    pub(crate) fn everything(mut self, worlds: &[World], writers: &[Writer]) {
        let mut known: BTreeSet<String> = writers.iter().map(|w| w.name.clone()).collect();
        for world in worlds {
            known.extend(world.names.keys().cloned());
            self.world(world);
        }
        match self.calls.names() {
            Ok(names) => {
                for name in
                    names.into_iter().filter(|name| !known.contains(name) && !name.starts_with("check-"))
                {
                    self.lost(format!("snapshot '{name}' is listed, and no client made it"));
                }
            }
            Err(text) => self.lost(format!("list: {text}")),
        }
        for writer in writers {
            if let Err(text) = self.writer(writer) {
                self.lost(format!("{}: {text}", writer.name));
            }
        }
        if let Err(text) = self.goes_on() {
            self.lost(format!("a new request after the cut: {text}"));
        }
        self.wait_for_no_debris();
    }

    fn see(&self, name: &str, docker: bool) -> Result<Option<Seen>, Failure> {
        if docker {
            return Ok(self.calls.layer(name)?.map(|(state, parent)| Seen {
                kind: Kind::Layer,
                parent,
                state: Some(state),
                label: None,
            }));
        }
        Ok(self.calls.stat(name)?.map(|info| Seen {
            kind: match info.kind() {
                containerd_api::snapshots::Kind::Active => Kind::Active,
                containerd_api::snapshots::Kind::View => Kind::View,
                _ => Kind::Committed,
            },
            parent: info.parent.clone(),
            state: None,
            label: info.labels.get(LABEL).cloned(),
        }))
    }

    fn world(&mut self, world: &World) {
        let mut seen = BTreeMap::new();
        for (name, all) in &world.names {
            let docker = all.iter().flatten().any(|t| t.kind == Kind::Layer);
            match self.see(name, docker) {
                Ok(found) => {
                    seen.insert(name.as_str(), found);
                }
                Err(text) => self.lost(format!("{name}: {text}")),
            }
        }
        let orphaned = |name: &str| {
            world.names[name].iter().flatten().any(|t| {
                let missing = |parent: &str| seen.get(parent).is_some_and(Option::is_none);
                !t.parent.is_empty() && t.kind != Kind::Layer && missing(&t.parent)
            })
        };
        for (key, name, promise) in &world.commits {
            // Later requests may have removed either, or made the key again.
            let latest = |name: &str| world.names[name].last().unwrap().is_some();
            if latest(key) || !latest(name) {
                continue;
            }
            let (key_there, name_there) = (seen.get(key.as_str()), seen.get(name.as_str()));
            let (Some(key_there), Some(name_there)) = (key_there, name_there) else { continue };
            match (key_there.is_some(), name_there.is_some()) {
                (true, true) => self.lost(format!("'{key}' is there, and '{name}' that it was committed as")),
                (false, false) if *promise == Promise::Durable && !orphaned(name) => {
                    self.lost(format!("neither '{key}' is there nor '{name}' that it was committed as"));
                }
                _ => {}
            }
        }
        for (name, all) in &world.names {
            let Some(found) = seen.get(name.as_str()) else { continue };
            let Some(found) = found else {
                if !all.contains(&None) && !orphaned(name) {
                    self.lost(format!("'{name}' is missing; it was {}", brief(all)));
                }
                continue;
            };
            let fitting: Vec<&Thing> = all.iter().flatten().filter(|thing| fits(thing, found)).collect();
            if fitting.is_empty() {
                self.lost(format!("'{name}' is {found:?}, and may be {}", brief(all)));
                continue;
            }
            let tries: Vec<Result<(), String>> =
                fitting.iter().rev().map(|thing| self.content(name, thing)).collect();
            if tries.iter().all(Result::is_err) {
                let texts: Vec<String> = tries.into_iter().filter_map(Result::err).collect();
                self.lost(format!("'{name}' has other content: {texts:?}; it may be {}", brief(all)));
            }
        }
    }

    /// Whether something has the content that it must have.
    fn content(&mut self, name: &str, thing: &Thing) -> Result<(), String> {
        match (&thing.content, thing.kind) {
            (Content::Empty | Content::Unfinished, Kind::Layer) => Ok(()),
            (Content::Tar(tar), Kind::Layer) => {
                let found = self.calls.diff(name, &thing.parent)?;
                self.outcome.count("layers read back", 1);
                if found == **tar { Ok(()) } else { Err(format!("Diff returns {} other bytes", found.len())) }
            }
            (Content::Disk(disk), Kind::Layer) => {
                if let Some(tar) = &disk.diff {
                    let found = self.calls.diff(name, &thing.parent)?;
                    if found != **tar {
                        return Err(format!("Diff returns {} bytes, other than before", found.len()));
                    }
                }
                let dir = self.calls.get(name)?;
                let files = self.files(&dir, disk);
                self.calls.put(name)?;
                files
            }
            (Content::Empty | Content::Unfinished, _) => self.calls.mounts(name).map(drop),
            (Content::Tar(_), Kind::Active) => {
                // Its tar can be read when it is committed.
                let committed = format!("check-{name}");
                self.calls.commit(&committed, name)?;
                self.content(&committed, &Thing { kind: Kind::Committed, ..thing.clone() })
            }
            (Content::Tar(tar), _) => {
                let left = self.calls.view("check-left", &thing.parent)?;
                let right = self.calls.view("check-right", name)?;
                let digest = self.calls.compare(left, right)?;
                self.calls.remove_snapshot("check-left")?;
                self.calls.remove_snapshot("check-right")?;
                self.outcome.count("layers read back", 1);
                let found = self.engine.get(&digest);
                if found == **tar { Ok(()) } else { Err(format!("Diff returns {} other bytes", found.len())) }
            }
            (Content::Disk(disk), Kind::Active) => {
                let mounts = self.calls.mounts(name)?;
                let shown = Shown::mount(&self.room.folder, &mounts).map_err(|e| format!("mount: {e}"))?;
                self.files(&shown.place, disk)
            }
            (Content::Disk(disk), _) => {
                let mounts = self.calls.view("check-disk", name)?;
                let shown = Shown::mount(&self.room.folder, &mounts).map_err(|e| format!("mount: {e}"))?;
                let files = self.files(&shown.place, disk);
                drop(shown);
                self.calls.remove_snapshot("check-disk")?;
                files
            }
        }
    }

    fn files(&mut self, dir: &Path, disk: &Disk) -> Result<(), String> {
        for (name, content) in &disk.synced {
            match fs::read(dir.join(name)) {
                Ok(found) if found == *content => {}
                Ok(found) => return Err(format!("file {name} has {} other bytes", found.len())),
                Err(e) => return Err(format!("file {name}: {e}")),
            }
        }
        self.outcome.count("synced files of containers", disk.synced.len() as u64);
        Ok(())
    }

    fn writer(&mut self, writer: &Writer) -> Result<(), String> {
        let synced = (0..writer.synced.load(Ordering::SeqCst)).map(|n| (format!("n{n}"), nth(n)));
        let disk = Disk { synced: synced.collect(), ..Disk::default() };
        let kind = if writer.face == "docker" { Kind::Layer } else { Kind::Active };
        self.content(&writer.name, &Thing::new(kind, "", Content::Disk(disk)))
    }

    /// Both faces work as on any day.
    fn goes_on(&mut self) -> Result<(), Failure> {
        let bytes = tar(1);
        self.calls.docker("Create", &json!({"ID": "check-layer"}))?;
        self.calls.apply("check-layer", "", &bytes)?;
        if self.calls.diff("check-layer", "")? != bytes {
            return Err("Diff returns other bytes".into());
        }
        let digest = self.engine.put(&bytes);
        let mounts = self.calls.prepare("check-extract-1", "")?;
        self.calls.unpack(mounts, &digest, bytes.len())?;
        self.calls.commit("check-image", "check-extract-1")?;
        let mounts = self.calls.prepare("check-box", "check-image")?;
        let shown = Shown::mount(&self.room.folder, &mounts).map_err(|e| format!("mount: {e}"))?;
        fs::write(shown.place.join("new"), b"new").map_err(|e| format!("write: {e}"))?;
        drop(shown);
        self.calls.remove_snapshot("check-box")
    }

    fn wait_for_no_debris(&mut self) {
        let begin = Instant::now();
        for home in homes(self.room) {
            for folder in ["staging", "scratch"].map(|name| home.join(name)) {
                while fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some()) {
                    if begin.elapsed() > PATIENCE {
                        self.lost(format!("debris stays in {}", folder.display()));
                        break;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }
}

/// Whether what is seen of a name may be this.
fn fits(thing: &Thing, seen: &Seen) -> bool {
    let state = match &thing.content {
        Content::Empty => "created",
        Content::Unfinished => "applying",
        Content::Tar(_) => "applied",
        Content::Disk(_) => "sandbox",
    };
    thing.kind == seen.kind
        && thing.parent == seen.parent
        && thing.label == seen.label
        && seen.state.as_deref().is_none_or(|seen| seen == state)
}

/// Without the bytes.
fn brief(all: &[Option<Thing>]) -> String {
    let one = |thing: &Option<Thing>| match thing {
        None => "absent".to_owned(),
        Some(thing) => {
            let content = match &thing.content {
                Content::Empty => "empty".to_owned(),
                Content::Unfinished => "unfinished".to_owned(),
                Content::Tar(tar) => format!("a tar of {} bytes", tar.len()),
                Content::Disk(disk) => format!("a disk with {:?}", disk.synced.keys().collect::<Vec<_>>()),
            };
            format!("{:?} on '{}', label {:?}, {content}", thing.kind, thing.parent, thing.label)
        }
    };
    all.iter().map(one).collect::<Vec<_>>().join(", or ")
}
