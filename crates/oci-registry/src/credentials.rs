//! Credentials for a registry, from where `docker login` and `podman login` put them.
//!
//! ```text
//!   $REGISTRY_AUTH_FILE, else $DOCKER_CONFIG/config.json, else ~/.docker/config.json
//!     credHelpers[HOST], credsStore ─► docker-credential-NAME get        HOST on its standard input
//!     auths[HOST/NAME … HOST] ─► auth (base64 of USER:PASSWORD) or identitytoken
//! ```
//!
//! No value of this module is printed: [`Credentials`] shows nothing, and no reason has a part of a file or of a helper's reply
//! to a success. Called by `client`.

use crate::RegistryError;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use oci_image::{RegistryName, shown};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

/// The registry that Docker lists under another name.
const HUB: &str = "docker.io";
/// This name.
const HUB_SERVER: &str = "https://index.docker.io/v1/";
/// Its host.
const HUB_INDEX: &str = "index.docker.io";
/// Bytes of the file.
const MAX_FILE: u64 = 1 << 20;
/// Bytes of a helper's reply.
const MAX_REPLY: u64 = 64 << 10;
/// What helpers print if they have nothing (docker-credential-helpers, `credentials/error.go`).
const NOTHING: &str = "credentials not found";
/// The user name that stands for an identity token.
const TOKEN_USER: &str = "<token>";

/// What proves who one is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// Name and password.
    Password(String, String),
    /// A token for the token service.
    Identity(String),
}

impl Credentials {
    /// The value of a header for basic authorization.
    pub(crate) fn basic(&self) -> Option<String> {
        match self {
            Self::Password(user, password) => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// What was found, and where it was looked for.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) credentials: Option<Credentials>,
    /// For messages.
    pub(crate) place: String,
}

/// The file; unknown fields are ignored.
#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthFile {
    auths: BTreeMap<String, Entry>,
    #[serde(rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    creds_store: String,
}

/// An entry of the file.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// The reply of a helper.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Reply {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Finds the credentials for an image.
pub(crate) fn find(name: &RegistryName) -> Result<Found, RegistryError> {
    find_with(name, |variable| std::env::var_os(variable).filter(|value| !value.is_empty()))
}

fn find_with(
    name: &RegistryName,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Found, RegistryError> {
    let Some(path) = place(variable) else {
        return Ok(Found { credentials: None, place: "any file, because HOME is not set".to_owned() });
    };
    let place = path.display().to_string();
    let unusable = |reason: String| RegistryError::Configuration {
        what: format!("the file with credentials {place}"),
        reason,
    };
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found { credentials: None, place }),
        other => {
            other.map_err(|e| unusable(e.to_string()))?;
        }
    }
    if bytes.len() as u64 > MAX_FILE {
        return Err(unusable(format!("more than {MAX_FILE} bytes")));
    }
    // A message of the parser could have parts of a password.
    let file: AuthFile = serde_json::from_slice(&bytes)
        .map_err(|e| unusable(format!("not the expected JSON at line {}", e.line())))?;
    let server = if name.host() == HUB { HUB_SERVER } else { name.host() };
    let named = file.cred_helpers.get(server).or_else(|| file.cred_helpers.get(name.host()));
    let helper = named.or(Some(&file.creds_store)).filter(|helper| !helper.is_empty());
    if let Some(helper) = helper
        && let Some(credentials) = ask(helper, server)?
    {
        return Ok(Found { credentials: Some(credentials), place });
    }
    let credentials = match entry(&file.auths, name) {
        Some(entry) => entry.credentials().map_err(unusable)?,
        None => None,
    };
    Ok(Found { credentials, place })
}

/// The file.
fn place(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let home = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
    variable("REGISTRY_AUTH_FILE")
        .map(PathBuf::from)
        .or_else(|| variable("DOCKER_CONFIG").map(|folder| PathBuf::from(folder).join("config.json")))
        .or_else(|| variable(home).map(|home| PathBuf::from(home).join(".docker").join("config.json")))
}

/// The entry for an image: that of the longest part of its name, or one written as the URL of its registry.
fn entry<'a>(auths: &'a BTreeMap<String, Entry>, name: &RegistryName) -> Option<&'a Entry> {
    let full = format!("{}/{}", name.host(), name.repository());
    let mut part = full.as_str();
    loop {
        if let Some(entry) = auths.get(part) {
            return Some(entry);
        }
        match part.rsplit_once('/') {
            Some((shorter, _)) => part = shorter,
            None => break,
        }
    }
    let host = |key: &str| -> Option<String> {
        let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"))?;
        let host = rest.split('/').next().unwrap_or(rest);
        Some(if host == HUB_INDEX { HUB.to_owned() } else { host.to_ascii_lowercase() })
    };
    let found = auths.iter().find(|(key, _)| host(key).as_deref() == Some(name.host()));
    let plain = || auths.get(HUB_INDEX).filter(|_| name.host() == HUB);
    found.map(|(_, entry)| entry).or_else(plain)
}

impl Entry {
    /// What the entry holds; the reason if it cannot be read.
    fn credentials(&self) -> Result<Option<Credentials>, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credentials::Identity(self.identitytoken.clone())));
        }
        if self.auth.is_empty() {
            let given = !self.username.is_empty();
            return Ok(given.then(|| Credentials::Password(self.username.clone(), self.password.clone())));
        }
        let bytes = STANDARD.decode(self.auth.trim()).map_err(|_| "an entry's auth is no base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "an entry's auth is no UTF-8")?;
        let (user, password) = text.split_once(':').ok_or("an entry's auth has no colon")?;
        Ok(Some(Credentials::Password(user.to_owned(), password.trim_end_matches('\0').to_owned())))
    }
}

