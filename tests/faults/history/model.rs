//! What layers may be, and what each request may make of them: the sequential meaning of the graphdriver's calls.
//!
//! ```text
//!   absent ─Create─► created ─mark─► applying ─commit─► applied(version)      door: closed after a tar that failed
//!     │                 │ Get, Diff
//!     └CreateReadWrite──┴──────────► sandbox(names that were written)         references: Get +1, Put -1
//!   Restart: references become 0 or 1, doors open, no layer is of this process any more
//! ```
//!
//! Invariants: an answer of success or a refusal is possible only where the state explains it; an error of the system
//! ([`Answer::Failed`]) may have changed as much as the request changes step by step, and no more. A request that is not one
//! step for others has several ([`Call::steps`]). Called by `search`.

/// State of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum State {
    Absent,
    Created,
    /// By the call of this number.
    Applying(u32),
    /// Of this version of its content.
    Applied(u32),
    /// With these names, one a bit.
    Sandbox(u16),
}

/// Whether a layer takes a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Door {
    Open,
    /// Closed for this layer until it is removed; the next of its id has an open one.
    Closed,
    /// Closed for any layer of this id until one is removed: a tar came when there was none.
    ClosedForAny,
}

/// A layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Layer {
    pub(super) state: State,
    /// The process that runs has created it.
    pub(super) here: bool,
    pub(super) door: Door,
    pub(super) references: u32,
}

impl Layer {
    pub(super) const ABSENT: Self =
        Self { state: State::Absent, here: false, door: Door::Open, references: 0 };
}

/// All layers of a family.
pub(super) type World = Vec<Layer>;

/// Layers that depend on each other, and on no others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub(super) ids: &'static [&'static str],
    /// The parent of each, by its place.
    pub(super) parents: &'static [Option<usize>],
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Create,
    CreateReadWrite,
    /// With a content of this version.
    ApplyDiff(u32),
    Get,
    Put,
    Remove,
    Exists,
    GetMetadata,
    Diff,
    DiffSize,
    Changes,
    /// A name is made in the merged view.
    Write(u8),
    /// The process is killed, and another one starts.
    Restart,
}

/// The content that an answer shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Version(u32),
    Names(u16),
    /// That of a sandbox, whatever was written.
    Sandbox,
}

/// A state by its name in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    Created,
    Applying,
    Applied(u32),
    Sandbox,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NotFound,
    Exists,
    NoParent,
    HasChildren,
    /// The layer itself is incomplete, or takes no tar any more.
    Incomplete,
    /// An ancestor is incomplete.
    AncestorIncomplete,
    /// Already applied.
    Applied,
    /// Created by an earlier process.
    OfEarlierProcess,
    /// It has a sandbox that keeps a tar away.
    HasSandbox,
    /// Another ApplyDiff runs.
    InProgress,
    /// It was removed meanwhile.
    GivenUp,
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Exists(bool),
    Metadata {
        state: Named,
        references: u32,
    },
    Content(Seen),
    /// The name was there already.
    Known,
    /// There was no view to write to.
    NoView,
    Refused(Refusal),
    /// An error of the system.
    Failed,
    /// No answer: the process was killed.
    Lost,
}

/// A request with its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    /// Place of the layer in its family.
    pub(super) layer: usize,
    pub(super) request: Request,
    pub(super) answer: Answer,
    /// Another request that was under way at the same time is reason enough for a refusal.
    pub(super) excused: bool,
}

impl Call {
    /// How many moments of its interval matter.
    pub(super) fn steps(&self) -> u8 {
        match self.request {
            Request::ApplyDiff(_) | Request::Remove => 3,
            Request::Get | Request::GetMetadata => 2,
            _ => 1,
        }
    }

    /// Whether it changes nothing in any state. It may then be put as early as its answer is possible.
    pub(super) fn is_pure(&self) -> bool {
        use Refusal::{
            Applied, Exists, HasChildren, InProgress, Incomplete, NoParent, NotFound, OfEarlierProcess,
        };
        match (self.request, self.answer) {
            (Request::Exists | Request::GetMetadata, _)
            | (_, Answer::Known | Answer::NoView | Answer::Content(Seen::Version(_))) => true,
            (Request::ApplyDiff(_), Answer::Refused(NotFound)) => false,
            (_, Answer::Refused(why)) => matches!(
                why,
                NotFound
                    | Exists
                    | NoParent
                    | HasChildren
                    | Incomplete
                    | Applied
                    | InProgress
                    | OfEarlierProcess
            ),
            _ => false,
        }
    }
}

