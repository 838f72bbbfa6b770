//! Snapshots for virtual machines, on layers whose images are not looked at.

use super::*;
use crate::{
    store::{AppliedMeta, LayerMeta, SharedMeta, layout},
    svm::LayerKind,
};
use std::{fs, path::PathBuf};

const REUSE: &str = "containerd.io/snapshot/io.microsoft.container.storage.reuse-scratch";
const OWNER: &str = "containerd.io/snapshot/io.microsoft.owner.key";
const SIZE_GB: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.size-gb";
const LOCATION: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.location";

struct Fixture {
    _folder: tempfile::TempDir,
    snapshots: Snapshots,
}

impl Fixture {
    fn new(mounts: SnapshotMounts) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        let options =
            Options { snapshot_mounts: mounts, pool_spares: 0, min_free_bytes: 0, ..Options::default() };
        let config = DriverConfig { root: root.clone(), options, worker_program: None };
        let snapshots = Snapshots::open(&root, &config).unwrap();
        Self { _folder: folder, snapshots }
    }

    fn path(&self, id: &str, name: &str) -> PathBuf {
        self.snapshots.home().store.layout().layer_file(&id.parse().unwrap(), name)
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.snapshots.home().store.layout().layer(&id.parse().unwrap())
    }

    fn id(&self, name: &str) -> LayerId {
        self.snapshots.member(name).unwrap().layer.id
    }

    async fn prepare(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<Shown, DriverError> {
        self.snapshots.prepare(request(key, parent, labels)).await
    }

    /// A committed layer, as an Apply leaves it, that has the image of the layer `image`, or one of its own.
    async fn layer(&self, name: &str, parent: &str, image: Option<&str>) -> LayerId {
        let key = format!("k/1/extract-1 {name}");
        self.prepare(&key, parent, &[]).await.unwrap();
        let (store, member) = (&self.snapshots.home().store, self.snapshots.member(&key).unwrap());
        let (id, generation) = (member.layer.id.clone(), member.layer.generation);
        let thread = &DiskThread::here();
        let staged = store.stage(thread, &id).unwrap();
        match image {
            Some(image) => {
                fs::hard_link(self.path(image, layout::LAYER_FILE), staged.path().join(layout::LAYER_FILE))
            }
            None => fs::write(staged.path().join(layout::LAYER_FILE), vec![1; 8192]),
        }
        .unwrap();
        let digest = format!("sha256:{}", "0".repeat(64));
        let applied = AppliedMeta {
            image_bytes: 4096,
            file_bytes: 8192,
            record_bytes: 0,
            diff_size: 0,
            tar_bytes: 0,
            tar_digest: digest.parse().unwrap(),
            uuid: uuid::Uuid::nil(),
            entries: 0,
            verity_root: None,
            checked: true,
            writer: None,
            owners: None,
            shared: Some(SharedMeta {
                diff_id: digest.parse().unwrap(),
                image: image.map_or_else(|| id.clone(), |image| image.parse().unwrap()),
                depends_on: None,
                usage: SnapshotUsage { bytes: 4096, inodes: 1 },
            }),
        };
        let become_applied = |meta: &LayerMeta| {
            Ok(LayerMeta { state: LayerState::Applied, applied: Some(applied), ..meta.clone() })
        };
        let files = [layout::LAYER_FILE];
        store.commit::<DriverError>(thread, &id, generation, staged, &files, become_applied).unwrap();
        self.snapshots.commit(name.into(), &key, None, Labels::new()).await.unwrap();
        id
    }

    /// A committed layer that nothing was unpacked into.
    async fn empty_layer(&self, name: &str, parent: &str) {
        let key = format!("k/1/extract-1 {name}");
        self.prepare(&key, parent, &[]).await.unwrap();
        self.snapshots.commit(name.into(), &key, None, Labels::new()).await.unwrap();
    }

    fn found(&self, place: &ShownPlace) -> Option<shown::Found> {
        self.snapshots.find_shown(place)
    }

    /// Where the layer of a container is looked for in its scratch disk.
    fn place_in_scratch(&self, key: &str) -> LayerKind {
        let home = self.snapshots.home();
        let snapshot = home.store.snapshot(&self.id(key)).unwrap();
        home.chain_disks(&snapshot, &mut Vec::new()).unwrap()[0].kind
    }
}

