//! HTTP/1.1 with and without TLS, through proxies, redirects followed.
//!
//! ```text
//!   Request ─► agent of the route (direct, a proxy) ─► reply ─ redirect? ─► again, at most 10 times
//!                                                                  without Authorization to another host, never from TLS to HTTP
//! ```
//!
//! Connecting takes 30 seconds at most, and each read and write a minute, whatever the size of a body. Called by `client`.

use crate::{RegistryError, proxy::Proxies};
use oci_image::shown;
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use ureq::{
    Agent, Body,
    http::{
        HeaderValue, Response, Uri,
        header::{ACCEPT, AUTHORIZATION, LOCATION, RANGE},
    },
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 10;
/// Longest time for a connection, TLS and proxy included.
const CONNECT: Duration = Duration::from_secs(30);
/// Longest time without a byte.
const STALL: Duration = Duration::from_mins(1);
/// Bytes of a file with certificates.
const MAX_CERTIFICATES: u64 = 4 << 20;
/// The name under which requests are made.
const USER_AGENT: &str = concat!("lcow-graphdriver/", env!("CARGO_PKG_VERSION"));

/// A request for something.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// Where.
    pub(crate) url: Uri,
    /// How messages name it.
    pub(crate) what: &'a str,
    /// Media types that are accepted.
    pub(crate) accept: Option<&'a str>,
    /// The value of the header, for the host of the URL only.
    pub(crate) authorization: Option<HeaderValue>,
    /// Offset of the first byte.
    pub(crate) from: u64,
}

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Route {
    Direct,
    HttpProxy,
    HttpsProxy,
}

/// Connections.
#[derive(Debug)]
pub(crate) struct Transport {
    ca: Option<PathBuf>,
    proxies: Proxies,
    /// By route, and whether they can speak TLS.
    agents: Mutex<HashMap<(Route, bool), Agent>>,
}

impl Transport {
    /// Connections that trust the authorities of the file `ca`, too.
    pub(crate) fn new(ca: Option<PathBuf>) -> Result<Self, RegistryError> {
        Ok(Self { ca, proxies: Proxies::from_environment()?, agents: Mutex::default() })
    }

    /// Sends a GET and follows redirects.
    pub(crate) fn get(&self, request: &Request<'_>) -> Result<Response<Body>, RegistryError> {
        let mut url = request.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut builder = self.agent(&url)?.get(url.clone());
            if let Some(accept) = request.accept {
                builder = builder.header(ACCEPT, accept);
            }
            if let Some(authorization) = &request.authorization
                && is_same_host(&url, &request.url)
            {
                builder = builder.header(AUTHORIZATION, authorization);
            }
            if request.from > 0 {
                builder = builder.header(RANGE, format!("bytes={}-", request.from));
            }
            let response = builder.call().map_err(|e| failure(&url, request.what, e))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| resolve(&url, location));
            let invalid = |reason: &str| RegistryError::Protocol {
                host: host_of(&url),
                what: request.what.to_owned(),
                reason: reason.to_owned(),
            };
            let next = next.ok_or_else(|| invalid("a redirect without a usable location"))?;
            if is_tls(&url) && !is_tls(&next) {
                return Err(invalid("a redirect from HTTPS to HTTP"));
            }
            url = next;
        }
        Err(RegistryError::Limit {
            host: host_of(&request.url),
            what: request.what.to_owned(),
            reason: format!("more than {MAX_REDIRECTS} redirects"),
        })
    }

    /// Sends a form; redirects are not followed.
    pub(crate) fn post(
        &self,
        url: &Uri,
        what: &str,
        form: &[(&str, &str)],
    ) -> Result<Response<Body>, RegistryError> {
        let sent = self.agent(url)?.post(url.clone()).send_form(form.iter().copied());
        sent.map_err(|e| failure(url, what, e))
    }

    /// The agent for a host.
    fn agent(&self, url: &Uri) -> Result<Agent, RegistryError> {
        let tls = is_tls(url);
        let (route, proxy) = match (self.proxies.is_direct(url.host().unwrap_or_default(), port_of(url)), tls)
        {
            (true, _) => (Route::Direct, None),
            (false, true) => (Route::HttpsProxy, self.proxies.https.clone()),
            (false, false) => (Route::HttpProxy, self.proxies.http.clone()),
        };
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(&(route, tls)) {
            return Ok(agent.clone());
        }
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(proxy)
            .user_agent(USER_AGENT)
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(STALL))
            .timeout_per_write(Some(STALL));
        if tls {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let tls = TlsConfig::builder()
                .root_certs(RootCerts::from(self.roots()?))
                .unversioned_rustls_crypto_provider(provider);
            config = config.tls_config(tls.build());
        }
        let agent = config.build().new_agent();
        agents.insert((route, tls), agent.clone());
        Ok(agent)
    }

    /// The certificates of trusted authorities.
    fn roots(&self) -> Result<Vec<Certificate<'static>>, RegistryError> {
        let system = rustls_native_certs::load_native_certs();
        let mut roots: Vec<_> =
            system.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        if let Some(path) = &self.ca {
            let unusable = |reason: String| RegistryError::Configuration {
                what: format!("the certificates in {}", path.display()),
                reason,
            };
            let mut pem = Vec::new();
            File::open(path)
                .and_then(|file| file.take(MAX_CERTIFICATES).read_to_end(&mut pem))
                .map_err(|e| unusable(e.to_string()))?;
            let before = roots.len();
            for item in parse_pem(&pem) {
                if let PemItem::Certificate(certificate) =
                    item.map_err(|_| unusable("they are not written as PEM".to_owned()))?
                {
                    roots.push(certificate);
                }
            }
            if roots.len() == before {
                return Err(unusable("there are none; expected PEM".to_owned()));
            }
        }
        if roots.is_empty() {
            return Err(RegistryError::Configuration {
                what: "the system's certificates of authorities".to_owned(),
                reason: "there are none; install them, or name a file with --ca".to_owned(),
            });
        }
        Ok(roots)
    }
}

