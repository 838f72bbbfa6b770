//! The root file system that the tests import: a static busybox, and everything that a layer can hold.

use crate::{
    engine::{Engine, EngineOptions},
    manifest::Tree,
    tarball::{self, Entry, Kind},
};

/// Applets that the tests call.
const APPLETS: &[&str] = &[
    "sh",
    "ls",
    "cat",
    "cp",
    "mv",
    "rm",
    "mkdir",
    "rmdir",
    "ln",
    "chmod",
    "chown",
    "touch",
    "find",
    "xargs",
    "stat",
    "sha256sum",
    "readlink",
    "printf",
    "echo",
    "dd",
    "sleep",
    "true",
    "false",
    "sync",
    "tar",
    "test",
    "id",
    "head",
    "wc",
    "seq",
    "mknod",
    "mkfifo",
    "ps",
    "kill",
    "df",
    "sort",
    "grep",
];
/// Bytes of the large file.
pub(crate) const LARGE: usize = 5 << 20;

/// Bytes that do not compress and are the same in every run (xorshift).
pub(crate) fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Enough to run a shell: folders, busybox, its applets.
pub(crate) fn small() -> Vec<Entry> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|p| std::fs::read(p).ok());
    let busybox = busybox.expect("busybox (apt-get install busybox-static)");
    let mut entries: Vec<Entry> =
        ["bin/", "dev/", "etc/", "proc/", "sys/", "tmp/", "data/"].iter().map(Entry::dir).collect();
    entries[5].mode = 0o1777;
    entries.push(Entry::file("bin/busybox", busybox).mode(0o755));
    entries.extend(APPLETS.iter().map(|a| Entry::symlink(format!("bin/{a}"), "busybox")));
    entries.push(Entry::file("etc/passwd", "root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"));
    entries.push(Entry::file("etc/group", "root:x:0:\nuser:x:1000:\n"));
    entries
}

/// One of everything.
pub(crate) fn full() -> Vec<Entry> {
    let mut entries = small();
    entries.extend([
        Entry::dir("data/nested/").mode(0o750).owner(1000, 1001),
        Entry::dir("data/nested/deeper/").mode(0o2775),
        Entry::file("data/nested/deeper/file", "deep\n").owner(1000, 1000).mode(0o600),
        Entry::file("data/empty", ""),
        Entry::file("data/large", random_bytes(1, LARGE)),
        Entry::file("data/linked", "one file, three names\n").mode(0o640),
        Entry::hard_link("data/linked-2", "data/linked").mode(0o640),
        Entry::hard_link("data/nested/linked-3", "data/linked").mode(0o640),
        Entry::symlink("data/relative", "nested/deeper/file"),
        Entry::symlink("data/absolute", "/data/large"),
        Entry::symlink("data/dangling", "../../no/such/thing"),
        Entry::symlink("data/long", [b'x'; 200]),
        Entry::symlink("data/folder-link", "nested"),
        Entry::file("data/setuid", "#!/bin/sh\n").mode(0o4755),
        Entry::file("data/setgid", "#!/bin/sh\n").mode(0o2711),
        Entry::file("data/xattr", "has attributes\n").xattr("user.note", b"value\0with\nbytes\xff"),
        Entry::dir("data/xattr-dir/").xattr("user.on", "a folder"),
        Entry::file("data/old", "from 1970\n").mtime(1, 0),
        Entry::file("data/new", "from 2100\n").mtime(4_102_444_800, 999_999_999),
        Entry::file("data/ids", "many\n").owner(1_000_000, 2_000_001),
        Entry::dir("data/odd/"),
        Entry::file("data/odd/with space", "1"),
        Entry::file("data/odd/with\nnewline", "2"),
        Entry::file("data/odd/-dash", "3"),
        Entry::file("data/odd/back\\slash\"quote'", "4"),
        Entry::file("data/odd/\u{fc}ml\u{e4}ut-\u{65e5}\u{672c}", "5"),
        Entry::file(b"data/odd/not-utf8-\xff\xfe".as_slice(), "6"),
        Entry::file("data/odd/trailing space ", "7"),
        Entry::file("data/odd/.wh", "not a whiteout"),
        Entry::file([b"data/odd/".as_slice(), &[b'n'; 255]].concat(), "8"),
        Entry::dir("data/nodes/"),
        Entry::new("data/nodes/null", Kind::CharDevice(1, 3), 0o666),
        Entry::new("data/nodes/block", Kind::BlockDevice(7, 300), 0o660),
        Entry::new("data/nodes/pipe", Kind::Fifo, 0o622),
    ]);
    entries
}

/// The ids of `full` that a remapped user namespace of 65,536 ids can name.
pub(crate) fn full_for_userns() -> Vec<Entry> {
    full().into_iter().filter(|e| e.uid < 65_536).collect()
}

/// An engine with the image `base` of the given entries, and its tree.
pub(crate) fn engine_with(options: EngineOptions, entries: &[Entry]) -> (Engine, Tree) {
    let engine = Engine::start(options);
    engine.import("base", tarball::build(entries));
    let mut tree = Tree::default();
    tree.apply(entries);
    // The engine writes there in every container.
    tree.0.get_mut(b"/etc".as_slice()).expect("/etc").mtime = None;
    (engine, tree)
}