fn request(key: &str, parent: &str, labels: &[(&str, &str)]) -> PrepareRequest {
    let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    PrepareRequest { key: key.into(), parent: parent.into(), labels }
}

fn is_precondition(error: &DriverError, part: &str) -> bool {
    let text = crate::error::with_causes(error);
    matches!(error, DriverError::Store(crate::store::StoreError::Snapshot(SnapshotRefusal::Precondition(_))))
        && text.contains(part)
}

#[tokio::test]
async fn runhcs_gets_directories_nearest_first() {
    let f = Fixture::new(SnapshotMounts::LcowLayer);
    let base = f.layer("base", "", None).await;
    f.empty_layer("nothing", "base").await;
    let top = f.layer("top", "nothing", None).await;
    let [base, top] = [&base, &top].map(|id| f.folder(id.as_str()));
    let folder = |folder: &Path, parents: &[&PathBuf], read_only| Shown::Folder {
        folder: folder.into(),
        parents: parents.iter().map(|p| (*p).clone()).collect(),
        read_only,
    };
    let labels = [(SIZE_GB, "2"), (LOCATION, r"C:\scratch")];
    let shown = f.prepare("k/2/container", "top", &labels).await.unwrap();
    let own = f.folder(f.id("k/2/container").as_str());
    assert_eq!(shown, folder(&own, &[&top, &base], false), "a layer without content has no disk");
    assert_eq!(f.snapshots.mounts("k/2/container").await.unwrap(), shown);
    assert!(own.join(layout::SANDBOX_VHDX_FILE).is_file());
    assert_eq!(f.snapshots.member("k/2/container").unwrap().meta.sandbox_bytes, Some(2 << 30));
    let refused = f.prepare("k/2/other", "top", &[(LOCATION, r"C:\..\x")]).await.unwrap_err();
    assert!(refused.to_string().contains("location"), "{refused}");

    let shown = f.prepare("k/2/extract-7 x", "base", &[]).await.unwrap();
    let own = f.folder(f.id("k/2/extract-7 x").as_str());
    assert_eq!(shown, folder(&own, &[&base], false));
    assert!(
        !own.join(layout::SANDBOX_VHDX_FILE).exists(),
        "a layer to be unpacked into needs no scratch disk"
    );
    assert_eq!(f.found(&ShownPlace::Folder(own)), Some(shown::Found::Layer(f.id("k/2/extract-7 x"))));

    let view = f.snapshots.view(request("k/3/view", "top", &[])).await.unwrap();
    assert_eq!(view, folder(&top, &[&base], true));
    let view = f.snapshots.view(request("k/3/one", "base", &[])).await.unwrap();
    assert_eq!(view, folder(&base, &[], true));
    let view = f.snapshots.view(request("k/3/none", "", &[])).await.unwrap();
    assert_eq!(view, folder(&f.folder(f.id("k/3/none").as_str()), &[], true));
}

