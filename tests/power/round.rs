//! One round: work, the cut, what is found after it.

use super::{
    client::Calls,
    containers::{Shown, write_on},
    daemon::{Daemon, Skipped, homes, store},
    engine::Engine,
    record::{self, Events},
    room::{Ground, Room},
    steps::Steps,
    transport,
    verify::Check,
    work::{Client, Random, STEPS, Stop},
    world::World,
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

/// How a loss begins that is a tree which the steps do not allow.
pub(crate) const IMPOSSIBLE: &str = "a tree that no cut may leave";
/// Clients of a crowd.
const CLIENTS: u64 = 8;
/// Most steps before a lone client's last one, and one more.
const BEFORE: u64 = 6;
/// So that the times of cuts do not follow from what the clients do.
const LONE_SEED: u64 = 0x10e;
const CROWD_SEED: u64 = 0xc0d;
/// Longest time from an acknowledgement to a lone client's cut, in microseconds.
const SOON: u64 = 5000;
/// Time of a crowd's cut, in microseconds from its begin.
const CROWD: std::ops::Range<u64> = 5_000..400_000;

/// Who works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One client, and nothing else on the file system.
    Lone,
    /// Eight clients, and containers.
    Crowd,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    pub(crate) ground: Ground,
    pub(crate) skipped: Skipped,
    pub(crate) noting: Noting,
}

/// Whether the daemon's steps are noted, and the tree behind the cut is held against them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Noting {
    No,
    Yes,
    /// A control: syncs are noted and not done.
    WithoutSyncs,
}

/// What came out.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// What is not as promised.
    pub(crate) losses: Vec<String>,
    /// What the round met, by what it is.
    pub(crate) tally: BTreeMap<String, u64>,
    /// The daemon's log.
    pub(crate) log: String,
}

impl Outcome {
    pub(crate) fn count(&mut self, what: &str, number: u64) {
        *self.tally.entry(what.to_owned()).or_default() += number;
    }
}

/// A container that writes on and on, and how many of its files are synced.
pub(crate) struct Writer {
    pub(crate) name: String,
    /// Whose sandbox it has: "docker" or "snapshot".
    pub(crate) face: &'static str,
    dir: PathBuf,
    pub(crate) synced: AtomicU64,
    _shown: Option<Shown>,
}

/// Plays a round in a thread of its own, which has the mounts.
pub(crate) fn play(plan: &Plan) -> Outcome {
    let plan = *plan;
    let played = std::thread::Builder::new().name(format!("{plan:?}")).spawn(move || here(&plan)).unwrap();
    match played.join() {
        Ok(outcome) => outcome,
        Err(panic) => {
            println!("{plan:?} panicked");
            std::panic::resume_unwind(panic)
        }
    }
}

fn here(plan: &Plan) -> Outcome {
    let mut room = Room::enter(plan.ground);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let containerd = transport::address(&room.folder, "containerd");
    let engine = runtime.block_on(async { Engine::start(&containerd) });
    let mut outcome = Outcome::default();
    let (events, cutting) = (Events::new(), AtomicBool::new(false));
    let steps = match plan.noting {
        Noting::No => None,
        noting => Some(Steps::new(room.disk(), noting == Noting::WithoutSyncs)),
    };
    let daemon = match &steps {
        Some(steps) => Daemon::start_noted(&room, &containerd, steps),
        None => Daemon::start(&room, &containerd, plan.skipped),
    };
    let daemon = daemon.expect("a start on an empty disk");
    let stage = Stage {
        plan,
        room: &room,
        engine: &engine,
        events: &events,
        cutting: &cutting,
        steps: steps.as_deref(),
    };
    let Worked { worlds, writers, cut_us } = match plan.kind {
        Kind::Lone => stage.alone(daemon, &mut outcome),
        Kind::Crowd => stage.crowd(daemon, &mut outcome),
    };
    room.unmount();
    room.mount();
    let tree = record::tree(&room.disk());
    if let Some(steps) = &steps {
        outcome.count("steps noted", steps.count());
        outcome.count("trees held against their steps", 1);
        outcome.losses.extend(steps.check(&tree).err().map(|text| format!("{IMPOSSIBLE}: {text}")));
    }
    let (acknowledged, in_flight) = events.count();
    outcome.count("acknowledged", acknowledged);
    outcome.count("in flight", in_flight);
    match Daemon::start(&room, &containerd, Skipped::Nothing) {
        Ok(mut daemon) => {
            Check { calls: Calls::new(&room.folder), room: &room, engine: &engine, outcome: &mut outcome }
                .everything(&worlds, &writers);
            outcome.losses.extend(store(&room, "scrub").err());
            daemon.stop();
            outcome.losses.extend(store(&room, "repair").err());
            outcome.log = daemon.log();
        }
        Err(text) => outcome.losses.push(format!("no start after the cut: {text}")),
    }
    room.unmount();
    outcome.losses.extend(room.check().err());
    record::write(plan, cut_us, &events, &tree, &outcome.losses);
    outcome
}

