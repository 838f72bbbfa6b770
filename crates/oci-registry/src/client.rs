//! Requests to one repository of a registry (OCI distribution specification 1.1).
//!
//! ```text
//!   get(path) ─► 401 ─► challenge ─┬─ Basic ──────────────────────► name and password ─┐
//!                                  └─ Bearer ─► token service ────► token              ─┴─► once more
//!            ─► 200, 206, 416: the reply       ─► 403, 404, other: a typed error with what the registry says
//! ```
//!
//! A request whose connection is lost before the reply is made again. Called by `fetch`.

use crate::{
    RegistryError,
    challenge::{self, Challenge},
    credentials::{self, Credentials, Found},
    transport::{Request, Transport, absolute, host_of, is_tls},
};
use oci_image::{RegistryName, shown};
use serde::Deserialize;
use std::{
    fmt::Write as _,
    io::{self, Read},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};
use ureq::{
    Body,
    http::{HeaderValue, Response, Uri, header::WWW_AUTHENTICATE},
};

/// The registry whose interface has another host than its names.
const HUB: &str = "docker.io";
/// This host.
const HUB_INTERFACE: &str = "registry-1.docker.io";
/// Times that a request is made whose connection is lost.
const ATTEMPTS: u32 = 3;
/// Time before the second of them; the third waits twice as long.
const PAUSE: Duration = Duration::from_millis(300);
/// Bytes of an error's text.
const MAX_REASON: u64 = 64 << 10;
/// Bytes of a token service's reply.
const MAX_TOKEN: u64 = 1 << 20;
/// The name of this program to a token service.
const CLIENT_ID: &str = "lcow-graphdriver";

/// A client of one repository.
#[derive(Debug)]
pub(crate) struct Client {
    name: RegistryName,
    base: String,
    plain_http: bool,
    transport: Transport,
    found: Mutex<Option<Arc<Found>>>,
    authorization: Mutex<Option<HeaderValue>>,
}

/// What a registry says about an error.
#[derive(Deserialize)]
struct Errors {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The reply of a token service.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Client {
    pub(crate) fn new(
        name: &RegistryName,
        plain_http: bool,
        ca: Option<PathBuf>,
    ) -> Result<Self, RegistryError> {
        let scheme = if plain_http { "http" } else { "https" };
        let host = if name.host() == HUB { HUB_INTERFACE } else { name.host() };
        Ok(Self {
            name: name.clone(),
            base: format!("{scheme}://{host}/v2/{}/", name.repository()),
            plain_http,
            transport: Transport::new(ca)?,
            found: Mutex::new(None),
            authorization: Mutex::new(None),
        })
    }

    /// The registry, for messages.
    pub(crate) fn host(&self) -> String {
        self.name.host().to_owned()
    }

    /// Asks for `path` below the repository, from offset `from` on.
    ///
    /// # Errors
    /// All but those of the cache. The reply's status is 200, 206 or 416.
    pub(crate) fn get(
        &self,
        path: &str,
        what: &str,
        accept: Option<&str>,
        from: u64,
    ) -> Result<Response<Body>, RegistryError> {
        let url = format!("{}{path}", self.base);
        let url = absolute(&url).ok_or_else(|| self.invalid(what, "its name cannot stand in a URL"))?;
        let mut asked = false;
        loop {
            let authorization = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let request = Request { url: url.clone(), what, accept, authorization, from };
            let response = patiently(|| self.transport.get(&request))?;
            match response.status().as_u16() {
                200 | 206 | 416 => return Ok(response),
                401 if !asked => {
                    // A token may have expired, too.
                    asked = true;
                    let authorization = self.authorize(response)?;
                    *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
                }
                status => return Err(self.refused(status, what, response)),
            }
        }
    }

    fn invalid(&self, what: &str, reason: &str) -> RegistryError {
        RegistryError::Protocol { host: self.host(), what: what.to_owned(), reason: reason.to_owned() }
    }

    fn unauthorized(&self, reason: String) -> RegistryError {
        RegistryError::Unauthorized {
            host: self.host(),
            repository: self.name.repository().to_owned(),
            reason,
        }
    }

    /// The error for a status.
    fn refused(&self, status: u16, what: &str, response: Response<Body>) -> RegistryError {
        let said = said(response);
        let (host, repository) = (self.host(), self.name.repository().to_owned());
        match status {
            401 | 403 => {
                let found = self.found.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let place = found.map(|found| match found.credentials {
                    Some(_) => format!("the credentials of {} do not suffice", found.place),
                    None => format!("there are no credentials in {}", found.place),
                });
                let reasons: Vec<String> = said.into_iter().chain(place).collect();
                let reason = if reasons.is_empty() { format!("status {status}") } else { reasons.join(", ") };
                self.unauthorized(reason)
            }
            404 => RegistryError::NotFound { host, repository, what: what.to_owned() },
            _ => {
                let reason = said.map(|said| format!(": {said}")).unwrap_or_default();
                RegistryError::Status { host, repository, what: what.to_owned(), status, reason }
            }
        }
    }