#[cfg_attr(windows, ignore = "Wine makes no symbolic links")]
#[tokio::test]
async fn containers_of_a_pod_share_its_scratch_disk() {
    let f = Fixture::new(SnapshotMounts::LcowLayer);
    f.layer("base", "", None).await;
    f.prepare("k/1/pod-1", "base", &[(SIZE_GB, "2")]).await.unwrap();
    let share = |key: &'static str, owner: &'static str| {
        let f = &f;
        async move { f.prepare(key, "base", &[(REUSE, "true"), (OWNER, owner)]).await }
    };
    assert_eq!(f.place_in_scratch("k/1/pod-1"), LayerKind::Scratch(None), "alone in its disk");
    share("k/2/first", "pod-1").await.unwrap();
    let disk = f.path(f.id("k/1/pod-1").as_str(), layout::SANDBOX_VHDX_FILE);
    let link = |key: &str| fs::read_link(f.path(f.id(key).as_str(), layout::SANDBOX_VHDX_FILE)).unwrap();
    assert_eq!(link("k/2/first"), disk);
    // The disk of one that shares is its owner's.
    share("k/3/second", "first").await.unwrap();
    assert_eq!(link("k/3/second"), disk);
    assert_eq!(f.snapshots.member("k/3/second").unwrap().meta.sandbox_bytes, Some(2 << 30));
    for (key, id) in [("k/1/pod-1", "pod-1"), ("k/2/first", "first"), ("k/3/second", "second")] {
        assert_eq!(f.place_in_scratch(key), LayerKind::Scratch(Some(id.parse().unwrap())), "{key}");
    }
    let usage = f.snapshots.usage("k/2/first").await.unwrap();
    assert_eq!(usage.bytes, 0, "the owner is charged for the disk");
    assert!(f.snapshots.usage("k/1/pod-1").await.unwrap().bytes > 0);

    // Another namespace, what is no container, what is not there.
    for owner in ["nobody", "base"] {
        let refused = share("k/4/third", owner).await.unwrap_err();
        assert!(is_precondition(&refused, "no scratch disk to share"), "{refused}");
    }
    let refused = share("other/4/third", "pod-1").await.unwrap_err();
    assert!(is_precondition(&refused, "of this namespace"), "{refused}");
    assert!(f.prepare("k/4/third", "base", &[(REUSE, "yes"), (OWNER, "pod-1")]).await.is_err());
    f.prepare("k/4/third", "base", &[(REUSE, "false"), (OWNER, "pod-1")]).await.unwrap();
    assert!(
        fs::symlink_metadata(f.path(f.id("k/4/third").as_str(), layout::SANDBOX_VHDX_FILE))
            .unwrap()
            .is_file()
    );

    // The owner goes last.
    let refused = f.snapshots.remove("k/1/pod-1").await.unwrap_err();
    assert!(is_precondition(&refused, "scratch disk"), "{refused}");
    for key in ["k/1/pod-1", "k/2/first"] {
        let refused = f.snapshots.commit("name".into(), key, None, Labels::new()).await.unwrap_err();
        assert!(is_precondition(&refused, "shares its scratch disk"), "{refused}");
    }
    for key in ["k/2/first", "k/3/second"] {
        f.snapshots.remove(key).await.unwrap();
        assert!(disk.is_file(), "the disk outlives its user {key}");
    }
    f.snapshots.remove("k/1/pod-1").await.unwrap();
}

/// A kill between the rename that makes a layer of a sandbox and the deletion of its file.
#[tokio::test]
async fn a_start_deletes_the_sandboxes_that_became_layers() {
    let f = Fixture::new(SnapshotMounts::LcowLayer);
    let thread = &DiskThread::here();
    let (converted, other) = (f.layer("converted", "", None).await, f.layer("other", "", None).await);
    let sandbox = |id: &LayerId| f.path(id.as_str(), layout::SANDBOX_VHDX_FILE);
    for id in [&converted, &other] {
        fs::write(sandbox(id), "left").unwrap();
    }
    let store = &f.snapshots.home().store;
    let generation = store.get(&converted).unwrap().layer.generation;
    store
        .update::<DriverError>(thread, &converted, generation, |meta| {
            Ok(LayerMeta { sandbox_bytes: Some(1 << 30), ..meta.clone() })
        })
        .unwrap();
    f.snapshots.finish_conversions(thread);
    assert!(!sandbox(&converted).exists() && f.path(converted.as_str(), layout::LAYER_FILE).is_file());
    assert!(sandbox(&other).exists(), "what this service did not make is left alone");
}

#[test]
fn a_namespace_is_what_stands_before_the_first_slash() {
    assert_eq!(["k8s.io/1/x", "x", "/1/x", ""].map(|key| keys::parts(key).0), ["k8s.io", "", "", ""]);
}

#[cfg(target_os = "linux")]
mod kata {
    use super::*;