/// Host and port of a URL, for messages.
pub(crate) fn host_of(url: &Uri) -> String {
    url.authority().map(|authority| shown_bare(authority.as_str())).unwrap_or_default()
}

/// Foreign text without quotation marks if it has nothing to escape.
fn shown_bare(text: &str) -> String {
    let quoted = shown(text);
    if quoted == format!("\"{text}\"") { text.to_owned() } else { quoted }
}

/// Whether a URL is one of HTTPS.
pub(crate) fn is_tls(url: &Uri) -> bool {
    url.scheme_str() == Some("https")
}

fn port_of(url: &Uri) -> u16 {
    url.port_u16().unwrap_or(if is_tls(url) { 443 } else { 80 })
}

/// Whether two URLs lead to the same server.
fn is_same_host(a: &Uri, b: &Uri) -> bool {
    let host = |url: &Uri| url.host().unwrap_or_default().to_ascii_lowercase();
    a.scheme() == b.scheme() && host(a) == host(b) && port_of(a) == port_of(b)
}

/// A URL with scheme and host that this client can use: no names or passwords in it.
pub(crate) fn absolute(text: &str) -> Option<Uri> {
    let url: Uri = text.parse().ok()?;
    let usable = matches!(url.scheme_str(), Some("http" | "https"))
        && url.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    usable.then_some(url)
}

/// The URL of a `Location` in the reply from `base`.
fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    let authority = base.authority()?;
    if location.starts_with("//") {
        return absolute(&format!("{scheme}:{location}"));
    }
    if location.starts_with('/') {
        return absolute(&format!("{scheme}://{authority}{location}"));
    }
    if location.contains("://") {
        return absolute(location);
    }
    let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
    absolute(&format!("{scheme}://{authority}{folder}/{location}"))
}

/// The error of a request.
fn failure(url: &Uri, what: &str, error: ureq::Error) -> RegistryError {
    let host = host_of(url);
    match error {
        ureq::Error::Io(e) => match e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => of_tls(host, what, tls),
            None => RegistryError::Connect { host, source: e },
        },
        ureq::Error::Rustls(tls) => of_tls(host, what, &tls),
        ureq::Error::HostNotFound => {
            RegistryError::Connect { host, source: io::Error::other("the name of the host is unknown") }
        }
        ureq::Error::ConnectProxyFailed(reason) => RegistryError::Connect {
            host,
            source: io::Error::other(format!("the proxy refused the connection: {}", shown(&reason))),
        },
        ureq::Error::Timeout(phase) => RegistryError::Connect {
            host,
            source: io::Error::new(io::ErrorKind::TimedOut, format!("no answer in time ({phase})")),
        },
        other => {
            RegistryError::Protocol { host, what: what.to_owned(), reason: shown_bare(&other.to_string()) }
        }
    }
}

/// The error of TLS.
fn of_tls(host: String, what: &str, error: &rustls::Error) -> RegistryError {
    let reason = shown_bare(&error.to_string());
    match error {
        rustls::Error::InvalidCertificate(_) => RegistryError::Certificate { host, reason },
        rustls::Error::InvalidMessage(_) => RegistryError::NoTls { host, reason },
        _ => RegistryError::Protocol { host, what: what.to_owned(), reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved_and_never_have_passwords() {
        let base: Uri = "https://h.x:5000/v2/a/blobs/b?c=d".parse().unwrap();
        for (location, expected) in [
            ("https://other.x/y?z=1", Some("https://other.x/y?z=1")),
            ("//other.x/y", Some("https://other.x/y")),
            ("/y?z", Some("https://h.x:5000/y?z")),
            ("y", Some("https://h.x:5000/v2/a/blobs/y")),
            ("https://user:pw@other.x/", None),
            ("ftp://other.x/", None),
            ("file:///etc/passwd", None),
            ("http://", None),
            ("a b", None),
        ] {
            assert_eq!(
                resolve(&base, location).map(|url| url.to_string()).as_deref(),
                expected,
                "{location}"
            );
        }
    }

    #[test]
    fn credentials_stay_with_scheme_host_and_port() {
        let url = |text: &str| text.parse::<Uri>().unwrap();
        let base = url("https://h.x/v2/");
        for (other, same) in [
            ("https://h.x/other", true),
            ("https://H.x:443/", true),
            ("https://h.x:444/", false),
            ("http://h.x/", false),
            ("https://h.x.evil/", false),
            ("https://a.h.x/", false),
        ] {
            assert_eq!(is_same_host(&url(other), &base), same, "{other}");
        }
    }
}