/// What the clients know, and the writers.
struct Worked {
    worlds: Vec<World>,
    writers: Vec<Writer>,
    cut_us: u64,
}

/// What a round's work needs.
struct Stage<'a> {
    plan: &'a Plan,
    room: &'a Room,
    engine: &'a Engine,
    events: &'a Events,
    cutting: &'a AtomicBool,
    steps: Option<&'a Steps>,
}

impl<'a> Stage<'a> {
    fn client(&self, name: &str, seed: u64) -> Client<'a> {
        Client {
            name: name.to_owned(),
            folder: self.room.folder.clone(),
            home: homes(self.room)[0].clone(),
            calls: Calls::new(&self.room.folder),
            engine: self.engine,
            random: Random::new(seed),
            cutting: self.cutting,
            events: self.events,
            world: World::default(),
            shown: BTreeMap::new(),
            dirs: BTreeMap::new(),
            count: 0,
        }
    }

    /// The cut and the kill; the time of the former.
    fn cut(&self, daemon: &mut Daemon) -> u64 {
        self.cutting.store(true, Ordering::SeqCst);
        if let Some(steps) = self.steps {
            steps.stop();
        }
        self.room.cut();
        let at = self.events.now();
        daemon.kill();
        at
    }

    /// Some steps, then the one whose turn it is, then the cut.
    fn alone(&self, mut daemon: Daemon, outcome: &mut Outcome) -> Worked {
        let mut random = Random::new(self.plan.seed ^ LONE_SEED);
        let mut client = self.client("lone", self.plan.seed);
        let last = STEPS[(self.plan.seed / 2) as usize % STEPS.len()];
        let worked = client
            .step("init")
            .and_then(|()| (0..random.below(BEFORE)).try_for_each(|_| client.any_step()))
            .and_then(|()| client.step(last));
        if let Err(Stop::Failed(text)) = worked {
            panic!("before the cut: {text}\n{}", daemon.log());
        }
        // Half of them at once.
        std::thread::sleep(Duration::from_micros(random.below(2) * random.below(SOON)));
        let cut_us = self.cut(&mut daemon);
        outcome.count("syncs skipped", daemon.skipped.load(Ordering::Relaxed));
        Worked { worlds: vec![client.world.clone()], writers: Vec::new(), cut_us }
    }

    fn crowd(&self, mut daemon: Daemon, outcome: &mut Outcome) -> Worked {
        let mut random = Random::new(self.plan.seed ^ CROWD_SEED);
        let mut first = self.client("first", self.plan.seed);
        first.step("init").unwrap_or_else(|e| panic!("{e:?}\n{}", daemon.log()));
        let writers: Vec<Writer> = ["docker", "snapshot"]
            .iter()
            .map(|face| Writer::start(face, &first.calls, &self.room.folder))
            .collect();
        let after = CROWD.start + random.below(CROWD.end - CROWD.start);
        let mut worlds = Vec::new();
        let cut_us = std::thread::scope(|scope| {
            for writer in &writers {
                scope.spawn(|| write_on(&writer.dir, &writer.synced, self.cutting));
            }
            let working: Vec<_> = (0..CLIENTS)
                .map(|n| self.client(&format!("c{n}"), self.plan.seed * CLIENTS + n))
                .map(|client| scope.spawn(move || work_on(client)))
                .collect();
            std::thread::sleep(Duration::from_micros(after));
            let cut_us = self.cut(&mut daemon);
            for client in working {
                let (world, stop) = client.join().unwrap();
                worlds.push(world);
                if let Stop::Failed(text) = stop {
                    outcome.losses.push(format!("before the cut: {text}"));
                }
            }
            cut_us
        });
        Worked { worlds, writers, cut_us }
    }
}

fn work_on(mut client: Client<'_>) -> (World, Stop) {
    loop {
        if let Err(stop) = client.any_step() {
            return (client.world.clone(), stop);
        }
    }
}

impl Writer {
    fn start(face: &'static str, calls: &Calls, folder: &Path) -> Self {
        let name = format!("writer-{face}");
        let (dir, shown) = if face == "docker" {
            calls.docker("CreateReadWrite", &json!({"ID": name})).unwrap();
            (calls.get(&name).unwrap(), None)
        } else {
            let shown = Shown::mount(folder, &calls.prepare(&name, "").unwrap()).unwrap();
            (shown.place.clone(), Some(shown))
        };
        Self { name, face, dir, synced: AtomicU64::new(0), _shown: shown }
    }
}
