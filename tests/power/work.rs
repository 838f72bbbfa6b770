//! A client at work: requests of both faces, in an order that a seed gives, each noted before and after.
//!
//! Every request has a name of its own ([`STEPS`]), so that a round can end with each of them; what it needs is made first.
//! Ids and keys of removed things are used again now and then.

use super::{
    client::{Calls, Failure},
    containers::{Shown, write_synced},
    engine::Engine,
    record::Events,
    support::{Tar, noise},
    world::{Content, Disk, Kind, Promise, Thing, World},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// What a client can do.
pub(crate) const STEPS: [&str; 16] = [
    "create",
    "apply",
    "create-rw",
    "write",
    "put",
    "diff",
    "remove",
    "init",
    "prepare",
    "unpack",
    "commit",
    "container",
    "container-write",
    "container-commit",
    "view",
    "remove-snapshot",
];
/// Besides, without a promise of its own in `docs/reliability.md`.
pub(crate) const LABEL_STEP: &str = "label";
/// Different tars: few, so that snapshots share images.
const TARS: u64 = 6;

/// Why a client ends.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The cut.
    Cut,
    /// A request failed before it.
    Failed(String),
}

/// Numbers that follow from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.below(all.len() as u64) as usize].clone()) }
    }
}

pub(crate) struct Client<'a> {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) home: PathBuf,
    pub(crate) calls: Calls,
    pub(crate) engine: &'a Engine,
    pub(crate) random: Random,
    /// Set before the cut.
    pub(crate) cutting: &'a AtomicBool,
    pub(crate) events: &'a Events,
    pub(crate) world: World,
    /// Sandboxes that this client has mounted itself, by key, and where Docker's are shown.
    pub(crate) shown: BTreeMap<String, Shown>,
    pub(crate) dirs: BTreeMap<String, PathBuf>,
    pub(crate) count: u64,
}

pub(crate) fn tar(seed: u64) -> Vec<u8> {
    // One is larger than what is written back at a time.
    let length = if seed == 0 { 700_000 } else { 3000 + seed as usize * 9000 };
    Tar::new().dir("d/").file(&format!("d/t{seed}"), &noise(seed + 50, length)).file("same", b"same").end()
}

