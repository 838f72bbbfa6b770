//! containerd on this program and on its own overlayfs, side by side on one node: what unpacking and the calls of the
//! snapshotter take. `scripts/bench --containerd` makes the layers and runs it:
//! `cargo bench --bench containerd -- [--rounds N] [--snapshots N] [--peers BLANK] [--out FILE] NAME=TAR…`. Needs root,
//! like the tests; with `--peers` also mkfs.erofs, 1.7 or later, and an empty ext4 for blockfile.
//!
//! ```text
//!   client ─ Prepare, Apply, Commit ─► containerd 2 ─┬─► overlayfs, walking differ (no syncs; or with syncfs)
//!                                                    ├─► native, blockfile, erofs
//!                                                    ├─► product, blobs by gRPC (syncs what it wrote)
//!                                                    └─► product, blobs as files: a node of its own
//! ```
//!
//! Each task runs once for nothing, then in rounds of shuffled order; before each, the disk is settled by a sync that is
//! not counted. Figures are medians, ratios are those of medians.

#![cfg_attr(not(target_os = "linux"), allow(dead_code, unused))]

#[cfg(target_os = "linux")]
#[path = "../tests/containerd/client.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod client;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/command.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod command;
#[cfg(target_os = "linux")]
#[path = "../tests/containerd/image.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod image;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/isolation.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod isolation;
#[cfg(target_os = "linux")]
#[path = "../tests/containerd/node.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod node;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/proxy.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod proxy;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/tarball.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod tarball;
#[cfg(target_os = "linux")]
#[path = "../tests/containerd/tree.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod tree;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(target_os = "linux")]
mod linux {
    use crate::{
        client::{Client, descriptor},
        image,
        node::{Node, Release, Snapshotter},
    };
    use containerd_api::types::Descriptor;
    use std::{
        collections::BTreeMap,
        fmt::Write as _,
        fs,
        io::Write as _,
        path::{Path, PathBuf},
        thread,
        time::{Duration, Instant},
    };

    /// Calls of which a latency is the median.
    const MEGABYTE: u64 = 1_000_000;
    const CALLS: usize = 100;
    /// Layers that are unpacked at once.
    const AT_ONCE: usize = 4;
    /// Level of the compressed layers, that of `gzip` and of Docker.
    const LEVEL: u32 = 6;
    /// Threads that prepare the many snapshots.
    const THREADS: usize = 8;
    /// Longest time of a call; what takes longer is no figure.
    const LONG: Duration = Duration::from_mins(10);
    /// Holds a snapshot or a blob against containerd's garbage collection.
    const ROOT: (&str, &str) = ("containerd.io/gc.root", "bench");
    const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
    const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    struct Options {
        rounds: usize,
        snapshots: usize,
        peers: Option<PathBuf>,
        out: Option<PathBuf>,
        layers: Vec<(String, PathBuf)>,
    }

    impl Options {
        fn parse() -> Option<Self> {
            let mut options =
                Self { rounds: 5, snapshots: 10_000, peers: None, out: None, layers: Vec::new() };
            let mut wanted = false;
            let mut arguments = std::env::args().skip(1);
            while let Some(argument) = arguments.next() {
                let mut value = || arguments.next().expect("a value");
                match argument.as_str() {
                    "--bench" => wanted = true,
                    "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
                    "--snapshots" => options.snapshots = value().parse().expect("a number of snapshots"),
                    "--peers" => options.peers = Some(value().into()),
                    "--out" => options.out = Some(value().into()),
                    layer => {
                        let (name, tar) = layer.split_once('=').expect("NAME=TAR");
                        options.layers.push((name.into(), tar.into()));
                    }
                }
            }
            wanted.then_some(options)
        }
    }