impl Family {
    fn is_there(world: &World, layer: usize) -> bool {
        world[layer].state != State::Absent
    }

    fn has_children(&self, world: &World, layer: usize) -> bool {
        self.parents.iter().enumerate().any(|(n, parent)| *parent == Some(layer) && Self::is_there(world, n))
    }

    /// Whether an ancestor is incomplete.
    fn ancestor_incomplete(&self, world: &World, layer: usize) -> bool {
        let mut above = self.parents[layer];
        while let Some(n) = above {
            if matches!(world[n].state, State::Applying(_)) {
                return true;
            }
            above = self.parents[n];
        }
        false
    }

    /// What a step of a call may make of a world; nothing if the answer is not possible there.
    pub(super) fn after(&self, world: &World, number: u32, call: &Call, step: u8) -> Vec<World> {
        let mut out = Vec::new();
        match call.request {
            Request::Create => self.create(world, call, State::Created, &mut out),
            Request::CreateReadWrite => self.create(world, call, State::Sandbox(0), &mut out),
            Request::ApplyDiff(version) => self.apply(world, number, call, version, step, &mut out),
            Request::Get => self.get(world, call, step, &mut out),
            Request::Put => put(world, call, &mut out),
            Request::Remove => self.remove(world, call, step, &mut out),
            Request::Exists => {
                if match call.answer {
                    Answer::Exists(there) => Self::is_there(world, call.layer) == there,
                    answer => matches!(answer, Answer::Failed | Answer::Lost),
                } {
                    out.push(world.clone());
                }
            }
            Request::GetMetadata => {
                if metadata(&world[call.layer], call.answer, step) {
                    out.push(world.clone());
                }
            }
            Request::Diff | Request::DiffSize | Request::Changes => self.look(world, call, &mut out),
            Request::Write(bit) => write(world, call, bit, &mut out),
            Request::Restart => {
                let restarted = |layer: &Layer| Layer {
                    here: false,
                    door: Door::Open,
                    references: layer.references.min(1),
                    ..*layer
                };
                out.push(world.iter().map(restarted).collect());
            }
        }
        out
    }

    fn create(&self, world: &World, call: &Call, state: State, out: &mut Vec<World>) {
        let layer = call.layer;
        let parent_there = self.parents[layer].is_none_or(|parent| Self::is_there(world, parent));
        let possible = !Self::is_there(world, layer) && parent_there;
        let stays = match call.answer {
            Answer::Failed | Answer::Lost => true,
            Answer::Refused(Refusal::Exists) => Self::is_there(world, layer),
            Answer::Refused(Refusal::NoParent) => !parent_there || call.excused,
            _ => false,
        };
        if stays {
            out.push(world.clone());
        }
        if possible && matches!(call.answer, Answer::Done | Answer::Failed | Answer::Lost) {
            out.push(changed(world, layer, |l| {
                let door = if l.door == Door::Closed { Door::Open } else { l.door };
                *l = Layer { state, here: true, door, references: 0 };
            }));
        }
    }

    /// 0: a sandbox is made; 1: it is shown, or the refusal.
    fn get(&self, world: &World, call: &Call, step: u8, out: &mut Vec<World>) {
        let layer = call.layer;
        let now = world[layer];
        if step == 0 {
            match call.answer {
                Answer::Refused(Refusal::NotFound | Refusal::Incomplete) => out.push(world.clone()),
                _ => with_and_without_sandbox(world, layer, out),
            }
            return;
        }
        let complete = !matches!(now.state, State::Absent | State::Applying(_))
            && !self.ancestor_incomplete(world, layer);
        let shown = (now.references > 0 || complete).then(|| {
            changed(world, layer, |l| {
                l.references += 1;
                l.state = materialized(l.state);
            })
        });
        match call.answer {
            Answer::Done => out.extend(shown),
            Answer::Refused(Refusal::NotFound) if now.state == State::Absent => out.push(world.clone()),
            Answer::Refused(Refusal::Incomplete) if matches!(now.state, State::Applying(_)) => {
                out.push(world.clone());
            }
            Answer::Refused(Refusal::AncestorIncomplete) if self.ancestor_incomplete(world, layer) => {
                out.push(world.clone());
            }
            // A Get that fails leaves no view.
            Answer::Failed => out.push(world.clone()),
            Answer::Lost => {
                out.push(world.clone());
                out.extend(shown);
            }
            _ => {}
        }
    }

