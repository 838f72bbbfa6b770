//! The JSON of the graphdriver protocol, field for field as dockerd's proxy client sends and reads it.
//!
//! Unknown fields are ignored, missing ones are empty: Go leaves zero values out (`omitempty`).

use layer_codec::IdRange;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `GraphDriver.Init`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InitRequest {
    #[serde(default)]
    pub(super) home: String,
    #[serde(default)]
    pub(super) opts: Option<Vec<String>>,
    #[serde(default, rename = "UIDMaps")]
    pub(super) uid_maps: Option<Vec<IdRange>>,
    #[serde(default, rename = "GIDMaps")]
    pub(super) gid_maps: Option<Vec<IdRange>>,
}

/// All requests that name a layer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct LayerRequest {
    #[serde(default, rename = "ID")]
    pub(super) id: String,
    #[serde(default)]
    pub(super) parent: String,
    #[serde(default)]
    pub(super) mount_label: String,
    #[serde(default)]
    pub(super) storage_opt: Option<BTreeMap<String, String>>,
}

/// `Lcow.Grow`, for `lcow-graphdriver store grow`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct GrowRequest {
    #[serde(rename = "ID")]
    pub(super) id: String,
    /// The size in bytes.
    pub(super) bytes: u64,
    /// Put off until the next mount what the kernel cannot do now.
    #[serde(default)]
    pub(super) at_next_start: bool,
}

/// `Lcow.Trim`, for `lcow-graphdriver store trim`.
#[cfg(target_os = "linux")]
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct TrimRequest {
    /// A layer; without it, all.
    #[serde(default, rename = "ID")]
    pub(super) id: Option<String>,
}

/// A request that names its subject.
pub(super) trait Named {
    /// A layer's id, or a home.
    fn name(&self) -> &str;
}

impl Named for InitRequest {
    fn name(&self) -> &str {
        &self.home
    }
}

impl Named for LayerRequest {
    fn name(&self) -> &str {
        &self.id
    }
}

impl Named for GrowRequest {
    fn name(&self) -> &str {
        &self.id
    }
}

#[cfg(target_os = "linux")]
impl Named for TrimRequest {
    fn name(&self) -> &str {
        self.id.as_deref().unwrap_or_default()
    }
}

/// Query of `GraphDriver.ApplyDiff`.
#[derive(Debug, Deserialize)]
pub(super) struct ApplyQuery {
    #[serde(default)]
    pub(super) id: String,
    #[serde(default)]
    pub(super) parent: String,
}

/// `Plugin.Activate`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Activated {
    pub(super) implements: [&'static str; 1],
}

/// A reply with a result of the driver.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Done<T> {
    pub(super) done: T,
    pub(super) err: String,
}

/// A reply that reports only an error, empty on success.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Outcome {
    pub(super) err: String,
    /// What sort of failure it is, by [`Kind::name`](crate::error::Kind::name), for programs; dockerd reads `Err` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) code: Option<&'static str>,
}

/// `GraphDriver.Capabilities`: nested, where the public documentation shows it flat.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CapabilitiesReply {
    pub(super) capabilities: Capabilities,
}

/// What the driver can do.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Capabilities {
    pub(super) reproduces_exact_diffs: bool,
}

/// `GraphDriver.Get`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DirReply {
    pub(super) dir: String,
    pub(super) err: String,
}

/// `GraphDriver.Exists`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ExistsReply {
    pub(super) exists: bool,
}

/// `GraphDriver.Status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct StatusReply {
    pub(super) status: Vec<(String, String)>,
}

/// `GraphDriver.GetMetadata`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct MetadataReply {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) err: String,
}

/// One changed path in the reply of `GraphDriver.Changes`, which `reply::changes` assembles; kind 0 is modified, 1
/// added, 2 deleted.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ChangeEntry {
    pub(super) path: String,
    pub(super) kind: u8,
}

/// `GraphDriver.DiffSize` and `GraphDriver.ApplyDiff`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct SizeReply {
    pub(super) size: u64,
    pub(super) err: String,
}

/// A service VM in the reply of `GET /svm`, which is not part of dockerd's protocol.
#[derive(Debug, Serialize)]
pub(super) struct ServiceVm {
    pub(super) name: String,
    pub(super) leases: usize,
    pub(super) machine: String,
    pub(super) console: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_as_recorded_from_dockerd() {
        let init: InitRequest = serde_json::from_str(
            r#"{"Home":"/var/lib/docker/lcow","Opts":["lcow.globalmode=true"],"UIDMaps":[{"container_id":0,"host_id":500000,"size":65536}],"GIDMaps":null,"New":1}"#,
        )
        .unwrap();
        assert_eq!(init.home, "/var/lib/docker/lcow");
        assert_eq!(init.uid_maps.unwrap()[0].host_id, 500_000);
        assert!(init.gid_maps.is_none());
        let create: LayerRequest =
            serde_json::from_str(r#"{"ID":"abc","Parent":"def","StorageOpt":{"size":"1G"}}"#).unwrap();
        assert_eq!(
            (create.id.as_str(), create.parent.as_str(), create.mount_label.as_str()),
            ("abc", "def", "")
        );
        assert_eq!(create.storage_opt.unwrap()["size"], "1G");
        let empty: LayerRequest = serde_json::from_str("{}").unwrap();
        assert_eq!(empty.id, "");
    }

    #[test]
    fn replies_as_dockerd_reads_them() {
        fn json(value: &impl serde::Serialize) -> String {
            serde_json::to_string(value).unwrap()
        }
        assert_eq!(json(&Activated { implements: ["GraphDriver"] }), r#"{"Implements":["GraphDriver"]}"#);
        let capabilities = CapabilitiesReply { capabilities: Capabilities { reproduces_exact_diffs: true } };
        assert_eq!(json(&capabilities), r#"{"Capabilities":{"ReproducesExactDiffs":true}}"#);
        let status = StatusReply { status: vec![("k".into(), "v".into())] };
        assert_eq!(json(&status), r#"{"Status":[["k","v"]]}"#);
        assert_eq!(json(&ChangeEntry { path: "/x".into(), kind: 2 }), r#"{"Path":"/x","Kind":2}"#);
        assert_eq!(json(&SizeReply { size: 7, err: String::new() }), r#"{"Size":7,"Err":""}"#);
        assert_eq!(json(&Outcome::default()), r#"{"Err":""}"#);
    }
}