    /// What unpacks.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum By {
        Overlayfs,
        /// With a sync of the file system at the end, as containerd's option `sync_fs`.
        OverlayfsSynced,
        Native,
        Blockfile,
        Erofs,
        Grpc,
        File,
    }

    const ALL: [By; 7] =
        [By::Overlayfs, By::OverlayfsSynced, By::Native, By::Blockfile, By::Erofs, By::Grpc, By::File];

    impl By {
        /// Needs what `--peers` gives.
        fn is_peer(self) -> bool {
            matches!(self, By::Blockfile | By::Erofs)
        }
    }

    /// A node and its clients.
    struct Bench {
        node: Node,
        overlayfs: Client,
        native: Client,
        blockfile: Client,
        erofs: Client,
        lcow: Client,
        /// To the product itself, without containerd.
        direct: Client,
    }

    impl Bench {
        fn start(content: &str, peers: Option<&Path>) -> Self {
            let option = format!("lcow.containerd.content={content}");
            let arguments = ["--storage-opt", &option, "--storage-opt", "lcow.containerd.share=off"];
            let node = Node::start_with_peers(Release::V2, &arguments, peers);
            let client = |socket: &Path, snapshotter: &str| {
                Client::with_limit(socket, snapshotter, node.namespace(), LONG)
            };
            let containerd = node.containerd_socket();
            let lcow = Snapshotter::Lcow.name();
            Self {
                overlayfs: client(&containerd, Snapshotter::Overlayfs.name()),
                native: client(&containerd, "native"),
                blockfile: client(&containerd, "blockfile"),
                erofs: client(&containerd, "erofs"),
                lcow: client(&containerd, lcow),
                direct: client(&node.lcow_socket(), lcow),
                node,
            }
        }

        /// Puts a blob into containerd's store.
        fn ingest(&self, file: &Path, media_type: &str) -> Descriptor {
            let digest = image::digest(&fs::read(file).expect("a blob"));
            let command = format!(
                "ctr --namespace {} content ingest {digest} <{}",
                self.node.namespace(),
                file.display()
            );
            self.node.room.run(&["sh", "-ec", &command]).expect_ok();
            self.node.ctr(&["content", "label", &digest, "containerd.io/gc.root=bench"]);
            let size = fs::metadata(file).expect("a blob").len();
            descriptor(media_type, &digest, i64::try_from(size).expect("a size"))
        }

        fn client(&self, by: By) -> &Client {
            match by {
                By::Overlayfs | By::OverlayfsSynced => &self.overlayfs,
                By::Native => &self.native,
                By::Blockfile => &self.blockfile,
                By::Erofs => &self.erofs,
                By::Grpc | By::File => &self.lcow,
            }
        }

        /// Prepare, Apply and Commit of a layer; the time. The snapshot stays under `name`.
        fn unpack(&self, by: By, name: &str, parent: &str, blob: &Descriptor) -> Duration {
            let (client, key) = (self.client(by), format!("extract-1 {name}"));
            let begin = Instant::now();
            let mounts = client.prepare(&key, parent, &[ROOT]).expect("prepare");
            client.apply_synced(blob.clone(), mounts, by == By::OverlayfsSynced).expect("apply");
            client.commit(name, &key, "", &[ROOT]).expect("commit");
            begin.elapsed()
        }

        /// Removes a snapshot; containerd does so in its next garbage collection, which a lease's end starts.
        fn remove(&self, by: By, name: &str) {
            self.client(by).remove(name).expect("remove");
            self.node.ctr(&["leases", "create", "--id", "bench"]);
            self.node.ctr(&["leases", "rm", "--sync", "bench"]);
        }
    }

    fn settle() {
        rustix::fs::sync();
        thread::sleep(Duration::from_millis(100));
    }

    fn median(times: &mut [Duration]) -> Duration {
        times.sort_unstable();
        times[times.len() / 2]
    }

    /// A generator of orders (splitmix64), from a fixed seed: a run can be repeated.
    struct Dice(u64);

    impl Dice {
        fn shuffle<T>(&mut self, all: &mut [T]) {
            for last in (1..all.len()).rev() {
                self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut x = self.0;
                x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                all.swap(last, ((x ^ (x >> 31)) % (last as u64 + 1)) as usize);
            }
        }
    }

    fn shown(time: Duration) -> String {
        let seconds = time.as_secs_f64();
        if seconds >= 1.0 { format!("{seconds:.2} s") } else { format!("{:.1} ms", seconds * 1000.0) }
    }

    fn ratio(time: Duration, base: Duration) -> String {
        format!("{:.2} ({})", time.as_secs_f64() / base.as_secs_f64(), shown(time))
    }

    fn gzip(tar: &Path, blob: &Path) {
        let mut encoder = flate2::write::GzEncoder::new(
            fs::File::create(blob).expect("blob"),
            flate2::Compression::new(LEVEL),
        );
        std::io::copy(&mut fs::File::open(tar).expect("a layer"), &mut encoder).expect("gzip");
        encoder.finish().expect("gzip").flush().expect("gzip");
    }

    /// The table of unpacking, and the row of layers at once.
    fn unpacking(options: &Options, grpc: &Bench, file: &Bench, out: &mut String) {
        let at = |by: By| if by == By::File { file } else { grpc };
        let mut blobs = Vec::new();
        for (name, tar) in &options.layers {
            let packed = grpc.node.scratch("blobs").join(format!("{name}.gz"));
            gzip(tar, &packed);
            for (packing, blob, media_type) in [("plain", tar, PLAIN), ("gzip", &packed, GZIP)] {
                // The product's two nodes have a containerd each.
                let found = grpc.ingest(blob, media_type);
                file.ingest(blob, media_type);
                blobs.push((format!("{name}, {packing}"), found));
            }
        }
        let mut tasks: Vec<(usize, By)> = (0..blobs.len()).flat_map(|n| ALL.map(|by| (n, by))).collect();
        tasks.retain(|(_, by)| options.peers.is_some() || !by.is_peer());
        let mut times: BTreeMap<(usize, By), Vec<Duration>> = BTreeMap::new();
        let mut dice = Dice(1);
        for round in 0..=options.rounds {
            dice.shuffle(&mut tasks);
            for &(n, by) in &tasks {
                settle();
                let time = at(by).unpack(by, "measured", "", &blobs[n].1);
                at(by).remove(by, "measured");
                if round > 0 {
                    times.entry((n, by)).or_default().push(time);
                }
            }
            eprintln!("containerd: unpacked, round {round} of {}", options.rounds);
        }
        let medians: BTreeMap<_, _> = times.iter_mut().map(|(task, times)| (*task, median(times))).collect();
        out.push_str(
            "### Unpacking a layer: Prepare, Apply and Commit through containerd, × its overlayfs\n\n\
             | layer | overlayfs | overlayfs with `sync_fs` | native | blockfile | erofs | this program, blobs by gRPC \
             | blobs as files | by gRPC × overlayfs with `sync_fs` |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
        );
        for (n, (name, _)) in blobs.iter().enumerate() {
            let base = medians[&(n, By::Overlayfs)];
            let of = |by| medians.get(&(n, by)).map_or_else(|| "–".to_owned(), |time| ratio(*time, base));
            let _ = writeln!(
                out,
                "| {name} | {} | {} | {} | {} | {} | {} | {} | {:.2} |",
                shown(base),
                of(By::OverlayfsSynced),
                of(By::Native),
                of(By::Blockfile),
                of(By::Erofs),
                of(By::Grpc),
                of(By::File),
                medians[&(n, By::Grpc)].as_secs_f64() / medians[&(n, By::OverlayfsSynced)].as_secs_f64()
            );
        }

        // Layers of one image at once, against the slowest of them alone.
        let parts: Vec<Descriptor> = (0..AT_ONCE)
            .map(|n| {
                let bytes = image::random_bytes(n as u64, (n + 1) * (12 << 20));
                let tar = crate::tarball::build(&[crate::tarball::Entry::file(format!("part-{n}"), bytes)]);
                let path = grpc.node.scratch("blobs").join(format!("part-{n}"));
                fs::write(&path, tar).expect("a layer");
                grpc.ingest(&path, PLAIN)
            })
            .collect();
        let (mut slowest, mut all) = (Vec::new(), Vec::new());
        for _round in 0..options.rounds {
            settle();
            slowest.push(grpc.unpack(By::Grpc, "alone", "", parts.last().expect("a layer")));
            grpc.remove(By::Grpc, "alone");
            settle();
            let begin = Instant::now();
            thread::scope(|scope| {
                for (n, part) in parts.iter().enumerate() {
                    scope.spawn(move || grpc.unpack(By::Grpc, &format!("part-{n}"), "", part));
                }
            });
            all.push(begin.elapsed());
            for n in 0..AT_ONCE {
                grpc.remove(By::Grpc, &format!("part-{n}"));
            }
        }
        let (slowest, all) = (median(&mut slowest), median(&mut all));
        let _ = writeln!(
            out,
            "\n{AT_ONCE} plain layers of 12, 25, 38 and 50 MB at once take {} × the largest alone.",
            ratio(all, slowest)
        );
    }

    /// Latencies of calls.
    fn latencies(bench: &Bench, out: &mut String) {
        out.push_str(
            "\n### Calls, median and 99th percentile of 100\n\n| call | overlayfs | this program |\n|---|---:|---:|\n",
        );
        let layer = image::Layer::new(image::shell(), image::Packing::Gzip);
        let path = bench.node.scratch("blobs").join("shell");
        fs::write(&path, &layer.blob).expect("a layer");
        let blob = bench.ingest(&path, &layer.media_type);
        let percentiles = |times: &mut Vec<Duration>| {
            let middle = median(times);
            format!("{} · {}", shown(middle), shown(times[times.len() * 99 / 100]))
        };
        let mut starts = Vec::new();
        for by in [By::Overlayfs, By::Grpc] {
            bench.unpack(by, "base", "", &blob);
            let client = bench.client(by);
            // Its lower layer is mounted.
            client.prepare("keeps it mounted", "base", &[ROOT]).expect("prepare");
            let mut times = Vec::new();
            for n in 0..CALLS {
                let key = format!("container {n}");
                let begin = Instant::now();
                client.prepare(&key, "base", &[ROOT]).expect("prepare");
                let mounts = client.mounts(&key).expect("mounts");
                let root = bench.node.mount_as_answered(&mounts);
                times.push(begin.elapsed());
                bench.node.unmount(&root);
                client.remove(&key).expect("remove");
            }
            starts.push(percentiles(&mut times));
        }
        let _ = writeln!(
            out,
            "| Prepare, Mounts and `mount` in a process, lower layer mounted | {} | {} |",
            starts[0], starts[1]
        );
        // The product alone: containerd only notes a Remove, and deletes snapshots that it does not know.
        bench.node.kill_containerd();
        let client = &bench.direct;
        let listed = client.list(&[]).expect("list");
        let base = listed.iter().map(|info| &info.name).find(|name| name.ends_with("/base")).expect("base");
        let (mut prepare, mut usage, mut commit, mut remove) = (vec![], vec![], vec![], vec![]);
        let timed = |times: &mut Vec<Duration>, call: &mut dyn FnMut()| {
            let begin = Instant::now();
            call();
            times.push(begin.elapsed());
        };
        for n in 0..CALLS {
            let (key, name) = (format!("direct {n}"), format!("committed {n}"));
            let mut mounts = Vec::new();
            timed(&mut prepare, &mut || mounts = client.prepare(&key, base, &[]).expect("prepare"));
            let root = bench.node.mount_as_answered(&mounts);
            fs::write(root.join("written"), vec![7; 1 << 20]).expect("a file in a container");
            timed(&mut usage, &mut || assert!(client.usage(&key).expect("usage").size > 0));
            bench.node.unmount(&root);
            timed(&mut commit, &mut || client.commit(&name, &key, "", &[]).expect("commit"));
            timed(&mut remove, &mut || client.remove(&name).expect("remove"));
        }
        for (call, times) in [
            ("Prepare", &mut prepare),
            ("Usage of a mounted snapshot", &mut usage),
            ("Commit of a written snapshot (1 MB)", &mut commit),
            ("Remove of it", &mut remove),
        ] {
            let _ = writeln!(out, "| {call}, without containerd | – | {} |", percentiles(times));
        }
    }

    /// Resident bytes of a process.
    fn resident(pid: u32) -> u64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status of the product");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number") << 10
    }

    /// A store of many snapshots.
    fn many(count: usize, out: &mut String) {
        let node = Node::without_containerd();
        let connect =
            || Client::with_limit(&node.lcow_socket(), Snapshotter::Lcow.name(), node.namespace(), LONG);
        let few = resident(node.lcow_pid());
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let client = connect();
                scope.spawn(move || {
                    for n in (thread..count).step_by(THREADS) {
                        client.prepare(&format!("extract-{n} x"), "", &[]).expect("prepare");
                    }
                });
            }
        });
        node.stop_lcow();
        let begin = Instant::now();
        node.start_lcow();
        let client = connect();
        client.stat("extract-0 x").expect("stat");
        let start = begin.elapsed();
        let mut times = Vec::new();
        for _call in 0..9 {
            let begin = Instant::now();
            assert_eq!(client.list(&[]).expect("list").len(), count);
            times.push(begin.elapsed());
        }
        let _ = writeln!(
            out,
            "\nWith {count} snapshots: from the start of the process to an answer {}, List {}, {} MB resident ({} MB \
             without any).",
            shown(start),
            shown(median(&mut times)),
            resident(node.lcow_pid()) / MEGABYTE,
            few / MEGABYTE
        );
    }

    pub(super) fn main() {
        // `cargo test --benches` runs it, too, and expects nothing.
        let Some(options) = Options::parse() else { return };
        let mut out = String::new();
        {
            let (grpc, file) = (Bench::start("grpc", options.peers.as_deref()), Bench::start("file", None));
            unpacking(&options, &grpc, &file, &mut out);
            latencies(&grpc, &mut out);
        }
        many(options.snapshots, &mut out);
        println!("{out}");
        if let Some(path) = &options.out {
            fs::write(path, &out).expect("the table");
        }
    }
}
