//! Our messages and services against containerd's own files: what is here is there, equally.
//!
//! ```text
//!   proto/*.proto                          ─protox─► packages ─┐
//!   LCOW_CONTAINERD_PROTO/…/api/**/*.proto ─protox─► packages ─┴─► every name, number, type and label of ours, in theirs
//! ```
//!
//! The folder is an unpacked `golang-github-containerd-containerd-api-dev` (`scripts/fetch-packages`), a Go path with
//! containerd below it, or containerd's source. Files and comments may differ: only packages go over the wire.

#[path = "../../../tests/support/skip.rs"]
mod skip;

use protox::prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};
use std::path::{Path, PathBuf};

/// Our files.
const OURS: &[&str] = &["types.proto", "content.proto", "diff.proto", "leases.proto", "snapshots.proto"];
/// Containerd's files below its folder `api`; they import the shared messages.
const THEIRS: &[&str] = &[
    "services/content/v1/content.proto",
    "services/diff/v1/diff.proto",
    "services/leases/v1/leases.proto",
    "services/snapshots/v1/snapshots.proto",
];
/// The folder `api` by its Go package; imports of 2.1 and earlier start with it, later ones with `types`.
const PACKAGE: &str = "github.com/containerd/containerd/api";
/// Folders of a Debian package and of a Go path in which Go packages lie.
const PLACES: &[&str] = &["", "src", "usr/share/gocode/src"];
/// Fields that old versions lack, with the first version that has them. Where they are missing their numbers must be
/// free; where they exist they are compared.
const NEWER: &[(&str, &str)] = &[
    // 2.2: parallel unpacking.
    ("containerd.services.snapshots.v1.CommitSnapshotRequest.parent", "2.2"),
    ("containerd.services.diff.v1.ApplyRequest.sync_fs", "1.7.14"),
];

/// Where to look for imports: the folder `api`, and the one in which its Go package lies.
fn include_folders(root: &Path) -> Option<Vec<PathBuf>> {
    let packages = PLACES.iter().map(|place| root.join(place));
    let packaged = packages.map(|place| vec![place.join(PACKAGE), place]);
    let mut found = [vec![root.to_owned()], vec![root.join("api")]].into_iter().chain(packaged);
    found.find(|folders| folders[0].join(THEIRS[0]).exists())
}

fn compile(files: &[&str], folders: &[PathBuf]) -> DescriptorPool {
    let mut compiler = protox::Compiler::new(folders).unwrap();
    compiler.include_imports(true);
    compiler.open_files(files).unwrap_or_else(|e| panic!("{folders:?}: {e:?}"));
    compiler.descriptor_pool()
}

/// What is compared, and what differs.
#[derive(Debug, Default)]
struct Comparison {
    compared: usize,
    missing_there: Vec<String>,
    faults: Vec<String>,
}

impl Comparison {
    fn equal(&mut self, name: &str, ours: &str, theirs: &str) {
        self.compared += 1;
        if ours != theirs {
            self.faults.push(format!("{name}: ours is {ours}, theirs is {theirs}"));
        }
    }

    fn message(&mut self, ours: &MessageDescriptor, theirs: Option<MessageDescriptor>) {
        let Some(theirs) = theirs else {
            self.faults.push(format!("{} does not exist there", ours.full_name()));
            return;
        };
        for field in ours.fields() {
            let name = field.full_name();
            match theirs.get_field_by_name(field.name()) {
                Some(other) => self.equal(name, &shape(&field), &shape(&other)),
                None if NEWER.iter().any(|(newer, _)| *newer == name)
                    && theirs.get_field(field.number()).is_none() =>
                {
                    self.missing_there.push(name.to_owned());
                }
                None => self.faults.push(format!("{name} does not exist there")),
            }
        }
    }
}

/// All of a field that its bytes depend on.
fn shape(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) if field.is_map() => {
            let entry: Vec<String> = message.fields().map(|f| shape(&f)).collect();
            format!("map of {}", entry.join(" and "))
        }
        kind => format!("{kind:?}"),
    };
    format!("{:?} {kind} = {}, packed {}", field.cardinality(), field.number(), field.is_packed())
}