    /// 0: it is unmounted; 1: it goes; 2: what kept tars away is forgotten, unless that began meanwhile.
    fn remove(&self, world: &World, call: &Call, step: u8, out: &mut Vec<World>) {
        let layer = call.layer;
        let children = self.has_children(world, layer);
        let may_go = matches!(call.answer, Answer::Done | Answer::Failed | Answer::Lost);
        let gone = || changed(world, layer, |l| *l = Layer { door: l.door, ..Layer::ABSENT });
        match (step, call.answer) {
            (0, _) => {
                out.push(world.clone());
                if may_go && !children && world[layer].references > 0 {
                    out.push(changed(world, layer, |l| l.references = 0));
                }
            }
            (1, Answer::Done) if !children => out.push(gone()),
            (1, Answer::Refused(Refusal::HasChildren)) if children || call.excused => out.push(world.clone()),
            (1, Answer::Failed | Answer::Lost) => {
                out.push(world.clone());
                if !children {
                    out.push(gone());
                }
            }
            (2, Answer::Done) => {
                out.push(changed(world, layer, |l| l.door = Door::Open));
                if call.excused && world[layer].door != Door::Open {
                    out.push(world.clone());
                }
            }
            // Only a removal that succeeded forgets.
            (2, _) => out.push(world.clone()),
            _ => {}
        }
    }

    fn look(&self, world: &World, call: &Call, out: &mut Vec<World>) {
        let layer = call.layer;
        let state = world[layer].state;
        let incomplete_below = self.ancestor_incomplete(world, layer);
        match call.answer {
            Answer::Content(Seen::Version(version)) if state == State::Applied(version) => {
                out.push(world.clone());
            }
            Answer::Content(Seen::Names(names))
                if materialized(state) == State::Sandbox(names) && !incomplete_below =>
            {
                out.push(changed(world, layer, |l| l.state = materialized(l.state)));
            }
            Answer::Content(Seen::Sandbox)
                if matches!(materialized(state), State::Sandbox(_)) && !incomplete_below =>
            {
                out.push(changed(world, layer, |l| l.state = materialized(l.state)));
            }
            Answer::Refused(Refusal::NotFound) if state == State::Absent => out.push(world.clone()),
            Answer::Refused(Refusal::Incomplete) if matches!(state, State::Applying(_)) => {
                out.push(world.clone());
            }
            Answer::Refused(Refusal::AncestorIncomplete) if incomplete_below => {
                with_and_without_sandbox(world, layer, out);
            }
            Answer::Failed | Answer::Lost => {
                with_and_without_sandbox(world, layer, out);
            }
            _ => {}
        }
    }

