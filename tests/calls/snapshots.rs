//! The same for containerd's snapshots: every system call of Prepare, View, Mounts, Update, Commit and Remove fails once.
//!
//! ```text
//!   base (committed) ─► prepare ─ a call fails ─ the request ─ then: is the answer true? ─ kill ─ still? ─ the request again
//! ```
//!
//! What a kill brings back behind a Remove is allowed (docs/reliability.md). The calls of chores behind an answer fail as well,
//! as far as they begin before the staging directory is empty.

use crate::{
    errors,
    operations::{alive, nothing_is_left},
    plan,
    watch::{Group, Watched},
};
use containerd_api::snapshots::{
    CommitSnapshotRequest, Info, Kind, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UpdateSnapshotRequest, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
};
use hyper_util::rt::TokioIo;
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

/// The snapshot that a request is about, and the name that Commit gives it.
const KEY: &str = "test/1/x";
const NAME: &str = "test/2/x";
/// The snapshot below, which nothing may harm.
const BASE: &str = "test/3/base";
const LABEL: &str = "containerd.io/snapshot/test";
/// A request with fewer groups of calls was not seen; Mounts of what is shown already makes few.
const FEWEST_GROUPS: usize = 3;
/// Longest wait for an answer, or for what happens behind one.
const PATIENCE: Duration = Duration::from_mins(1);
/// Chores behind an answer of success take less; those that failed never end.
const CHORES: Duration = Duration::from_secs(1);

/// A client of the snapshots' service; a new one for each process of the product.
struct Client {
    runtime: Runtime,
    snapshots: SnapshotsClient<Channel>,
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("snapshots.sock")
}

fn home(folder: &Path) -> PathBuf {
    folder.join("snapshots")
}

impl Client {
    fn of(watched: &Watched) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let address = socket(&watched.plugin.folder);
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let address = address.clone();
            async move { UnixStream::connect(address).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(PATIENCE);
        let channel = runtime.block_on(async { endpoint.connect_with_connector_lazy(connector) });
        Self { runtime, snapshots: SnapshotsClient::new(channel) }
    }

    /// The kind of a snapshot; `None` if there is none.
    fn kind(&self, key: &str) -> Result<Option<Kind>, Status> {
        let request = StatSnapshotRequest { key: key.into(), ..StatSnapshotRequest::default() };
        match self.runtime.block_on(self.snapshots.clone().stat(request)) {
            Ok(reply) => Ok(reply.into_inner().info.map(|info| info.kind())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// As [`Client::kind`], of a service that works.
    fn sure(&self, key: &str, what: &str) -> Option<Kind> {
        self.kind(key).unwrap_or_else(|status| panic!("Stat {key}: {status}: {what}"))
    }

    fn prepare(&self, key: &str, parent: &str) -> Result<(), Status> {
        let request = PrepareSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            ..PrepareSnapshotRequest::default()
        };
        self.runtime.block_on(self.snapshots.clone().prepare(request)).map(drop)
    }

    fn view(&self) -> Result<(), Status> {
        let request =
            ViewSnapshotRequest { key: KEY.into(), parent: BASE.into(), ..ViewSnapshotRequest::default() };
        self.runtime.block_on(self.snapshots.clone().view(request)).map(drop)
    }

    fn mounts(&self) -> Result<(), Status> {
        let request = MountsRequest { key: KEY.into(), ..MountsRequest::default() };
        let reply = self.runtime.block_on(self.snapshots.clone().mounts(request))?.into_inner();
        assert!(!reply.mounts.is_empty(), "an answer without mounts");
        Ok(())
    }

    fn commit(&self, name: &str, key: &str) -> Result<(), Status> {
        let request =
            CommitSnapshotRequest { name: name.into(), key: key.into(), ..CommitSnapshotRequest::default() };
        self.runtime.block_on(self.snapshots.clone().commit(request)).map(drop)
    }

    fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { key: key.into(), ..RemoveSnapshotRequest::default() };
        self.runtime.block_on(self.snapshots.clone().remove(request)).map(drop)
    }

    fn update(&self) -> Result<(), Status> {
        let labels = [(LABEL.to_owned(), "new".to_owned())].into();
        let request = UpdateSnapshotRequest {
            info: Some(Info { name: KEY.into(), labels, ..Info::default() }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["labels".into()] }),
            ..UpdateSnapshotRequest::default()
        };
        self.runtime.block_on(self.snapshots.clone().update(request)).map(drop)
    }

