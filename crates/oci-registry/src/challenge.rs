//! `WWW-Authenticate`: how a registry wants to be asked (RFC 9110, section 11.6.1; distribution's token specification).
//!
//! ```text
//!   Bearer realm="https://auth.example/token",service="registry",scope="repository:a/b:pull"     Basic realm="registry"
//! ```
//!
//! Called by `client`.

/// Parameters of a challenge that are read; hostile ones have no end.
const MAX_PARAMETERS: usize = 32;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// Name and password with each request.
    Basic,
    /// A token of a service.
    Bearer {
        /// URL of the service.
        realm: String,
        /// Name of the registry there.
        service: Option<String>,
        /// What the token must be for.
        scope: Option<String>,
    },
}

/// The challenges of a header's value; unknown schemes are left out.
pub(crate) fn parse(value: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = value.trim_start();
    while !rest.is_empty() {
        let (scheme, after) = token(rest);
        if scheme.is_empty() {
            break;
        }
        let (parameters, after) = parameters(after);
        let get = |name: &str| {
            parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
        };
        if scheme.eq_ignore_ascii_case("basic") {
            found.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(realm) = get("realm")
        {
            found.push(Challenge::Bearer { realm, service: get("service"), scope: get("scope") });
        }
        rest = after.trim_start_matches([' ', '\t', ',']);
    }
    found
}

/// A token, and what follows.
fn token(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)))
        .unwrap_or(text.len());
    text.split_at(end)
}

/// The parameters of a challenge, and what follows: the next scheme, or something that is no parameter.
fn parameters(text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    let mut rest = text;
    while found.len() < MAX_PARAMETERS {
        let start = rest.trim_start_matches([' ', '\t', ',']);
        let (name, after) = token(start);
        let Some(after) = after.trim_start().strip_prefix('=').map(str::trim_start) else { break };
        if name.is_empty() {
            break;
        }
        let (value, after) = if let Some(quoted) = after.strip_prefix('"') {
            let Some(read) = unquote(quoted) else { return (found, "") };
            read
        } else {
            let (value, after) = token(after);
            (value.to_owned(), after)
        };
        found.push((name.to_owned(), value));
        rest = after;
    }
    (found, rest)
}

/// The text of a quoted string behind its first quotation mark, and what follows; `None` if it has no end.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_in_all_their_forms() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        };
        for (text, expected) in [
            (r#"Basic realm="x""#, vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (
                r#"Bearer realm="https://a.x/t",service="r, q",scope="repository:a/b:pull,push""#,
                vec![bearer("https://a.x/t", Some("r, q"), Some("repository:a/b:pull,push"))],
            ),
            (r#"Bearer realm = "a\"b" , scope=c"#, vec![bearer("a\"b", None, Some("c"))]),
            (
                r#"Negotiate, Basic realm="x", Bearer realm="y""#,
                vec![Challenge::Basic, bearer("y", None, None)],
            ),
            ("Bearer service=x", vec![]),
            (r#"Bearer realm="no end"#, vec![]),
            ("=,=,\"", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
        let many = format!("Basic {}", "a=b,".repeat(10_000));
        assert!(!parse(&many).is_empty());
    }
}