    /// 0: a sandbox that was never written is taken back; 1: the mark; 2: the commit, or the refusal.
    fn apply(&self, world: &World, number: u32, call: &Call, version: u32, step: u8, out: &mut Vec<World>) {
        use Refusal::{
            AncestorIncomplete, Applied, GivenUp, HasSandbox, InProgress, Incomplete, NotFound,
            OfEarlierProcess,
        };
        let layer = call.layer;
        let now = world[layer];
        let may_begin = matches!(
            call.answer,
            Answer::Done
                | Answer::Failed
                | Answer::Lost
                | Answer::Refused(NotFound | AncestorIncomplete | HasSandbox | GivenUp)
        );
        if step < 2 {
            // A success has been marked.
            if step == 0 || call.answer != Answer::Done {
                out.push(world.clone());
            }
            if !may_begin || now.door != Door::Open || !now.here {
                return;
            }
            let unwritten =
                now.state == State::Sandbox(0) && now.references == 0 && !self.has_children(world, layer);
            match (step, now.state) {
                (0, _) if unwritten => out.push(changed(world, layer, |l| l.state = State::Created)),
                (1, State::Created) => {
                    out.push(changed(world, layer, |l| l.state = State::Applying(number)));
                }
                _ => {}
            }
            return;
        }
        let committed = (now.state == State::Applying(number))
            .then(|| changed(world, layer, |l| l.state = State::Applied(version)));
        let there = now.state != State::Absent;
        match call.answer {
            Answer::Done => out.extend(committed),
            Answer::Refused(Incomplete)
                if now.door != Door::Open || matches!(now.state, State::Applying(_)) =>
            {
                out.push(world.clone());
            }
            Answer::Refused(Applied) if matches!(now.state, State::Applied(_)) => out.push(world.clone()),
            Answer::Refused(OfEarlierProcess) if now.state == State::Created && !now.here => {
                out.push(world.clone());
            }
            Answer::Refused(InProgress) if call.excused => out.push(world.clone()),
            Answer::Refused(HasSandbox) if matches!(now.state, State::Sandbox(_)) => {
                shut(world, layer, out);
            }
            Answer::Refused(NotFound) if !there => shut(world, layer, out),
            Answer::Refused(AncestorIncomplete) if self.ancestor_incomplete(world, layer) => {
                shut(world, layer, out);
            }
            Answer::Refused(GivenUp) => shut(world, layer, out),
            Answer::Failed => {
                shut(world, layer, out);
                out.extend(committed);
            }
            Answer::Lost => {
                out.push(world.clone());
                out.extend(committed);
            }
            _ => {}
        }
    }
}

fn changed(world: &World, layer: usize, change: impl FnOnce(&mut Layer)) -> World {
    let mut world = world.clone();
    change(&mut world[layer]);
    world
}

/// What the first look at a layer makes of it.
fn materialized(state: State) -> State {
    if state == State::Created { State::Sandbox(0) } else { state }
}

fn with_and_without_sandbox(world: &World, layer: usize, out: &mut Vec<World>) {
    out.push(world.clone());
    if world[layer].state == State::Created {
        out.push(changed(world, layer, |l| l.state = State::Sandbox(0)));
    }
}

/// After a tar that was not taken. One that was meant for a layer that has gone concerns the next of its id only if it came
/// when there was none.
fn shut(world: &World, layer: usize, out: &mut Vec<World>) {
    out.push(changed(world, layer, |l| l.door = Door::Closed));
    if world[layer].state == State::Absent {
        out.push(changed(world, layer, |l| l.door = Door::ClosedForAny));
        out.push(world.clone());
    }
}

fn put(world: &World, call: &Call, out: &mut Vec<World>) {
    let fewer = || changed(world, call.layer, |l| l.references = l.references.saturating_sub(1));
    match call.answer {
        Answer::Done => out.push(fewer()),
        Answer::Failed | Answer::Lost => out.extend([world.clone(), fewer()]),
        _ => {}
    }
}

/// The state is read before the references.
fn metadata(layer: &Layer, answer: Answer, step: u8) -> bool {
    match answer {
        Answer::Metadata { state, .. } if step == 0 => {
            matches!(
                (state, layer.state),
                (Named::Created, State::Created)
                    | (Named::Applying, State::Applying(_))
                    | (Named::Sandbox, State::Sandbox(_))
            ) || matches!((state, layer.state), (Named::Applied(a), State::Applied(b)) if a == b)
        }
        Answer::Metadata { references, .. } => layer.references == references,
        Answer::Refused(Refusal::NotFound) => step == 0 || layer.state == State::Absent,
        Answer::Failed | Answer::Lost => true,
        _ => false,
    }
}

/// Without a reference a writer may still have the view open, and nothing is said about what becomes of its name.
fn write(world: &World, call: &Call, bit: u8, out: &mut Vec<World>) {
    let Layer { state, references, .. } = world[call.layer];
    let mask = 1 << bit;
    match (call.answer, state) {
        (Answer::NoView | Answer::Done | Answer::Known, _) if references == 0 => out.push(world.clone()),
        (Answer::NoView, _) => out.push(world.clone()),
        (Answer::Done, State::Sandbox(names)) => {
            out.push(changed(world, call.layer, |l| l.state = State::Sandbox(names | mask)));
        }
        (Answer::Known, State::Sandbox(names)) if names & mask != 0 => out.push(world.clone()),
        _ => {}
    }
}