fn compare(ours: &DescriptorPool, theirs: &DescriptorPool) -> Comparison {
    let mut seen = Comparison::default();
    let own = |package: &str| package.starts_with("containerd.");
    for message in ours.all_messages().filter(|m| own(m.package_name()) && !m.is_map_entry()) {
        seen.message(&message, theirs.get_message_by_name(message.full_name()));
    }
    for kinds in ours.all_enums().filter(|e| own(e.package_name())) {
        let Some(other) = theirs.get_enum_by_name(kinds.full_name()) else {
            seen.faults.push(format!("{} does not exist there", kinds.full_name()));
            continue;
        };
        for value in kinds.values() {
            let there = other.get_value_by_name(value.name()).map(|v| v.number());
            seen.equal(value.full_name(), &format!("{:?}", Some(value.number())), &format!("{there:?}"));
        }
    }
    for service in ours.services().filter(|s| own(s.package_name())) {
        let other = theirs.services().find(|s| s.full_name() == service.full_name());
        for method in service.methods() {
            let found = other.as_ref().and_then(|s| s.methods().find(|m| m.name() == method.name()));
            let signature = |m: &protox::prost_reflect::MethodDescriptor| {
                let (sent, reply) = (m.input(), m.output());
                let (sends, replies) = (m.is_client_streaming(), m.is_server_streaming());
                format!("{} (stream: {sends}) -> {} (stream: {replies})", sent.full_name(), reply.full_name())
            };
            let there = found.map_or_else(|| "missing".to_owned(), |m| signature(&m));
            seen.equal(method.full_name(), &signature(&method), &there);
        }
    }
    seen
}

fn ours() -> DescriptorPool {
    compile(OURS, &[Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")])
}

/// Names and methods that are compared at least: about what the daemon uses.
const LEAST: usize = 120;

#[test]
fn our_messages_are_containerds() {
    let Some(root) = std::env::var_os("LCOW_CONTAINERD_PROTO") else {
        return skip::skip("LCOW_CONTAINERD_PROTO names no folder with containerd's .proto files");
    };
    let root = PathBuf::from(root);
    let folders = include_folders(&root)
        .unwrap_or_else(|| panic!("LCOW_CONTAINERD_PROTO={}: no {} below it", root.display(), THEIRS[0]));
    let seen = compare(&ours(), &compile(THEIRS, &folders));
    assert!(seen.faults.is_empty(), "{}", seen.faults.join("\n"));
    assert!(seen.compared >= LEAST, "only {} names were compared", seen.compared);
    println!("{} names are equal; this version lacks {:?}", seen.compared, seen.missing_there);
}

#[test]
fn the_comparison_finds_a_changed_number_type_label_and_method() {
    let folder = tempfile::tempdir().unwrap();
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    for (file, from, to, fault) in [
        ("snapshots.proto", "int64 inodes = 2", "int64 inodes = 3", "UsageResponse.inodes"),
        ("diff.proto", "bool sync_fs = 4", "int64 sync_fs = 4", "ApplyRequest.sync_fs"),
        ("types.proto", "repeated string options", "string options", "Mount.options"),
        ("content.proto", "map<string, string> labels = 7", "map<string, bytes> labels = 7", "labels"),
        ("content.proto", "COMMIT = 2", "COMMIT = 3", "COMMIT"),
        ("leases.proto", "rpc Delete(DeleteRequest)", "rpc Delete(stream DeleteRequest)", "Leases.Delete"),
        ("snapshots.proto", "string parent = 5", "string parents = 5", "CommitSnapshotRequest.parent"),
    ] {
        for name in OURS {
            let text = std::fs::read_to_string(proto.join(name)).unwrap();
            let changed = if *name == file { text.replace(from, to) } else { text.clone() };
            assert_eq!(changed == text, *name != file, "{from} is not in {file}");
            std::fs::write(folder.path().join(name), changed).unwrap();
        }
        let seen = compare(&ours(), &compile(OURS, &[folder.path().to_owned()]));
        assert!(seen.faults.len() == 1 && seen.faults[0].contains(fault), "{to}: {:?}", seen.faults);
    }
    let same = compare(&ours(), &ours());
    assert!(same.faults.is_empty() && same.compared >= LEAST, "{same:?}");
}
