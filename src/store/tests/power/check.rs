//! Opens what a power cut left, repairs it, and says what is there.

use super::{
    content::Content,
    disk::{Found, State},
    recorder::Legal,
};
use crate::store::{
    DiskThread, Layer, LayerState, Layout, Store, boot_id, layout, snapshot::snapshot_id, tests::unlocked,
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

const HERE: &DiskThread = &DiskThread::here();
/// Files from this size on are written once and linked.
const LARGE: u64 = 16 << 10;
/// The boot after the power cut.
const NEXT_BOOT: &str = "00000000-0000-4000-8000-000000000000";
/// The view of a layer that is not there.
pub(crate) const ABSENT: &str = "absent";
/// The name under which a store itself is viewed: its id and its Init.
const STORE: &str = "(store)";
/// Where a driver's root keeps the last Init, which is viewed under this name.
const LAST_INIT: &str = "root/last-init.json";
/// What a process writes beside a file before it replaces it; the next one deletes it before it does the same.
const UNFINISHED: &str = ".new";

/// How a store is opened.
pub(crate) type Open = fn(&Path) -> Result<Store, crate::store::StoreError>;

/// What a store says of its layers, by id. Two layers with the same text are the same to every caller.
pub(crate) fn views(store: &Store) -> BTreeMap<String, String> {
    let mut views: BTreeMap<String, String> =
        store.layers().iter().map(|layer| (layer.id.to_string(), view(store.layout(), layer))).collect();
    let marker = store.marker();
    views.insert(STORE.into(), format!("{} {:?}", marker.store_id, marker.init));
    // The service's root stands beside the home.
    let above = store.layout().home().parent();
    if let Some(Ok(last)) = above.map(|above| fs::read_to_string(above.join(LAST_INIT))) {
        views.insert(LAST_INIT.into(), last);
    }
    views
}

fn view(layout: &Layout, layer: &Layer) -> String {
    let meta = match &layer.meta {
        Ok(meta) => meta,
        Err(reason) => return format!("damaged: {reason}"),
    };
    let files: &[&str] = match meta.state {
        LayerState::Created | LayerState::Applying => &[],
        LayerState::Applied => &[layout::LAYER_FILE, layout::RECORD_FILE],
        LayerState::Sandbox => &[layout::SANDBOX_FILE, layout::SANDBOX_VHDX_FILE],
    };
    let mut text = format!("{:?} on {:?}", meta.state, layer.chain);
    for name in files {
        let path = layout.layer_file(&layer.id, name);
        match fs::read_link(&path) {
            Ok(target) => {
                let target = target.strip_prefix(layout.home()).unwrap_or(&target).to_owned();
                text = format!("{text}, {name} leads to {}", target.display());
            }
            Err(_) => {
                if let Ok(content) = Content::read(&path) {
                    text = format!("{text}, {name} {}:{:x}", content.len, content.hash);
                }
            }
        }
    }
    format!("{text}, {}", serde_json::to_string(&**meta).unwrap())
}

/// A view in which the disk may have any bytes.
pub(crate) fn masked(view: &str) -> String {
    let Some(at) = view.find(layout::SANDBOX_VHDX_FILE) else { return view.to_owned() };
    let end = at + view[at..].find(", {").expect("facts follow the files");
    format!("{}{ANY}{}", &view[..at], &view[end..])
}

/// Stands for a disk of any bytes.
const ANY: &str = "any disk";

/// Places where states are made.
pub(crate) struct Bench {
    folder: tempfile::TempDir,
    /// Large files by their hashes.
    large: HashMap<u64, PathBuf>,
    number: usize,
    boot: String,
    open: Open,
    home: PathBuf,
}

impl Bench {
    /// `home` is the store's directory in the states.
    pub(crate) fn new(open: Open, home: &str) -> Self {
        // Memory, if there is some: what is durable is decided by the model.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let folder = folder.unwrap();
        fs::create_dir(folder.path().join("large")).unwrap();
        Self { folder, large: HashMap::new(), number: 0, boot: boot_id(), open, home: home.into() }
    }

    /// Makes a state in a new directory.
    fn make(&mut self, state: &State) -> PathBuf {
        self.number += 1;
        let root = self.folder.path().join(self.number.to_string());
        fs::create_dir(&root).unwrap();
        let mut first: HashMap<usize, PathBuf> = HashMap::new();
        for (path, found) in state {
            let path = root.join(path);
            match found {
                Found::Dir => fs::create_dir(&path).unwrap(),
                Found::Link(target) => std::os::unix::fs::symlink(root.join(target), &path).unwrap(),
                Found::File(ino, content) => {
                    if let Some(other) = first.get(ino) {
                        fs::hard_link(other, &path).unwrap();
                        continue;
                    }
                    first.insert(*ino, path.clone());
                    self.write(content, &path);
                }
            }
        }
        root
    }

    fn write(&mut self, content: &Content, path: &Path) {
        if content.len < LARGE {
            let later = content.replaced(&self.boot, NEXT_BOOT);
            return later.as_ref().unwrap_or(content).write(path).unwrap();
        }
        let (number, folder) = (self.large.len(), self.folder.path().join("large"));
        let kept = self.large.entry(content.hash).or_insert_with(|| {
            let kept = folder.join(number.to_string());
            content.write(&kept).unwrap();
            kept
        });
        fs::hard_link(kept, path).unwrap();
    }

    /// Opens a state as a start after the power cut does, twice, and compares what is there with what may be.
    pub(crate) fn check(&mut self, state: &State, legal: &Legal) -> Result<(), String> {
        let root = self.make(state);
        let home = root.join(&self.home);
        let found = self.start(&home, true).and_then(|found| {
            let again = self.start(&home, false)?;
            // A store that was lost is made by the first start.
            let same = found.iter().all(|(id, view)| again.get(id) == Some(view))
                && again.keys().all(|id| id == STORE || found.contains_key(id));
            if same {
                Ok(found)
            } else {
                Err(format!("a second start finds {again:#?}, the first {found:#?}"))
            }
        });
        let checked = found.and_then(|found| compare(&found, legal));
        fs::remove_dir_all(&root).unwrap();
        checked
    }

    /// What a kill leaves in a state in which nothing is lost.
    pub(crate) fn look(&mut self, state: &State) -> Result<BTreeMap<String, String>, String> {
        let root = self.make(state);
        let found = self.start(&root.join(&self.home), true);
        fs::remove_dir_all(&root).unwrap();
        found
    }

    fn start(&self, home: &Path, debris: bool) -> Result<BTreeMap<String, String>, String> {
        let fresh = !home.join(layout::MARKER).exists();
        let store = unlocked(|| (self.open)(home)).map_err(|e| format!("a start fails: {e}"))?;
        let found = store.debris(HERE).map_err(|e| e.to_string())?;
        if !debris && !found.is_empty() {
            return Err(format!("debris after a start: {found:?}"));
        }
        let report = store.collect(HERE, found);
        if !report.failed.is_empty() {
            return Err(format!("debris stays: {:?}", report.failed));
        }
        // As `driver::snapshots` at its start.
        for layer in store.doubtful() {
            if let Err(reason) = &layer.meta
                && !store.has_no_record(HERE, &layer.id)
            {
                return Err(format!("snapshot {} is damaged: {reason}", layer.id));
            }
            if let Some(vanished) = store.vanish_doubtful(&layer.id) {
                let doomed = store.discard(HERE, &vanished).map_err(|e| e.to_string())?;
                doomed.delete(HERE, &store);
            }
        }
        if let [fault, ..] = &store.structural_faults(HERE)[..] {
            return Err(format!("a fault: {fault:?}"));
        }
        let mut views = views(&store);
        if fresh {
            // This start has made another one.
            views.remove(STORE);
        }
        if let Some((id, damaged)) = views.iter().find(|(_, view)| view.starts_with("damaged")) {
            return Err(format!("{id} is {damaged}"));
        }
        let known = [
            layout::MARKER,
            layout::OWNER_LOCK,
            layout::CACHE,
            layout::SCRATCH,
            layout::STAGING,
            layout::MOUNTS,
        ];
        for entry in fs::read_dir(home).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !known.contains(&&*name) && !views.contains_key(&name) && name != layout::MARKER_NEW {
                return Err(format!("{name} is neither a layer nor known"));
            }
        }
        if let Some(reserved) = store.marker().snapshot_numbers {
            let given: Vec<String> = (0..reserved).filter_map(snapshot_id).map(|id| id.to_string()).collect();
            if let Some(layer) = store.layers().iter().find(|layer| !given.contains(&layer.id.to_string())) {
                return Err(format!("the number of snapshot {} may be given again", layer.id));
            }
            let listed = store.snapshots_listed().len();
            if listed != store.len() {
                return Err(format!("{} snapshots have {listed} names", store.len()));
            }
        }
        for layer in store.layers() {
            for entry in fs::read_dir(home.join(layer.id.as_str())).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let of_a_layer = [
                    layout::META_FILE,
                    layout::CHAIN_FILE,
                    layout::SNAPSHOT_FILE,
                    layout::LAYER_FILE,
                    layout::RECORD_FILE,
                    layout::SANDBOX_FILE,
                    layout::SANDBOX_VHDX_FILE,
                ];
                let own_name = format!("{}.vhd", layer.id);
                if !of_a_layer.contains(&&*name) && !name.ends_with(UNFINISHED) && name != own_name {
                    return Err(format!("{}/{name} is debris", layer.id));
                }
            }
        }
        Ok(views)
    }
}

fn compare(found: &BTreeMap<String, String>, legal: &Legal) -> Result<(), String> {
    for (id, allowed) in legal {
        let view = found.get(id).map_or(ABSENT, String::as_str);
        let fits = |text: &String| text == view || (text.contains(ANY) && *text == masked(view));
        if !allowed.iter().any(fits) {
            return Err(format!("{id} is\n  {view}\nand may be\n  {}", allowed.join("\n  ")));
        }
    }
    match found.keys().find(|id| !legal.contains_key(*id)) {
        Some(id) => Err(format!("nobody made {id}: {}", found[id])),
        None => Ok(()),
    }
}
