//! Which proxy leads to a host: `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, by the rules of Go's `httpproxy`, which Docker
//! follows.
//!
//! ```text
//!   scheme, host ─► loopback, or in NO_PROXY? ─► none : the proxy of the scheme
//!   NO_PROXY: * │ host (and what is below it) │ .host, *.host (only what is below it) │ address │ network/bits │ each with :port
//! ```
//!
//! Capital letters win over small ones. Proxies are asked to CONNECT, for both schemes. Called by `transport`.

use crate::RegistryError;
use std::net::IpAddr;
use ureq::Proxy;

/// The proxies of the environment.
#[derive(Debug)]
pub(crate) struct Proxies {
    pub(crate) http: Option<Proxy>,
    pub(crate) https: Option<Proxy>,
    except: Vec<String>,
}

impl Proxies {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// [`RegistryError::Configuration`] for a variable that is no proxy. Its value may have a password and is not shown.
    pub(crate) fn from_environment() -> Result<Self, RegistryError> {
        Self::new(|name| std::env::var(name).ok())
    }

    fn new(variable: impl Fn(&str) -> Option<String>) -> Result<Self, RegistryError> {
        let value = |name: &str| {
            let found = variable(name).filter(|value| !value.is_empty());
            found.or_else(|| variable(&name.to_ascii_lowercase()).filter(|value| !value.is_empty()))
        };
        let proxy = |name: &str| {
            let parsed = value(name).map(|url| Proxy::new(&url)).transpose();
            parsed.map_err(|_| RegistryError::Configuration {
                what: name.to_owned(),
                reason: "expected http://HOST:PORT or https://HOST:PORT".to_owned(),
            })
        };
        let except = value("NO_PROXY").unwrap_or_default();
        Ok(Self {
            http: proxy("HTTP_PROXY")?,
            https: proxy("HTTPS_PROXY")?,
            except: except.split(',').map(|entry| entry.trim().to_ascii_lowercase()).collect(),
        })
    }

    /// Whether a host is reached directly; an address of IPv6 may be in brackets.
    pub(crate) fn is_direct(&self, host: &str, port: u16) -> bool {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let address: Option<IpAddr> = host.parse().ok();
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return true;
        }
        self.except.iter().any(|entry| matches(entry, &host, address, port))
    }
}

/// Whether an entry of NO_PROXY is about a host.
fn matches(entry: &str, host: &str, address: Option<IpAddr>, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some((network, bits)) = entry.split_once('/')
        && let (Ok(network), Ok(bits)) = (network.parse::<IpAddr>(), bits.parse::<u32>())
    {
        return address.is_some_and(|address| is_within(address, network, bits));
    }
    let (name, only) = match entry.rsplit_once(':') {
        // An address of IPv6 without brackets has colons, too.
        Some((name, digits)) if !name.contains(':') || name.ends_with(']') => {
            (name, digits.parse::<u16>().ok())
        }
        _ => (entry, None),
    };
    if only.is_some_and(|only| only != port) {
        return false;
    }
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if let Ok(named) = name.parse::<IpAddr>() {
        return address == Some(named);
    }
    let below = |name: &str| host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
    match name.strip_prefix("*.").or_else(|| name.strip_prefix('.')) {
        Some(name) => !name.is_empty() && below(name),
        None => !name.is_empty() && (host == name || below(name)),
    }
}

/// Whether an address is in a network.
fn is_within(address: IpAddr, network: IpAddr, bits: u32) -> bool {
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(bits)).unwrap_or(0);
            address.to_bits() & mask == network.to_bits() & mask
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(bits)).unwrap_or(0);
            address.to_bits() & mask == network.to_bits() & mask
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_are_those_of_the_scheme_and_loopback_has_none() {
        let proxies = Proxies::new(|name| match name {
            "HTTPS_PROXY" => Some("http://user:secret@proxy.x:3128".to_owned()),
            "http_proxy" => Some("proxy.y:80".to_owned()),
            "NO_PROXY" => {
                Some("one.x, .two.x,*.three.x,10.1.0.0/16,fd00::/8,192.0.2.7,port.x:5000".to_owned())
            }
            _ => None,
        })
        .unwrap();
        assert_eq!(proxies.https.as_ref().map(Proxy::host), Some("proxy.x"));
        assert_eq!(proxies.http.as_ref().map(Proxy::host), Some("proxy.y"));
        assert!(!format!("{proxies:?}").contains("secret"));
        for (host, direct) in [
            ("one.x", true),
            ("a.one.x", true),
            ("One.X", true),
            ("none.x", false),
            ("two.x", false),
            ("a.two.x", true),
            ("three.x", false),
            ("a.three.x", true),
            ("10.1.2.3", true),
            ("10.2.2.3", false),
            ("[fd00::1]", true),
            ("[2001:db8::1]", false),
            ("192.0.2.7", true),
            ("192.0.2.77", false),
            ("port.x", true),
            ("localhost", true),
            ("127.0.0.1", true),
            ("[::1]", true),
        ] {
            assert_eq!(proxies.is_direct(host, 5000), direct, "{host}");
        }
        assert!(!proxies.is_direct("port.x", 443));
        assert!(Proxies::new(|_| None).unwrap().https.is_none());
        let all = Proxies::new(|name| (name == "no_proxy").then(|| "*".to_owned())).unwrap();
        assert!(all.is_direct("any.x", 1));
        let bad = Proxies::new(|name| (name == "HTTPS_PROXY").then(|| "ftp://user:secret@x".to_owned()));
        let message = bad.unwrap_err().to_string();
        assert!(message.contains("HTTPS_PROXY") && !message.contains("secret"), "{message}");
    }
}