impl Client<'_> {
    /// A request, noted before and after. `changes`: the names that it changes, and what they stand for afterwards.
    fn request<T>(
        &mut self,
        step: &str,
        changes: &[(&str, Option<Thing>, Promise)],
        send: impl FnOnce(&Calls) -> Result<T, Failure>,
    ) -> Result<T, Stop> {
        for (name, then, _) in changes {
            self.world.sent(name, then.clone());
        }
        let names: Vec<&str> = changes.iter().map(|(name, ..)| *name).collect();
        let event = self.events.begun(&self.name, step, &names);
        let result = send(&self.calls);
        let cut = self.cutting.load(Ordering::SeqCst);
        self.events.ended(event, result.is_ok() && !cut);
        match result {
            // What is answered after the cut would not have left the machine. XFS lets a sync of a directory succeed
            // that begins after its shutdown, since nothing of it waits for the log any more.
            Ok(_) if cut => Err(Stop::Cut),
            Ok(value) => {
                for (name, then, promise) in changes {
                    self.world.acknowledged(name, then.clone(), *promise);
                }
                Ok(value)
            }
            Err(text) => Err(self.stop(&format!("{step} {names:?}: {text}"))),
        }
    }

    fn stop(&self, text: &str) -> Stop {
        if self.cutting.load(Ordering::SeqCst) { Stop::Cut } else { Stop::Failed(text.to_owned()) }
    }

    /// Work in a container, which ends with the disk.
    fn in_container<T>(&self, result: std::io::Result<T>) -> Result<T, Stop> {
        result.map_err(|e| self.stop(&format!("in a container: {e}")))
    }

    /// A name that stands for nothing: a new one, or that of something removed.
    fn fresh(&mut self, what: &str) -> String {
        let gone: Vec<String> = (self.world.names.iter())
            .filter(|(name, all)| all.last() == Some(&None) && name.contains(&format!("-{what}-")))
            .map(|(name, _)| name.clone())
            .collect();
        if self.random.below(3) == 0
            && let Some(name) = self.random.of(&gone)
        {
            return name;
        }
        self.count += 1;
        format!("{}-{what}-{}", self.name, self.count)
    }

    fn some(&mut self, fits: impl Fn(&str, &Thing) -> bool) -> Option<String> {
        let names: Vec<String> = self
            .world
            .things()
            .filter(|(name, thing)| fits(name, thing))
            .map(|(name, _)| name.to_owned())
            .collect();
        self.random.of(&names)
    }

    /// An applied layer or a sandbox that nothing writes any more, or nothing.
    fn docker_parent(&mut self) -> String {
        if self.random.below(4) == 0 {
            return String::new();
        }
        let mounted = self.dirs.clone();
        let fits = |name: &str, thing: &Thing| {
            thing.kind == Kind::Layer
                && match &thing.content {
                    Content::Tar(_) => true,
                    // As Docker's init layers.
                    Content::Disk(disk) => !disk.mounted && !mounted.contains_key(name),
                    _ => false,
                }
        };
        self.some(fits).unwrap_or_default()
    }

    fn committed(&mut self) -> String {
        if self.random.below(4) == 0 {
            return String::new();
        }
        self.some(|_, thing| thing.kind == Kind::Committed).unwrap_or_default()
    }

    /// One step of [`STEPS`], with what it needs.
    pub(crate) fn step(&mut self, step: &str) -> Result<(), Stop> {
        match step {
            "create" => self.create(false).map(drop),
            "apply" => self.apply(),
            "create-rw" => self.create(true).map(drop),
            "write" => self.write().map(drop),
            "put" => self.put().map(drop),
            "diff" => self.diff(),
            "remove" => self.remove(),
            "init" => self.init(),
            "prepare" => self.prepare(true).map(drop),
            "unpack" => self.unpack().map(drop),
            "commit" => self.commit(),
            "container" => self.prepare(false).map(drop),
            "container-write" => self.container_write().map(drop),
            "container-commit" => self.container_commit(),
            "view" => self.view(),
            "remove-snapshot" => self.remove_snapshot(),
            LABEL_STEP => self.label(),
            other => panic!("no step '{other}'"),
        }
    }

    pub(crate) fn any_step(&mut self) -> Result<(), Stop> {
        let steps = [&STEPS[..], &[LABEL_STEP]].concat();
        let step = self.random.of(&steps).unwrap();
        // An Init of one client would race the others'.
        if step == "init" && self.name != "lone" { Ok(()) } else { self.step(step) }
    }

    fn init(&mut self) -> Result<(), Stop> {
        let body = json!({"Home": self.home, "Opts": null});
        self.request("init", &[], |calls| calls.docker("Init", &body).map(drop))
    }

    fn create(&mut self, writable: bool) -> Result<String, Stop> {
        let (id, parent) = (self.fresh("layer"), self.docker_parent());
        let content = if writable { Content::Disk(Disk::default()) } else { Content::Empty };
        let then = Thing::new(Kind::Layer, &parent, content);
        let body = json!({"ID": id, "Parent": parent});
        let (step, method) = if writable { ("create-rw", "CreateReadWrite") } else { ("create", "Create") };
        self.request(step, &[(&id, Some(then), Promise::Durable)], |c| c.docker(method, &body).map(drop))?;
        Ok(id)
    }

    fn apply(&mut self) -> Result<(), Stop> {
        let waiting = self.some(|_, t| t.kind == Kind::Layer && t.content == Content::Empty);
        let id = match waiting {
            Some(id) => id,
            None => self.create(false)?,
        };
        let parent = self.world.now(&id).unwrap().parent.clone();
        let tar = Arc::new(tar(self.random.below(TARS)));
        self.world.sent(&id, Some(Thing::new(Kind::Layer, &parent, Content::Unfinished)));
        let then = Thing::new(Kind::Layer, &parent, Content::Tar(tar.clone()));
        self.request("apply", &[(&id, Some(then), Promise::Durable)], |c| c.apply(&id, &parent, &tar))
    }

    /// A sandbox that is shown, with a file in it that was synced, and one that was not.
    fn write(&mut self) -> Result<String, Stop> {
        let world = &self.world;
        let writable: Vec<String> = world
            .things()
            .filter(|(name, t)| t.kind == Kind::Layer && t.disk().is_some() && !world.has_children(name))
            .map(|(name, _)| name.to_owned())
            .collect();
        let id = match self.random.of(&writable) {
            Some(id) => id,
            None => self.create(true)?,
        };
        if !self.dirs.contains_key(&id) {
            let dir = self.request("get", &[], |c| c.get(&id))?;
            self.dirs.insert(id.clone(), dir);
        }
        let dir = self.dirs[&id].clone();
        self.write_files(&id, &dir)?;
        Ok(id)
    }

    fn write_files(&mut self, name: &str, dir: &std::path::Path) -> Result<(), Stop> {
        self.count += 1;
        let (loose, synced) = (format!("loose{}", self.count), format!("synced{}", self.count));
        let content = noise(self.count, 1000 + self.random.below(40_000) as usize);
        self.world.change_disk(name, |disk| {
            disk.diff = None;
            disk.loose.insert(loose.clone(), content.clone());
        });
        self.in_container(std::fs::write(dir.join(&loose), &content))?;
        let event = self.events.begun(&self.name, "fsync in a container", &[name]);
        let written = write_synced(dir, &synced, &content);
        let cut = self.cutting.load(Ordering::SeqCst);
        self.events.ended(event, written.is_ok() && !cut);
        self.in_container(written)?;
        if cut {
            return Err(Stop::Cut);
        }
        self.world.change_disk(name, |disk| {
            disk.synced.insert(synced, content);
        });
        Ok(())
    }

    fn put(&mut self) -> Result<String, Stop> {
        let shown: Vec<String> = self.dirs.keys().cloned().collect();
        let id = match self.random.of(&shown) {
            Some(id) => id,
            None => self.write()?,
        };
        self.request("put", &[], |c| c.put(&id))?;
        self.dirs.remove(&id);
        self.world.change_disk(&id, Disk::settle);
        Ok(id)
    }

    fn diff(&mut self) -> Result<(), Stop> {
        let id = self.put()?;
        let parent = self.world.now(&id).unwrap().parent.clone();
        let tar = self.request("diff", &[], |c| c.diff(&id, &parent))?;
        self.world.change_disk(&id, |disk| disk.diff = Some(Arc::new(tar)));
        Ok(())
    }

    fn remove(&mut self) -> Result<(), Stop> {
        let leaves: Vec<String> = self
            .world
            .things()
            .filter(|(name, t)| t.kind == Kind::Layer && !self.world.has_children(name))
            .map(|(name, _)| name.to_owned())
            .collect();
        let id = match self.random.of(&leaves) {
            Some(id) => id,
            None => self.create(true)?,
        };
        if self.dirs.remove(&id).is_some() {
            self.request("put", &[], |c| c.put(&id))?;
            self.world.change_disk(&id, Disk::settle);
        }
        let body = json!({"ID": id});
        self.request("remove", &[(&id, None, Promise::Durable)], |c| c.docker("Remove", &body).map(drop))
    }

    fn prepare(&mut self, for_layer: bool) -> Result<String, Stop> {
        // Keys as containerd's: what is to be unpacked is recognized by them.
        let key = self.fresh(if for_layer { "extract" } else { "box" });
        let parent = self.committed();
        let (content, promise) = if for_layer {
            (Content::Empty, Promise::OrUndone)
        } else {
            (Content::Disk(Disk::default()), Promise::Durable)
        };
        let then = Thing::new(Kind::Active, &parent, content);
        let step = if for_layer { "prepare" } else { "container" };
        let mounts = self.request(step, &[(&key, Some(then), promise)], |c| c.prepare(&key, &parent))?;
        if !for_layer {
            let shown = self.in_container(Shown::mount(&self.folder, &mounts))?;
            self.shown.insert(key.clone(), shown);
            self.world.change_disk(&key, |disk| disk.mounted = true);
        }
        Ok(key)
    }

    fn unpack(&mut self) -> Result<String, Stop> {
        let waiting = self.some(|_, t| t.kind == Kind::Active && t.content == Content::Empty);
        let key = match waiting {
            Some(key) => key,
            None => self.prepare(true)?,
        };
        let tar = Arc::new(tar(self.random.below(TARS)));
        let digest = self.engine.put(&tar);
        let mut then = self.world.now(&key).unwrap().clone();
        let mounts = self.request("mounts", &[], |c| c.mounts(&key))?;
        then.content = Content::Tar(tar.clone());
        self.request("unpack", &[(&key, Some(then), Promise::Durable)], |c| {
            c.unpack(mounts, &digest, tar.len())
        })?;
        Ok(key)
    }

    fn commit(&mut self) -> Result<(), Stop> {
        let ready = self.some(|_, t| t.kind == Kind::Active && matches!(t.content, Content::Tar(_)));
        let key = match ready {
            Some(key) => key,
            None => self.unpack()?,
        };
        self.commit_as("commit", &key, Promise::Durable)
    }

    fn commit_as(&mut self, step: &str, key: &str, promise: Promise) -> Result<(), Stop> {
        let name = self.fresh("image");
        let mut then = self.world.now(key).unwrap().clone();
        then.kind = Kind::Committed;
        then.label = None;
        if let Content::Disk(disk) = &mut then.content {
            // A name never stands for part of its data.
            disk.settle();
        }
        // The name may have been another's. Of a key that was used before, an earlier snapshot may come back as well.
        self.world.commits.retain(|(_, other, _)| *other != name);
        if self.world.names[key].iter().flatten().count() == 1 {
            self.world.commits.push((key.to_owned(), name.clone(), promise));
        }
        self.request(step, &[(key, None, promise), (&name, Some(then), promise)], |c| c.commit(&name, key))
    }

    fn container_write(&mut self) -> Result<String, Stop> {
        let running: Vec<String> = self.shown.keys().cloned().collect();
        let key = match self.random.of(&running) {
            Some(key) => key,
            None => self.prepare(false)?,
        };
        let dir = self.shown[&key].place.clone();
        self.write_files(&key, &dir)?;
        Ok(key)
    }

    fn container_commit(&mut self) -> Result<(), Stop> {
        let key = self.container_write()?;
        let shown = self.shown.remove(&key).unwrap();
        self.in_container(shown.end())?;
        self.world.change_disk(&key, |disk| disk.mounted = false);
        self.commit_as("container-commit", &key, Promise::OrUndone)
    }

    fn view(&mut self) -> Result<(), Stop> {
        let (key, parent) = (self.fresh("view"), self.committed());
        let then = Thing::new(Kind::View, &parent, Content::Empty);
        self.request("view", &[(&key, Some(then), Promise::Durable)], |c| c.view(&key, &parent).map(drop))
    }

    fn remove_snapshot(&mut self) -> Result<(), Stop> {
        let leaves: Vec<String> = self
            .world
            .things()
            .filter(|(name, t)| t.kind != Kind::Layer && !self.world.has_children(name))
            .map(|(name, _)| name.to_owned())
            .collect();
        let key = match self.random.of(&leaves) {
            Some(key) => key,
            None => self.prepare(false)?,
        };
        if let Some(shown) = self.shown.remove(&key) {
            self.in_container(shown.end())?;
            self.world.change_disk(&key, |disk| disk.mounted = false);
        }
        self.request("remove-snapshot", &[(&key, None, Promise::OrUndone)], |c| c.remove_snapshot(&key))
    }

    fn label(&mut self) -> Result<(), Stop> {
        let Some(key) = self.some(|_, t| t.kind != Kind::Layer) else { return Ok(()) };
        self.count += 1;
        let value = self.count.to_string();
        let mut then = self.world.now(&key).unwrap().clone();
        then.label = Some(value.clone());
        // Durable, but only as far as the snapshot itself.
        let promise =
            if self.world.names[&key].contains(&None) { Promise::OrUndone } else { Promise::Durable };
        self.request(LABEL_STEP, &[(&key, Some(then), promise)], |c| c.label(&key, &value))
    }
}