    fn label(&self) -> Option<String> {
        let request = StatSnapshotRequest { key: KEY.into(), ..StatSnapshotRequest::default() };
        let info = self.runtime.block_on(self.snapshots.clone().stat(request)).ok()?.into_inner().info?;
        info.labels.get(LABEL).cloned()
    }

    /// Removes what a request was about.
    fn clear(&self, what: &str) {
        for key in [KEY, NAME] {
            if self.sure(key, what).is_some() {
                self.remove(key).unwrap_or_else(|status| panic!("Remove {key}: {status}: {what}"));
            }
            assert_eq!(self.sure(key, what), None, "{what}");
        }
    }
}

/// When a state is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Right behind the answer.
    Now,
    /// Behind a kill.
    Later,
}

/// A request.
struct Operation {
    name: &'static str,
    prepare: fn(&Client) -> Result<(), Status>,
    act: fn(&Client) -> Result<(), Status>,
    /// Whether an answer (`true` for success) is the truth.
    truth: fn(&Client, bool, When, &str) -> bool,
}

#[expect(clippy::unnecessary_wraps, reason = "stands where others can fail")]
fn nothing(_: &Client) -> Result<(), Status> {
    Ok(())
}

fn prepared(client: &Client) -> Result<(), Status> {
    client.prepare(KEY, BASE)
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        name: "prepare",
        prepare: nothing,
        act: prepared,
        truth: |client, ok, _, what| (client.sure(KEY, what) == Some(Kind::Active)) == ok,
    },
    Operation {
        name: "view",
        prepare: nothing,
        act: Client::view,
        truth: |client, ok, _, what| (client.sure(KEY, what) == Some(Kind::View)) == ok,
    },
    Operation {
        name: "mounts",
        prepare: prepared,
        act: Client::mounts,
        truth: |client, _, _, what| client.sure(KEY, what) == Some(Kind::Active),
    },
    Operation {
        name: "update",
        prepare: prepared,
        act: Client::update,
        truth: |client, ok, _, what| {
            client.sure(KEY, what) == Some(Kind::Active) && (!ok || client.label().as_deref() == Some("new"))
        },
    },
    Operation {
        name: "commit",
        prepare: prepared,
        act: |client| client.commit(NAME, KEY),
        truth: |client, ok, _, what| {
            let (key, name) = (client.sure(KEY, what), client.sure(NAME, what));
            if ok {
                (key, name) == (None, Some(Kind::Committed))
            } else {
                (key, name) == (Some(Kind::Active), None)
            }
        },
    },
    Operation {
        name: "remove",
        prepare: prepared,
        act: |client| client.remove(KEY),
        truth: |client, ok, when, what| {
            let there = client.sure(KEY, what).is_some();
            // Whether a failed one has removed it is for the next Stat to say.
            !ok || when == When::Later || !there
        },
    },
];

/// A service of snapshots with a committed one, whose calls are watched.
fn service() -> Watched {
    let options = [
        "--storage-opt",
        "lcow.sandboxsize=32MiB",
        "--storage-opt",
        "lcow.pool.spares=0",
        "--storage-opt",
        "lcow.containerd.mounts=host",
    ];
    let mut watched = Watched::start(&options);
    let folder = watched.plugin.folder.clone();
    for (flag, value) in [
        ("--containerd-socket", socket(&folder)),
        ("--containerd-root", home(&folder)),
        // Nothing is fetched.
        ("--containerd-address", folder.join("containerd.sock")),
    ] {
        watched.plugin.arguments.extend([flag.to_owned(), value.to_str().unwrap().to_owned()]);
    }
    restart(&mut watched);
    let client = Client::of(&watched);
    client.prepare("test/4/below", "").unwrap();
    client.commit(BASE, "test/4/below").unwrap();
    watched
}

