//! The checker itself: histories made by hand, right ones that it must explain and wrong ones that it must not.

use super::{
    model::{
        Answer::{self, Content, Done, Exists, Failed, Lost, Metadata, Refused},
        Call, Family, Named,
        Refusal::{self, NotFound},
        Request::{
            self, ApplyDiff, Create, CreateReadWrite, Diff, Get, GetMetadata, Put, Remove, Restart, Write,
        },
        Seen::{Names, Version},
    },
    search::{Event, explain},
};

const PAIR: Family = Family { ids: &["base", "top"], parents: &[None, Some(0)] };

/// Begin, end, layer, request, answer.
type Line = (u64, u64, usize, Request, Answer);

/// A name, and calls one after the other: layer, request, answer.
type History<'a> = (&'a str, &'a [(usize, Request, Answer)]);

fn is_explained(lines: &[Line]) -> bool {
    let event = |&(begin, end, layer, request, answer): &Line| Event {
        begin,
        end,
        call: Call { layer, request, answer, excused: false },
    };
    explain(&PAIR, &lines.iter().map(event).collect::<Vec<_>>()).is_ok()
}

/// One after the other.
fn in_order(calls: &[(usize, Request, Answer)]) -> bool {
    let line = |(n, &(layer, request, answer)): (usize, &(usize, Request, Answer))| {
        (n as u64 * 2, n as u64 * 2 + 1, layer, request, answer)
    };
    is_explained(&calls.iter().enumerate().map(line).collect::<Vec<_>>())
}

fn shown(state: Named, references: u32) -> Answer {
    Metadata { state, references }
}

#[test]
fn right_histories_are_explained() {
    let cases: [History<'_>; 8] = [
        (
            "a life",
            &[
                (0, Create, Done),
                (0, Create, Refused(Refusal::Exists)),
                (0, ApplyDiff(1), Done),
                (0, Diff, Content(Version(1))),
                (1, CreateReadWrite, Done),
                (0, Remove, Refused(Refusal::HasChildren)),
                (1, Get, Done),
                (1, Write(3), Done),
                (1, GetMetadata, shown(Named::Sandbox, 1)),
                (1, Put, Done),
                (1, Diff, Content(Names(1 << 3))),
                (1, Remove, Done),
                (0, Remove, Done),
                (0, Request::Exists, Exists(false)),
            ],
        ),
        (
            "a sandbox that was never written takes a tar",
            &[
                (0, Create, Done),
                (0, Get, Done),
                (0, Put, Done),
                (0, ApplyDiff(1), Done),
                (0, Diff, Content(Version(1))),
            ],
        ),
        (
            "an error may leave a layer, or none",
            &[
                (0, Create, Failed),
                (0, Request::Exists, Exists(true)),
                (0, Remove, Failed),
                (0, Create, Done),
            ],
        ),
        (
            "an error behind the mark",
            &[
                (0, Create, Done),
                (0, ApplyDiff(1), Failed),
                (0, GetMetadata, shown(Named::Applying, 0)),
                (0, Get, Refused(Refusal::Incomplete)),
                (0, ApplyDiff(2), Refused(Refusal::Incomplete)),
            ],
        ),
        (
            "a restart counts a view once",
            &[
                (0, CreateReadWrite, Done),
                (0, Get, Done),
                (0, Get, Done),
                (0, Restart, Done),
                (0, GetMetadata, shown(Named::Sandbox, 1)),
                (0, Put, Done),
                (0, GetMetadata, shown(Named::Sandbox, 0)),
            ],
        ),
        (
            "a layer of an earlier process takes no tar",
            &[(0, Create, Done), (0, Restart, Done), (0, ApplyDiff(1), Refused(Refusal::OfEarlierProcess))],
        ),
        (
            "a tar that came too early closes the door of the layer that is made afterwards",
            &[
                (0, ApplyDiff(1), Refused(NotFound)),
                (0, Create, Done),
                (0, ApplyDiff(2), Refused(Refusal::Incomplete)),
            ],
        ),
        (
            "a removal that failed leaves the door closed, even if the layer is gone",
            &[
                (0, ApplyDiff(1), Refused(NotFound)),
                (0, Create, Done),
                (0, Remove, Failed),
                (0, Request::Exists, Exists(false)),
                (0, Create, Done),
                (0, ApplyDiff(2), Refused(Refusal::Incomplete)),
            ],
        ),
    ];
    for (what, calls) in cases {
        assert!(in_order(calls), "{what}");
    }
    let at_once: [(&str, &[Line]); 4] = [
        (
            "two creations, one refused",
            &[(0, 10, 0, Create, Refused(Refusal::Exists)), (1, 11, 0, Create, Done)],
        ),
        (
            "what is seen in the midst of an apply",
            &[
                (0, 1, 0, Create, Done),
                (2, 20, 0, ApplyDiff(1), Done),
                (3, 4, 0, GetMetadata, shown(Named::Created, 0)),
                (5, 6, 0, GetMetadata, shown(Named::Applying, 0)),
                (7, 8, 0, Get, Refused(Refusal::Incomplete)),
                (9, 10, 0, Diff, Content(Version(1))),
            ],
        ),
        (
            "a call without an answer took effect late",
            &[
                (0, 20, 0, Create, Lost),
                (1, 2, 0, Request::Exists, Exists(false)),
                (3, 4, 0, Request::Exists, Exists(true)),
                (21, 22, 0, Restart, Done),
                (23, 24, 0, Request::Exists, Exists(true)),
            ],
        ),
        (
            "a layer was removed under its tar",
            &[
                (0, 1, 0, Create, Done),
                (2, 9, 0, ApplyDiff(1), Refused(Refusal::GivenUp)),
                (3, 8, 0, Remove, Done),
                (10, 11, 0, Create, Done),
                (12, 13, 0, ApplyDiff(2), Done),
            ],
        ),
    ];
    for (what, lines) in at_once {
        assert!(is_explained(lines), "{what}");
    }
}

