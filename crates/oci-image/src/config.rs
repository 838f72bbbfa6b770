//! The configuration of an image: what a container engine would run, and the digests of the plain layers.
//!
//! The bytes are kept as they are: whoever adds a layer must change three fields and no other. Parsing only. Called by
//! `resolve`.

use crate::{
    Digest, ImageError, Platform,
    document::{json, nullable},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a container of this image runs (field `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// User or uid, with `:` and a group or gid.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Variables, `NAME=VALUE`.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The command; [`RunConfig::cmd`] follows it.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Default arguments, or the command if there is no entrypoint.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Working directory.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// Labels.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Ports, `80/tcp`; the values are empty.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
    /// Directories whose content does not belong to a container; the values are empty.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Signal that stops it.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
}

/// One step of a build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// When, RFC 3339.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub created: String,
    /// By which command.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub created_by: String,
    /// By whom.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub author: String,
    /// A note.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// It made no layer.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// The plain layers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "nullable")]
    diff_ids: Vec<Digest>,
}

/// The fields that are read.
#[derive(Debug, Deserialize)]
struct Fields {
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    variant: String,
    #[serde(default, rename = "os.version", deserialize_with = "nullable")]
    os_version: String,
    #[serde(default, rename = "os.features", deserialize_with = "nullable")]
    os_features: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    created: String,
    #[serde(default, deserialize_with = "nullable")]
    author: String,
    #[serde(default, deserialize_with = "nullable")]
    config: RunConfig,
    #[serde(default, deserialize_with = "nullable")]
    history: Vec<History>,
    rootfs: Option<RootFs>,
}

/// The configuration of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The document as it is.
    pub raw: Vec<u8>,
    /// Its digest, which Docker calls the id of the image.
    pub digest: Digest,
    /// What the image runs on, as written.
    pub platform: Platform,
    /// When it was made, RFC 3339; empty if it does not say.
    pub created: String,
    /// Who made it.
    pub author: String,
    /// What a container runs.
    pub config: RunConfig,
    /// How it was made.
    pub history: Vec<History>,
    /// Digests of the plain layers, the lowest first.
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Reads the configuration `what`.
    ///
    /// # Errors
    /// [`ImageError::Corrupt`] for other JSON than that of a configuration with `rootfs`.
    pub fn parse(what: &str, raw: Vec<u8>) -> Result<Self, ImageError> {
        let fields: Fields = json(what, &raw)?;
        let Some(rootfs) = fields.rootfs else {
            return Err(ImageError::corrupt(what, "it has no rootfs: it is no configuration of an image"));
        };
        let platform = Platform {
            os: fields.os,
            architecture: fields.architecture,
            variant: fields.variant,
            os_version: fields.os_version,
            os_features: fields.os_features,
        };
        Ok(Self {
            digest: Digest::sha256(&raw),
            raw,
            platform,
            created: fields.created,
            author: fields.author,
            config: fields.config,
            history: fields.history,
            diff_ids: rootfs.diff_ids,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_and_kept() {
        let raw = br#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Entrypoint":["/init"],"Labels":{"a":"b"},
            "ExposedPorts":{"80/tcp":{}},"Unknown":1},"rootfs":{"type":"layers","diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]},
            "history":[{"created_by":"x","empty_layer":true},{}],"extra":{"deep":[1]}}"#;
        let config = ImageConfig::parse("config", raw.to_vec()).unwrap();
        assert_eq!(config.raw, raw);
        assert_eq!(config.diff_ids, [Digest::sha256(b"")]);
        assert_eq!(config.platform.to_string(), "linux/amd64");
        assert_eq!(config.config.entrypoint, ["/init"]);
        assert!(
            config.config.env.is_empty() && config.history[0].empty_layer && !config.history[1].empty_layer
        );
        for bad in
            ["{}", "[]", r#"{"rootfs":{"diff_ids":["x"]}}"#, r#"{"rootfs":{},"config":{"Cmd":"sh"}}"#, "{"]
        {
            assert!(ImageConfig::parse("config", bad.into()).is_err(), "{bad}");
        }
    }
}
