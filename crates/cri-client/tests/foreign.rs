//! Our messages and services against Kubernetes' own file: what is here is there, equally.
//!
//! ```text
//!   proto/runtime.proto                              ─protox─► package ─┐
//!   LCOW_CRI_PROTO/…/pkg/apis/runtime/v1/api.proto   ─protox─► package ─┴─► every name, number, type and label of ours,
//!      └ imports gogo's options: declared here, in a folder of their own         in theirs
//! ```
//!
//! The folder is an unpacked `golang-github-kubernetes-cri-api-dev` (`scripts/fetch-packages`), a Go path's `src` with
//! `k8s.io` below it, or anything between.

#[path = "../../../tests/support/skip.rs"]
mod skip;

use protox::prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor};
use std::{
    fs,
    path::{Path, PathBuf},
};

const PACKAGE: &str = "runtime.v1";
/// Our file, below `proto`.
const OURS: &str = "runtime.proto";
/// Kubernetes' file, by the path of its Go package.
const THEIRS: &str = "k8s.io/cri-api/pkg/apis/runtime/v1/api.proto";
/// Folders of a Debian package and of a Go path in which the Go packages lie.
const PLACES: &[&str] = &["", "src", "usr/share/gocode/src"];
/// What Kubernetes' file imports, from another project's package. It tells a generator of Go code what to write, and
/// nothing of it goes over the wire: the options that are set there, with gogo's numbers.
const GOGO: &str = "github.com/gogo/protobuf/gogoproto/gogo.proto";
const GOGO_OPTIONS: &str = r#"
syntax = "proto2";
package gogoproto;
import "google/protobuf/descriptor.proto";
extend google.protobuf.FileOptions {
  optional bool goproto_getters_all = 63001;
  optional bool goproto_stringer_all = 63003;
  optional bool stringer_all = 63008;
  optional bool marshaler_all = 63017;
  optional bool unmarshaler_all = 63018;
  optional bool sizer_all = 63020;
  optional bool goproto_unrecognized_all = 63026;
}
"#;
/// Names that are compared at least: about what the tests use.
const LEAST: usize = 150;

fn compile(file: &str, folders: &[&Path]) -> DescriptorPool {
    let mut compiler = protox::Compiler::new(folders).unwrap();
    compiler.include_imports(true);
    compiler.open_files([file]).unwrap_or_else(|e| panic!("{file} in {folders:?}: {e:?}"));
    compiler.descriptor_pool()
}

/// What is compared, and what differs.
#[derive(Debug, Default)]
struct Comparison {
    compared: usize,
    faults: Vec<String>,
}

impl Comparison {
    fn equal(&mut self, name: &str, ours: &str, theirs: Option<String>) {
        self.compared += 1;
        let theirs = theirs.unwrap_or_else(|| "missing".to_owned());
        if ours != theirs {
            self.faults.push(format!("{name}: ours is {ours}, theirs is {theirs}"));
        }
    }

    fn message(&mut self, ours: &MessageDescriptor, theirs: Option<&MessageDescriptor>) {
        let kind = |m: &MessageDescriptor| format!("message {}", m.full_name());
        self.equal(ours.full_name(), &kind(ours), theirs.map(kind));
        for field in ours.fields() {
            let other = theirs.and_then(|t| t.get_field_by_name(field.name()));
            self.equal(field.full_name(), &shape(&field), other.as_ref().map(shape));
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

fn signature(method: &MethodDescriptor) -> String {
    let (sent, reply) = (method.input(), method.output());
    let (sends, replies) = (method.is_client_streaming(), method.is_server_streaming());
    format!("{} (stream: {sends}) -> {} (stream: {replies})", sent.full_name(), reply.full_name())
}

fn compare(ours: &DescriptorPool, theirs: &DescriptorPool) -> Comparison {
    let mut seen = Comparison::default();
    for message in ours.all_messages().filter(|m| m.package_name() == PACKAGE && !m.is_map_entry()) {
        seen.message(&message, theirs.get_message_by_name(message.full_name()).as_ref());
    }
    for kinds in ours.all_enums().filter(|e| e.package_name() == PACKAGE) {
        let other = theirs.get_enum_by_name(kinds.full_name());
        for value in kinds.values() {
            let there = other.as_ref().and_then(|e| e.get_value_by_name(value.name()));
            let number = |value: protox::prost_reflect::EnumValueDescriptor| value.number().to_string();
            seen.equal(value.full_name(), &number(value.clone()), there.map(number));
        }
    }
    for service in ours.services().filter(|s| s.package_name() == PACKAGE) {
        let other = theirs.services().find(|s| s.full_name() == service.full_name());
        for method in service.methods() {
            let there = other.as_ref().and_then(|s| s.methods().find(|m| m.name() == method.name()));
            seen.equal(method.full_name(), &signature(&method), there.as_ref().map(signature));
        }
    }
    seen
}

fn proto() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")
}

#[test]
fn our_messages_are_kubernetes_own() {
    let Some(root) = std::env::var_os("LCOW_CRI_PROTO") else {
        return skip::skip("LCOW_CRI_PROTO names no folder with Kubernetes' api.proto");
    };
    let root = PathBuf::from(root);
    let folder = PLACES.iter().map(|place| root.join(place)).find(|folder| folder.join(THEIRS).exists());
    let folder = folder.unwrap_or_else(|| panic!("LCOW_CRI_PROTO={}: no {THEIRS} below it", root.display()));
    let options = tempfile::tempdir().unwrap();
    let place = options.path().join(GOGO);
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    fs::write(place, GOGO_OPTIONS).unwrap();
    let theirs = compile(THEIRS, &[options.path(), &folder]);
    let seen = compare(&compile(OURS, &[&proto()]), &theirs);
    assert!(seen.faults.is_empty(), "{}", seen.faults.join("\n"));
    assert!(seen.compared >= LEAST, "only {} names were compared", seen.compared);
    println!("{} names are equal", seen.compared);
}

#[test]
fn the_comparison_finds_a_changed_number_type_label_and_method() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(proto().join(OURS)).unwrap();
    let ours = compile(OURS, &[&proto()]);
    for (from, to, fault) in [
        ("FilesystemUsage writable_layer = 4", "FilesystemUsage writable_layer = 5", "writable_layer"),
        ("bytes stdout = 1", "string stdout = 1", "ExecSyncResponse.stdout"),
        ("repeated string cmd = 2", "string cmd = 2", "ExecSyncRequest.cmd"),
        ("map<string, string> annotations = 10", "map<string, bytes> annotations = 10", "annotations"),
        ("CONTAINER_EXITED = 2", "CONTAINER_EXITED = 7", "CONTAINER_EXITED"),
        ("rpc ImageFsInfo(ImageFsInfoRequest)", "rpc ImageFsInfo(stream ImageFsInfoRequest)", "ImageFsInfo"),
        ("rpc ExecSync(", "rpc ExecSynchronously(", "RuntimeService.ExecSync"),
        ("string image_ref = 1", "string image_id = 1", "PullImageResponse.image_ref"),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from} is not in the file");
        fs::write(folder.path().join(OURS), changed).unwrap();
        let seen = compare(&ours, &compile(OURS, &[folder.path()]));
        assert!(seen.faults.len() == 1 && seen.faults[0].contains(fault), "{to}: {:?}", seen.faults);
    }
    let same = compare(&ours, &ours);
    assert!(same.faults.is_empty() && same.compared >= LEAST, "{same:?}");
}