    /// The header with which the challenge of a reply is met.
    fn authorize(&self, response: Response<Body>) -> Result<HeaderValue, RegistryError> {
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let found = self.found()?;
        let bearer = challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        let value = if let Some((realm, service, scope)) = bearer {
            format!("Bearer {}", self.token(realm, service.as_deref(), scope.as_deref(), &found)?)
        } else if challenges.contains(&Challenge::Basic) {
            match found.credentials.as_ref().and_then(Credentials::basic) {
                Some(basic) => basic,
                None => return Err(self.refused(401, "it", response)),
            }
        } else {
            return Err(self.unauthorized("it names no way to log in that is supported here".to_owned()));
        };
        let mut value = HeaderValue::from_str(&value)
            .map_err(|_| self.invalid("a token", "it has other characters than a header may have"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// The credentials; looked for once.
    fn found(&self) -> Result<Arc<Found>, RegistryError> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &*found {
            return Ok(Arc::clone(found));
        }
        Ok(Arc::clone(found.insert(Arc::new(credentials::find(&self.name)?))))
    }

    /// Gets a token from a service.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        found: &Found,
    ) -> Result<String, RegistryError> {
        const WHAT: &str = "a token";
        let own = format!("repository:{}:pull", self.name.repository());
        let scope = scope.unwrap_or(&own);
        let url = absolute(realm).ok_or_else(|| self.invalid(WHAT, "its token service has no usable URL"))?;
        if !is_tls(&url) && !self.plain_http {
            return Err(self.invalid(WHAT, "its token service does not use TLS"));
        }
        let response = match &found.credentials {
            Some(Credentials::Identity(token)) => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token),
                    ("client_id", CLIENT_ID),
                    ("service", service.unwrap_or_default()),
                    ("scope", scope),
                ];
                self.transport.post(&url, WHAT, &form)?
            }
            other => {
                let mut query = vec![("scope", scope)];
                query.extend(service.map(|service| ("service", service)));
                let url = with_query(&url, &query)
                    .ok_or_else(|| self.invalid(WHAT, "its token service has no usable URL"))?;
                let basic = other.as_ref().and_then(Credentials::basic);
                let authorization = basic.as_deref().map(HeaderValue::from_str).transpose();
                let mut authorization =
                    authorization.map_err(|_| self.unauthorized("a password has a line end".to_owned()))?;
                if let Some(authorization) = &mut authorization {
                    authorization.set_sensitive(true);
                }
                let request = Request { url, what: WHAT, accept: None, authorization, from: 0 };
                patiently(|| self.transport.get(&request))?
            }
        };
        let service = host_of(&url);
        match response.status().as_u16() {
            200 => {}
            status @ (400 | 401 | 403) => {
                let place = match found.credentials {
                    Some(_) => format!("refused the credentials of {}", found.place),
                    None => {
                        format!("gives no token without credentials, and there are none in {}", found.place)
                    }
                };
                let said = said(response).map(|said| format!(": {said}")).unwrap_or_default();
                return Err(
                    self.unauthorized(format!("its token service {service} {place} (status {status}{said})"))
                );
            }
            status => return Err(self.refused(status, WHAT, response)),
        }
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(MAX_TOKEN + 1).read_to_end(&mut bytes);
        read.map_err(|source| RegistryError::Connect { host: service.clone(), source })?;
        if bytes.len() as u64 > MAX_TOKEN {
            let reason = format!("more than {MAX_TOKEN} bytes");
            return Err(RegistryError::Limit { host: service, what: WHAT.to_owned(), reason });
        }
        let invalid = || RegistryError::Protocol {
            host: service.clone(),
            what: WHAT.to_owned(),
            reason: "it is not the expected JSON".to_owned(),
        };
        let token: Token = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
        token.token.or(token.access_token).filter(|token| !token.is_empty()).ok_or_else(invalid)
    }
}

/// Makes a request again whose connection is lost.
fn patiently<T>(request: impl Fn() -> Result<T, RegistryError>) -> Result<T, RegistryError> {
    let mut attempt = 1;
    loop {
        match request() {
            Err(RegistryError::Connect { source, .. }) if attempt < ATTEMPTS && is_lost(&source) => {
                thread::sleep(PAUSE * attempt);
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// Whether an established connection ended.
fn is_lost(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
    )
}

/// What the text of an error says.
fn said(response: Response<Body>) -> Option<String> {
    let mut bytes = Vec::new();
    // What was read before an error says something, too.
    let _ = response.into_body().into_reader().take(MAX_REASON).read_to_end(&mut bytes);
    if let Ok(errors) = serde_json::from_slice::<Errors>(&bytes) {
        let ErrorEntry { code, message } = errors.errors.into_iter().next()?;
        let text = if message.is_empty() { code } else { message };
        return (!text.is_empty()).then(|| shown(&text));
    }
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    // A page of a proxy says nothing in its first line.
    (!line.starts_with('<') && !line.starts_with('{')).then(|| shown(line))
}

/// A URL with more parameters.
fn with_query(url: &Uri, parameters: &[(&str, &str)]) -> Option<Uri> {
    let mut text = url.to_string();
    for (name, value) in parameters {
        text.push(if text.contains('?') { '&' } else { '?' });
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
                text.push(char::from(byte));
            } else {
                // Writing to a String cannot fail.
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    absolute(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_escaped_and_appended() {
        let url = |text: &str| text.parse::<Uri>().unwrap();
        let with = |text| with_query(&url(text), &[("scope", "repository:a/b:pull"), ("service", "x&y=z é")]);
        let query = "scope=repository%3Aa%2Fb%3Apull&service=x%26y%3Dz%20%C3%A9";
        assert_eq!(with("https://a.x/t").unwrap().to_string(), format!("https://a.x/t?{query}"));
        assert_eq!(with("https://a.x/t?c=d").unwrap().to_string(), format!("https://a.x/t?c=d&{query}"));
    }
}