/// Kills the service and waits until the next one answers.
fn restart(watched: &mut Watched) {
    watched.kill_and_restart();
    let begin = Instant::now();
    while let Err(status) = Client::of(watched).kind("nothing") {
        assert!(begin.elapsed() < PATIENCE, "no answer: {status}\n{}", watched.plugin.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until nothing is to be deleted any more, or a moment.
fn wait_for_chores(watched: &Watched) {
    let staging = home(&watched.plugin.folder).join("staging");
    let begin = Instant::now();
    while fs::read_dir(&staging).is_ok_and(|entries| entries.count() > 0) && begin.elapsed() < CHORES {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn groups_of(watched: &Watched, operation: &Operation) -> BTreeMap<Group, usize> {
    let client = Client::of(watched);
    (operation.prepare)(&client).unwrap();
    watched.count();
    (operation.act)(&client).unwrap();
    wait_for_chores(watched);
    let groups = watched.counted();
    client.clear("counted");
    groups
}

fn fail_every_call_of(name: &str) {
    let operation = OPERATIONS.iter().find(|o| o.name == name).expect("an operation");
    let mut watched = service();
    let mut groups = groups_of(&watched, operation);
    groups.retain(|group, _| !errors::of(group.call, group.object).is_empty());
    assert!(groups.len() >= FEWEST_GROUPS, "{name}: only {} groups of calls", groups.len());
    let cases = plan(&groups, env::var("LCOW_CALLS").is_ok_and(|v| v == "all"));
    let (begin, mut met, mut refused, mut ended) = (Instant::now(), BTreeSet::new(), 0, 0);
    for case in &cases {
        let what = format!("snapshot {name}, {} {}: {}", case.group, case.ordinal, errors::name(case.error));
        let client = Client::of(&watched);
        (operation.prepare)(&client).unwrap_or_else(|status| panic!("{status}: {what}"));
        let logged = watched.plugin.log().len();
        watched.fail(case);
        let answer = (operation.act)(&client);
        wait_for_chores(&watched);
        if watched.met() {
            met.insert(case.group.clone());
        }
        let what = format!("{what}\n{answer:?}");
        refused += usize::from(answer.is_err());
        // A connection that broke says nothing; any other answer must be true.
        let told = answer
            .as_ref()
            .err()
            .is_none_or(|status| status.code() != Code::Unavailable && status.message() != "transport error");
        if alive(&watched.plugin, logged) {
            let client = Client::of(&watched);
            assert!(
                !told || (operation.truth)(&client, answer.is_ok(), When::Now, &what),
                "not true: {what}"
            );
        } else {
            ended += 1;
        }
        restart(&mut watched);
        let client = Client::of(&watched);
        assert!(
            !told || (operation.truth)(&client, answer.is_ok(), When::Later, &what),
            "not true later: {what}"
        );
        assert_eq!(client.sure(BASE, &what), Some(Kind::Committed), "{what}");
        client.clear(&what);
        (operation.prepare)(&client).unwrap_or_else(|status| panic!("{status}: {what}"));
        (operation.act)(&client).unwrap_or_else(|status| panic!("the next request fails: {status}: {what}"));
        assert!((operation.truth)(&client, true, When::Now, &what), "the next answer is not true: {what}");
        client.clear(&what);
    }
    println!(
        "snapshot {name}: {} calls in {} groups, {} groups met, {} cases, {refused} refused, {ended} ended the daemon, {} s",
        groups.values().sum::<usize>(),
        groups.len(),
        met.len(),
        cases.len(),
        begin.elapsed().as_secs()
    );
    let missed: Vec<_> = groups.keys().filter(|g| !met.contains(g)).map(ToString::to_string).collect();
    println!("snapshot {name}: not met: {}", missed.join("; "));
    assert!(met.len() * 10 >= groups.len() * 7, "only {} of {} groups were met", met.len(), groups.len());
    Client::of(&watched).remove(BASE).unwrap();
    nothing_is_left(&watched.plugin, PATIENCE);
}

macro_rules! operations {
    ($($test:ident $name:literal;)*) => {$(
        #[test]
        fn $test() { fail_every_call_of($name); }
    )*};
}

operations! {
    prepare_of_a_snapshot "prepare";
    view_of_a_snapshot "view";
    mounts_of_a_snapshot "mounts";
    update_of_a_snapshot "update";
    commit_of_a_snapshot "commit";
    remove_of_a_snapshot "remove";
}