    #[tokio::test]
    async fn each_layer_is_a_disk_with_a_name_of_its_own() {
        let f = Fixture::new(SnapshotMounts::Kata);
        let base = f.layer("base", "", None).await;
        f.empty_layer("nothing", "base").await;
        // The same tar twice in one image: one file, which needs two names all the same.
        let top = f.layer("top", "nothing", Some(base.as_str())).await;
        let image = |id: &LayerId| f.path(id.as_str(), &format!("{id}.vhd"));
        let expected = |read_only| Shown::Disks { images: vec![image(&top), image(&base)], read_only };
        assert_ne!(image(&top).file_name(), image(&base).file_name());
        let before = f.snapshots.home().store.layer_usage(&DiskThread::here(), &base).unwrap();

        let shown = f.prepare("k/2/container", "top", &[]).await.unwrap();
        assert_eq!(shown, expected(false));
        assert_eq!(f.snapshots.mounts("k/2/container").await.unwrap(), shown);
        assert_eq!(f.snapshots.view(request("k/3/view", "top", &[])).await.unwrap(), expected(true));
        for id in [&base, &top] {
            assert_eq!(fs::read(image(id)).unwrap(), vec![1; 8192]);
        }
        let after = f.snapshots.home().store.layer_usage(&DiskThread::here(), &base).unwrap();
        assert_eq!((after.apparent, after.allocated), (before.apparent, before.allocated));
        // The guest keeps what is written in its memory.
        let own = f.id("k/2/container");
        let files: Vec<_> =
            fs::read_dir(f.folder(own.as_str())).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files, [layout::SNAPSHOT_FILE]);
        assert_eq!(f.snapshots.usage("k/2/container").await.unwrap(), SnapshotUsage::default());
        let refused =
            f.snapshots.commit("name".into(), "k/2/container", None, Labels::new()).await.unwrap_err();
        assert!(is_precondition(&refused, "memory of its virtual machine"), "{refused}");
    }

    #[tokio::test]
    async fn mounts_of_a_view_lead_back_to_its_layers() {
        let f = Fixture::new(SnapshotMounts::Kata);
        let base = f.layer("base", "", None).await;
        let top = f.layer("top", "base", None).await;
        let Shown::Disks { images, .. } = f.snapshots.view(request("k/3/view", "top", &[])).await.unwrap()
        else {
            panic!("not disks");
        };
        assert_eq!(f.found(&ShownPlace::Disks(images.clone())), Some(shown::Found::Layer(top.clone())));
        assert_eq!(
            f.found(&ShownPlace::Disks(images[1..].to_vec())),
            Some(shown::Found::Layer(base.clone()))
        );
        let home = f.snapshots.home().store.layout().home().to_owned();
        for hostile in [
            vec![],
            vec![images[1].clone(), images[0].clone()],
            vec![f.path(top.as_str(), layout::LAYER_FILE)],
            vec![home.join(top.as_str()).join(format!("{base}.vhd"))],
            vec![home.join(format!("{top}.vhd"))],
            vec![home.join(format!("{top}/../{top}/{top}.vhd"))],
            vec![PathBuf::from("/etc/passwd")],
            vec![PathBuf::new()],
        ] {
            assert_eq!(f.found(&ShownPlace::Disks(hostile.clone())), None, "{hostile:?}");
        }
    }

    #[tokio::test]
    async fn what_has_no_disk_to_attach_is_refused_and_leaves_nothing() {
        let f = Fixture::new(SnapshotMounts::Kata);
        f.empty_layer("nothing", "").await;
        let refused = f.prepare("k/2/container", "nothing", &[]).await.unwrap_err();
        assert!(is_precondition(&refused, "no files"), "{refused}");
        assert!(f.snapshots.stat("k/2/container").is_err());
        // A snapshot without a parent can only be unpacked into.
        let shown = f.prepare("k/2/any", "", &[]).await.unwrap();
        let own = f.folder(f.id("k/2/any").as_str());
        assert_eq!(shown, Shown::Folder { folder: own, parents: Vec::new(), read_only: false });
    }
}
