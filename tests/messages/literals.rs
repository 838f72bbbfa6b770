//! Finds the string literals of a Rust source that are messages.
//!
//! A literal is a message if it stands in `#[error(…)]` or in a macro of tracing, or if it has two blanks or more between
//! words. Comments, byte strings, character literals and the test module at the end of a file are passed over.

/// Macros of tracing, and the attribute of thiserror.
const ALWAYS: [&str; 6] = ["error!", "warn!", "info!", "debug!", "trace!", "#[error"];

/// The messages of a source, in its order, each on one line: line ends and control characters are escaped.
pub(crate) fn messages(source: &str) -> Vec<String> {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let mut scanner = Scanner { rest: source, code: String::new(), calls: Vec::new(), found: Vec::new() };
    while scanner.step() {}
    scanner.found
}

struct Scanner<'a> {
    rest: &'a str,
    /// The code before `rest` since the last opening bracket; literals are empty in it.
    code: String,
    /// For each open parenthesis: whether it belongs to one of [`ALWAYS`].
    calls: Vec<bool>,
    found: Vec<String>,
}

impl Scanner<'_> {
    /// Passes over one token; false at the end.
    fn step(&mut self) -> bool {
        let Some(c) = self.rest.chars().next() else { return false };
        if self.rest.starts_with("//") {
            self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
        } else if self.rest.starts_with("/*") {
            self.skip(self.rest.find("*/").map_or(self.rest.len(), |at| at + 2));
        } else if c == '"' {
            let byte = self.code.ends_with('b') && !self.code.trim_end_matches('b').ends_with(is_name);
            self.skip(1);
            let text = self.string();
            self.take(&text, byte);
        } else if let Some((prefix, hashes)) = raw_string(self.rest)
            && !self.code.ends_with(is_name)
        {
            let end = format!("\"{}", "#".repeat(hashes));
            self.skip(prefix + hashes + 1);
            let at = self.rest.find(&end).unwrap_or(self.rest.len());
            let text = &self.rest[..at];
            self.skip((at + end.len()).min(self.rest.len()));
            self.take(text, prefix == 2);
        } else if c == '\'' {
            self.skip(character(self.rest));
        } else {
            match c {
                '(' => {
                    let code = self.code.trim_end();
                    let named = |name: &&str| {
                        code.strip_suffix(*name).is_some_and(|before| !before.ends_with(is_name))
                    };
                    self.calls.push(ALWAYS.iter().any(named));
                }
                ')' => {
                    self.calls.pop();
                }
                _ => {}
            }
            self.code.push(c);
            if self.code.len() > 64 {
                let from = self.code.char_indices().rev().nth(31).map_or(0, |(at, _)| at);
                self.code.drain(..from);
            }
            self.skip(c.len_utf8());
        }
        true
    }

    fn skip(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }

    /// Reads a string literal after its opening quote, with its escapes resolved.
    fn string(&mut self) -> String {
        let mut text = String::new();
        let mut chars = self.rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    return text;
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    // A continued line: its indentation is not part of the text.
                    Some((at, '\n')) => {
                        let blanks = self.rest[at + 1..].chars().take_while(|c| c.is_whitespace()).count();
                        for _ in 0..blanks {
                            chars.next();
                        }
                    }
                    Some((_, quoted @ ('"' | '\\' | '\''))) => text.push(quoted),
                    Some((_, other)) => text.extend(['\\', other]),
                    None => {}
                },
                c => text.push(c),
            }
        }
        self.rest = "";
        text
    }

    fn take(&mut self, text: &str, byte: bool) {
        self.code.push('"');
        // Names of variables and texts of placeholders alone say nothing.
        let says = text.split('{').any(|part| {
            part.split_once('}').map_or(part, |(_, after)| after).contains(|c: char| c.is_lowercase())
        });
        let always = self.calls.contains(&true) && says;
        let words = text.split(' ').filter(|word| !word.is_empty()).count();
        if !byte && (always || words >= 3) {
            let line = text.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t");
            self.found.push(line);
        }
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of the prefix and number of `#` of a raw string that begins here: `r"`, `r#"`, `br"`.
fn raw_string(rest: &str) -> Option<(usize, usize)> {
    let prefix = ["br", "r"].into_iter().find(|prefix| rest.starts_with(prefix))?.len();
    let hashes = rest[prefix..].bytes().take_while(|byte| *byte == b'#').count();
    rest[prefix + hashes..].starts_with('"').then_some((prefix, hashes))
}

/// Length of a character literal, or of the quote of a lifetime.
fn character(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            chars.next();
            chars.find(|(_, c)| *c == '\'').map_or(rest.len(), |(at, _)| at + 1)
        }
        Some(_) => match chars.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

#[test]
fn messages_are_told_from_other_text() {
    let source = r##"
        //! Not "this one at all".
        #[error("bad: {0}")]
        fn f<'a>(c: char) -> &'a str {
            let _ = (c == '"', c == '\'', c == '\u{22}', b"bytes are no message", br"nor are these bytes");
            tracing::warn!(path = "x", error = %e.display(), "lost");
            /* "a comment of words" */
            let _ = ("two words", "three \
                words here", r#"a "raw" one of them"#, "a\nb c d");
            raw_error!("short");
        }
        #[cfg(test)]
mod tests { "none of these words" }
    "##;
    let expected = ["bad: {0}", "x", "lost", "three words here", "a \"raw\" one of them", "a\\nb c d"];
    assert_eq!(messages(source), expected);
}