#[test]
fn wrong_histories_are_not_explained() {
    let cases: [History<'_>; 15] = [
        ("an acknowledged layer is lost", &[(0, Create, Done), (0, Request::Exists, Exists(false))]),
        (
            "a removed layer comes back with a restart",
            &[(0, Create, Done), (0, Remove, Done), (0, Restart, Done), (0, Request::Exists, Exists(true))],
        ),
        ("two layers of one id", &[(0, Create, Done), (0, Create, Done)]),
        ("a refusal without a layer", &[(0, Create, Refused(Refusal::Exists))]),
        ("a child without a parent", &[(1, Create, Done)]),
        ("a parent is removed below its child", &[(0, Create, Done), (1, Create, Done), (0, Remove, Done)]),
        (
            "the content of an earlier layer of this id",
            &[
                (0, Create, Done),
                (0, ApplyDiff(1), Done),
                (0, Remove, Done),
                (0, Create, Done),
                (0, ApplyDiff(2), Done),
                (0, Diff, Content(Version(1))),
            ],
        ),
        ("content without a tar", &[(0, Create, Done), (0, Diff, Content(Version(1)))]),
        (
            "a tar behind one that was not taken",
            &[(0, Create, Done), (0, ApplyDiff(1), Failed), (0, ApplyDiff(2), Done)],
        ),
        (
            "a tar for a layer of an earlier process",
            &[(0, Create, Done), (0, Restart, Done), (0, ApplyDiff(1), Done)],
        ),
        (
            "an incomplete layer that no tar was sent to",
            &[(0, Create, Done), (0, Get, Refused(Refusal::Incomplete))],
        ),
        (
            "a reference too many",
            &[(0, CreateReadWrite, Done), (0, Get, Done), (0, GetMetadata, shown(Named::Sandbox, 2))],
        ),
        (
            "a reference is forgotten by a restart",
            &[
                (0, CreateReadWrite, Done),
                (0, Get, Done),
                (0, Restart, Done),
                (0, GetMetadata, shown(Named::Sandbox, 0)),
            ],
        ),
        (
            "what was written in a container is not in its diff",
            &[
                (0, CreateReadWrite, Done),
                (0, Get, Done),
                (0, Write(0), Done),
                (0, Put, Done),
                (0, Diff, Content(Names(0))),
            ],
        ),
        (
            "a tar hides what was written",
            &[
                (0, Create, Done),
                (0, Get, Done),
                (0, Write(0), Done),
                (0, Put, Done),
                (0, ApplyDiff(1), Done),
            ],
        ),
    ];
    for (what, calls) in cases {
        assert!(!in_order(calls), "{what}");
    }
    let at_once: [(&str, &[Line]); 4] = [
        ("two creations at once both succeed", &[(0, 10, 0, Create, Done), (1, 11, 0, Create, Done)]),
        (
            "a layer that was seen is not there any more",
            &[
                (0, 20, 0, Create, Done),
                (1, 2, 0, Request::Exists, Exists(true)),
                (3, 4, 0, Request::Exists, Exists(false)),
            ],
        ),
        (
            "a killed process goes on",
            &[
                (0, 3, 0, Create, Lost),
                (4, 5, 0, Restart, Done),
                (6, 7, 0, Request::Exists, Exists(false)),
                (8, 9, 0, Request::Exists, Exists(true)),
            ],
        ),
        (
            "two tars at once are both taken",
            &[(0, 1, 0, Create, Done), (2, 10, 0, ApplyDiff(1), Done), (3, 11, 0, ApplyDiff(2), Done)],
        ),
    ];
    for (what, lines) in at_once {
        assert!(!is_explained(lines), "{what}");
    }
}