/// Asks a credential helper.
fn ask(helper: &str, server: &str) -> Result<Option<Credentials>, RegistryError> {
    let program = format!("docker-credential-{helper}");
    let unusable = |reason: String| RegistryError::Configuration {
        what: format!("the credential helper {}", shown(&program)),
        reason,
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !helper.bytes().all(plain) {
        return Err(unusable(
            "its name has other characters than letters, digits, '-', '_' and '.'".to_owned(),
        ));
    }
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| unusable(e.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that ends without reading says why by its status.
        let _ = input.write_all(server.as_bytes());
    }
    let mut reply = Vec::new();
    let read = child.stdout.take().map(|output| output.take(MAX_REPLY).read_to_end(&mut reply));
    let status = child.wait().map_err(|e| unusable(e.to_string()))?;
    read.transpose().map_err(|e| unusable(e.to_string()))?;
    let text = String::from_utf8_lossy(&reply);
    if !status.success() {
        if text.contains(NOTHING) {
            return Ok(None);
        }
        // By their protocol, helpers print the reason where a success prints the secret.
        let reason = text.lines().next().filter(|line| !line.contains('{')).map(shown);
        return Err(unusable(format!("{status}{}", reason.map(|r| format!(": {r}")).unwrap_or_default())));
    }
    let Reply { username, secret } = serde_json::from_slice(&reply)
        .map_err(|_| unusable("its reply is not the expected JSON".to_owned()))?;
    Ok(match username.as_str() {
        TOKEN_USER => Some(Credentials::Identity(secret)),
        "" if secret.is_empty() => None,
        _ => Some(Credentials::Password(username, secret)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found for a name if the file has this text.
    fn found(text: &str, name: &str) -> Result<Option<Credentials>, RegistryError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth.json");
        std::fs::write(&path, text).unwrap();
        let variable = |name: &str| (name == "REGISTRY_AUTH_FILE").then(|| path.clone().into_os_string());
        find_with(&name.parse().unwrap(), variable).map(|found| found.credentials)
    }

    fn password(user: &str) -> Credentials {
        Credentials::Password(user.to_owned(), "p:w".to_owned())
    }

    #[test]
    fn the_longest_part_of_a_name_decides() {
        let auth = |user: &str| STANDARD.encode(format!("{user}:p:w"));
        let text = format!(
            r#"{{"auths": {{"h.x": {{"auth": "{}"}}, "h.x/team": {{"auth": "{}"}}, "https://old.x/v2/": {{"auth": "{}"}},
                "https://index.docker.io/v1/": {{"auth": "{}"}}, "fields.x": {{"username": "f", "password": "p:w"}},
                "empty.x": {{}}, "token.x": {{"auth": "{}", "identitytoken": "t"}}}}, "HttpHeaders": {{}}}}"#,
            auth("host"),
            auth("team"),
            auth("old"),
            auth("hub"),
            auth("ignored"),
        );
        for (name, expected) in [
            ("h.x/app", Some(password("host"))),
            ("h.x/team/app", Some(password("team"))),
            ("h.x/teams/app", Some(password("host"))),
            ("old.x/app", Some(password("old"))),
            ("docker.io/app", Some(password("hub"))),
            ("fields.x/app", Some(password("f"))),
            ("empty.x/app", None),
            ("h.x:5000/app", None),
            ("token.x/app", Some(Credentials::Identity("t".to_owned()))),
        ] {
            assert!(found(&text, name).unwrap() == expected, "{name}");
        }
        assert_eq!(found("{}", "h.x/a").unwrap(), None);
    }

    #[test]
    fn no_message_has_a_part_of_the_file() {
        for text in [
            r#"{"auths": {"h.x": {"auth": "secret!"}}}"#,
            r#"{"auths": {"h.x": {"auth": "c2VjcmV0"}}}"#,
            r#"{"auths": {"h.x": {"auth": 5, "secret": "secret"}}}"#,
            r#"{"auths": {"h.x": "secret"}}"#,
            "secret",
            r#"{"credsStore": "../secret/x"}"#,
        ] {
            let message = found(text, "h.x/a").unwrap_err().to_string();
            assert!(message.contains("credential") && !message.contains("c2Vj"), "{message}");
            assert!(text.contains("../secret") || !message.contains("secret"), "{message}");
        }
        let shown = format!("{:?}", Credentials::Password("user".into(), "secret".into()));
        assert!(!shown.contains("secret") && !shown.contains("user"));
        let missing = found(r#"{"credHelpers": {"h.x": "of-no-system"}}"#, "h.x/a").unwrap_err();
        assert!(missing.to_string().contains("docker-credential-of-no-system"), "{missing}");
    }

    #[test]
    fn the_file_is_the_one_that_the_environment_names() {
        let with = |set: &[(&str, &str)]| {
            place(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
        };
        let home = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        let all = [("REGISTRY_AUTH_FILE", "a"), ("DOCKER_CONFIG", "d"), (home, "h")];
        assert_eq!(with(&all), Some("a".into()));
        assert_eq!(with(&all[1..]), Some(PathBuf::from("d").join("config.json")));
        assert_eq!(with(&all[2..]), Some(PathBuf::from("h").join(".docker").join("config.json")));
        assert_eq!(with(&[]), None);
    }
}
