//! Regular expressions as Go's `regexp` reads them, run by the crate `regex`.
//!
//! Both descend from RE2 and run in linear time, but some text means different things:
//!
//! | text | Go | the crate |
//! |---|---|---|
//! | `\d \s \w \b` | ASCII | Unicode |
//! | `[[a]`, `[a&&b]`, `[a--b]` | a class with `[`, `&` or `-` in it | nested classes, set operations |
//! | `a{`, `a{,2}` | literal | an error, or a repetition |
//! | `\<`, `\Q…\E`, `\101`, `\p{^L}` | `<`, a literal, `A`, `\P{L}` | a word's start, errors |
//! | `a**`, `(?x)`, `a{1001}` | errors | allowed |
//!
//! So the text is read by Go's rules and written anew, each literal as `\x{…}`:
//!
//! ```text
//!   Go's text ─► atoms, classes, groups, repetitions ─► the crate's text ─► regex::bytes::Regex
//! ```
//!
//! What stays different: a repetition right behind `(?i)` is an error, where Go repeats what precedes the flags; `\B` also
//! holds between the bytes of a character; names of Unicode properties are compared as the crate does; names of groups,
//! which nothing here uses, are dropped and may occur twice.
//!
//! Called by `filter`.

use regex::bytes::{Regex, RegexBuilder};
use std::fmt::Write as _;

/// Bytes of one expression.
pub const MAX_PATTERN: usize = 4 << 10;
/// Greatest number of a repetition, as in Go.
const MAX_REPEAT: u32 = 1000;
/// Bytes of a compiled expression; `(a{100}){100}` has about half of it.
const MAX_COMPILED: usize = 1 << 20;
/// Groups and repetitions inside of each other.
const MAX_DEPTH: u32 = 100;
/// POSIX classes, which both know.
const POSIX: &[&str] = &[
    "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space",
    "upper", "word", "xdigit",
];

/// Why a regular expression is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// More than `MAX_PATTERN` bytes.
    #[error("a regular expression may have at most {MAX_PATTERN} bytes")]
    TooLong,
    /// Bytes that are not UTF-8.
    #[error("the regular expression is not UTF-8")]
    Encoding,
    /// Go refuses it as well.
    #[error("the regular expression breaks Go's syntax at its offset {0}")]
    Syntax(usize),
    /// Too large when it is compiled, too deep, or a property of Unicode that is unknown.
    #[error("the regular expression is too large, too deep or names an unknown character class")]
    Unsupported,
}

/// A compiled expression.
#[derive(Debug)]
pub(super) struct Pattern(Regex);

impl Pattern {
    /// Compiles an expression of Go's syntax.
    pub(super) fn compile(text: &[u8]) -> Result<Self, PatternError> {
        if text.len() > MAX_PATTERN {
            return Err(PatternError::TooLong);
        }
        let text = std::str::from_utf8(text).map_err(|_| PatternError::Encoding)?;
        let compiled = RegexBuilder::new(&translated(text)?)
            .size_limit(MAX_COMPILED)
            .dfa_size_limit(MAX_COMPILED)
            .nest_limit(MAX_DEPTH)
            .build();
        Ok(Self(compiled.map_err(|_| PatternError::Unsupported)?))
    }

    /// Whether it is found anywhere in a value.
    pub(super) fn finds(&self, value: &[u8]) -> bool {
        self.0.is_match(value)
    }
}

/// An expression in the crate's syntax.
fn translated(text: &str) -> Result<String, PatternError> {
    let mut translator = Translator { rest: text, out: String::with_capacity(4 * text.len()) };
    translator.all().ok_or_else(|| PatternError::Syntax(text.len() - translator.rest.len()))?;
    Ok(translator.out)
}

/// What precedes a repetition operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Atom,
    Repetition,
}

/// What a brace begins.
enum Brace {
    /// Only itself.
    Literal,
    /// A repetition: the operator.
    Times(String),
    /// A repetition that is too large or backwards.
    Invalid,
}

struct Translator<'a> {
    rest: &'a str,
    out: String,
}

/// A character of a class, or a set of them.
enum Item {
    One(char),
    /// In the crate's syntax.
    Set(String),
}

impl Translator<'_> {
    fn take(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    /// Text up to a mark, which is skipped.
    fn until(&mut self, mark: &str) -> Option<String> {
        let (text, rest) = self.rest.split_once(mark)?;
        let text = text.to_owned();
        self.rest = rest;
        Some(text)
    }

    fn literal(&mut self, c: char) {
        self.out.push_str(&hex(c));
    }

    /// Everything; `None` if it breaks Go's syntax, close to where the rest begins. Parentheses that do not match are left
    /// to the crate.
    fn all(&mut self) -> Option<()> {
        let mut before = Before::Nothing;
        while !self.rest.is_empty() {
            let at = self.rest;
            if self.take("\\Q") {
                let end = self.rest.find("\\E");
                let text = self.rest[..end.unwrap_or(self.rest.len())].to_owned();
                self.rest = end.map_or("", |end| &self.rest[end + 2..]);
                for c in text.chars() {
                    self.literal(c);
                    before = Before::Atom;
                }
                continue;
            }
            before = match self.next()? {
                c @ ('(' | '|') => {
                    if c == '(' && self.take("?") {
                        self.group()?
                    } else {
                        self.out.push(c);
                        Before::Nothing
                    }
                }
                c @ (')' | '^' | '$' | '.') => {
                    self.out.push(c);
                    Before::Atom
                }
                c @ ('*' | '+' | '?') => {
                    self.repetition(before, c.encode_utf8(&mut [0; 4]))?;
                    Before::Repetition
                }
                '{' => match self.brace() {
                    Brace::Literal => {
                        self.literal('{');
                        Before::Atom
                    }
                    Brace::Times(operator) => {
                        self.repetition(before, &operator)?;
                        Before::Repetition
                    }
                    Brace::Invalid => return None,
                },
                '[' => {
                    self.class().or_else(|| {
                        self.rest = at;
                        None
                    })?;
                    Before::Atom
                }
                '\\' => {
                    self.backslash()?;
                    Before::Atom
                }
                c => {
                    self.literal(c);
                    Before::Atom
                }
            };
        }
        Some(())
    }

    /// Writes a repetition operator, with the `?` that makes it lazy.
    fn repetition(&mut self, before: Before, operator: &str) -> Option<()> {
        if before != Before::Atom {
            return None;
        }
        self.out.push_str(operator);
        if self.take("?") {
            self.out.push('?');
        }
        Some(())
    }

    /// What follows `{`; only a repetition is skipped.
    fn brace(&mut self) -> Brace {
        let number = |text: &str| {
            let canonical = !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_digit())
                && (text.len() == 1 || !text.starts_with('0'));
            canonical.then(|| text.parse::<u32>().unwrap_or(u32::MAX))
        };
        let Some((inside, rest)) = self.rest.split_once('}') else { return Brace::Literal };
        let (least, most) = match inside.split_once(',') {
            None => (number(inside), Some(number(inside))),
            Some((least, "")) => (number(least), None),
            Some((least, most)) => (number(least), Some(number(most))),
        };
        let (Some(least), Some(most)) = (least, most.unwrap_or(Some(MAX_REPEAT))) else {
            return Brace::Literal;
        };
        self.rest = rest;
        if least <= most && most <= MAX_REPEAT {
            Brace::Times(format!("{{{inside}}}"))
        } else {
            Brace::Invalid
        }
    }

    /// What follows `(?`.
    fn group(&mut self) -> Option<Before> {
        if self.take("P<") || self.take("<") {
            let name = self.until(">")?;
            if name.is_empty() || !name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()) {
                return None;
            }
            self.out.push('(');
            return Some(Before::Nothing);
        }
        let (mut on, mut off) = (String::new(), String::new());
        let (mut negated, mut some) = (false, false);
        loop {
            match self.next()? {
                c @ ('i' | 'm' | 's' | 'U') => {
                    // The crate refuses a flag that occurs twice; here the last one counts.
                    on.retain(|flag| flag != c);
                    off.retain(|flag| flag != c);
                    if negated { &mut off } else { &mut on }.push(c);
                    some = true;
                }
                '-' if !negated => (negated, some) = (true, false),
                c @ (':' | ')') if some || !negated => {
                    let minus = if off.is_empty() { "" } else { "-" };
                    // The crate has no `(?)`, which does nothing.
                    if c == ':' || !(on.is_empty() && off.is_empty()) {
                        let _ = write!(self.out, "(?{on}{minus}{off}{c}");
                    }
                    return Some(Before::Nothing);
                }
                _ => return None,
            }
        }
    }

    /// What follows a backslash outside of a class.
    fn backslash(&mut self) -> Option<()> {
        match self.rest.chars().next()? {
            c @ ('A' | 'z') => {
                self.next();
                self.out.push('\\');
                self.out.push(c);
            }
            c @ ('b' | 'B') => {
                self.next();
                let _ = write!(self.out, "(?-u:\\{c})");
            }
            _ => match self.escape()? {
                Item::One(c) => self.literal(c),
                Item::Set(set) => self.out.push_str(&set),
            },
        }
        Some(())
    }

    /// What follows a backslash, in and outside of a class.
    fn escape(&mut self) -> Option<Item> {
        let set = |text: &str| Some(Item::Set(text.to_owned()));
        let one = |c: u8| Some(Item::One(c.into()));
        match self.next()? {
            'd' => set("[0-9]"),
            'D' => set("[^0-9]"),
            's' => set(r"[\t\n\f\r ]"),
            'S' => set(r"[^\t\n\f\r ]"),
            'w' => set("[0-9A-Za-z_]"),
            'W' => set("[^0-9A-Za-z_]"),
            c @ ('p' | 'P') => self.property(c),
            'a' => one(0x07),
            'f' => one(0x0c),
            'n' => one(b'\n'),
            'r' => one(b'\r'),
            't' => one(b'\t'),
            'v' => one(0x0b),
            'x' => self.hexadecimal().map(Item::One),
            c @ '0'..='7' => {
                let more = self.rest.bytes().take(2).take_while(|b| matches!(b, b'0'..=b'7')).count();
                // A single digit other than 0 refers back to a group, which RE2 does not have.
                if c != '0' && more == 0 {
                    return None;
                }
                let (digits, rest) = self.rest.split_at(more);
                self.rest = rest;
                let number = digits.bytes().fold(c.to_digit(8)?, |n, b| n * 8 + u32::from(b - b'0'));
                char::from_u32(number).map(Item::One)
            }
            c if c.is_ascii() && !c.is_ascii_alphanumeric() => Some(Item::One(c)),
            _ => None,
        }
    }

    /// What follows `\x`.
    fn hexadecimal(&mut self) -> Option<char> {
        let digits = if self.take("{") {
            self.until("}")?
        } else {
            let (digits, rest) = self.rest.split_at_checked(2)?;
            let digits = digits.to_owned();
            self.rest = rest;
            digits
        };
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        // A surrogate is a number to Go that no text can hold.
        let number = u32::from_str_radix(&digits, 16).ok().filter(|_| plain)?;
        char::from_u32(number)
    }

    /// What follows `\p` or `\P`.
    fn property(&mut self, letter: char) -> Option<Item> {
        let name = if self.take("{") { self.until("}")? } else { self.next()?.to_string() };
        let (negated, name) = name.strip_prefix('^').map_or((false, name.as_str()), |name| (true, name));
        if name.is_empty() || !name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()) {
            return None;
        }
        let letter = if negated == (letter == 'p') { 'P' } else { 'p' };
        Some(Item::Set(format!("\\{letter}{{{name}}}")))
    }

    /// What follows `[`.
    fn class(&mut self) -> Option<()> {
        let mut class = String::from(if self.take("^") { "[^" } else { "[" });
        let mut first = true;
        while first || !self.rest.starts_with(']') {
            first = false;
            if self.rest.strip_prefix("[:").is_some_and(|rest| rest.contains(":]")) {
                self.take("[:");
                let name = self.until(":]")?;
                if !POSIX.contains(&name.strip_prefix('^').unwrap_or(&name)) {
                    return None;
                }
                let _ = write!(class, "[:{name}:]");
                continue;
            }
            let low = match self.item()? {
                Item::Set(set) => {
                    class.push_str(&set);
                    continue;
                }
                Item::One(low) => low,
            };
            let mut high = low;
            if self.rest.len() > 1 && self.rest.starts_with('-') && !self.rest.starts_with("-]") {
                self.take("-");
                match self.item()? {
                    Item::One(end) if end >= low => high = end,
                    _ => return None,
                }
            }
            let _ = write!(class, "{}-{}", hex(low), hex(high));
        }
        self.take("]");
        class.push(']');
        self.out.push_str(&class);
        Some(())
    }

    /// One character or set of a class.
    fn item(&mut self) -> Option<Item> {
        if self.take("\\") { self.escape() } else { self.next().map(Item::One) }
    }
}

/// A character that means only itself, in and outside of a class.
fn hex(c: char) -> String {
    format!("\\x{{{:x}}}", u32::from(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expression, value, and whether Go finds it. Checked against Go's `regexp` (1.19; `(?<m>` is of 1.22).
    const FOUND: &[(&str, &str, bool)] = &[
        ("", "x", true),
        ("b", "abc", true),
        ("^b", "abc", false),
        ("^a.c$", "a\nc", false),
        ("(?s)^a.c$", "a\nc", true),
        ("(?m)^b$", "a\nb\nc", true),
        ("b$", "ab\n", false),
        ("(?i)ABC", "xabcx", true),
        ("(?i:A)b", "aB", false),
        ("(?i-i)A", "a", false),
        ("(?U)a+?b", "aab", true),
        ("(?)a", "a", true),
        ("(?P<n>a)(?<m>b)", "ab", true),
        // ASCII only.
        (r"^\d$", "7", true),
        (r"^\d$", "\u{0667}", false),
        (r"^\D$", "\u{0667}", true),
        (r"^\w$", "ä", false),
        (r"^\W$", "ä", true),
        (r"^\s$", "\u{a0}", false),
        (r"^\s$", "\u{b}", false),
        (r"^\S$", "\u{b}", true),
        (r"ä\b", "äb", true),
        (r"a\b", "äa ", true),
        (r"a\B", "ab", true),
        (r"^[\d\s_]+$", "1 _", true),
        (r"^[^\W]$", "ä", false),
        (r"^[\D]$", "x", true),
        ("^.$", "ä", true),
        (r"^\p{Greek}$", "α", true),
        (r"^\p{^Greek}$", "α", false),
        (r"^\P{^Greek}$", "α", true),
        (r"^\pL\PL$", "ä1", true),
        (r"^[\pL-]+$", "ä-", true),
        // Classes without set operations.
        ("^[[a]$", "[", true),
        ("^[a&&b]+$", "&a", true),
        ("^[+--]$", ",", true),
        ("^[a-c-e]+$", "b-e", true),
        ("^[]a]+$", "]a", true),
        ("^[^]a]$", "]", false),
        ("^[-a]+$", "-a", true),
        ("^[a-]+$", "-a", true),
        ("^[a~~b]+$", "~", true),
        ("^[[:alpha:]]+$", "az", true),
        ("^[[:^alpha:]1]+$", "-1", true),
        ("^[^[:space:]]$", " ", false),
        ("^[[:]$", ":", true),
        (r"^[\x41-\x{43}]$", "B", true),
        (r"^[\]\-\\]+$", "]-\\", true),
        ("^[^a]$", "\n", true),
        // Braces.
        ("^a{2}$", "aa", true),
        ("^a{2,}$", "aaaa", true),
        ("^a{1,2}?$", "aa", true),
        ("^a{,2}$", "a{,2}", true),
        ("^a{$", "a{", true),
        ("^a{02}$", "a{02}", true),
        ("^a{x}$", "a{x}", true),
        ("^{$", "{", true),
        ("^a}]$", "a}]", true),
        // Escapes.
        (r"^\Qa.b*\E+$", "a.b**", true),
        (r"^\Qa.b", "a.b", true),
        (r"^\Qa\\E$", "a\\", true),
        (r"^\<\>\_\-\/\ $", "<>_-/ ", true),
        (r"^\101\0\07$", "A\0\u{7}", true),
        (r"^\377$", "ÿ", true),
        (r"^\a\f\t\n\r\v$", "\u{7}\u{c}\t\n\r\u{b}", true),
        (r"\Aab\z", "ab", true),
        ("#x y", "a#x y", true),
        ("a|b|", "", true),
        ("()", "", true),
        ("^*a", "ba", true),
    ];

    /// What Go refuses as well.
    const REFUSED: &[&str] = &[
        "(",
        ")",
        "a)",
        "[",
        "[a",
        "[z-a]",
        r"[a-\d]",
        "*",
        "a**",
        "a*+",
        "a???",
        "a{2}{3}",
        "(*)",
        "|*",
        "a{1001}",
        "a{2,1}",
        "a{0,1001}",
        "(?x)a",
        "(?u)a",
        "(?R)a",
        "(?-)a",
        "(?i-)a",
        "(?=a)",
        "(?<=a)",
        "(?P=n)",
        "(?P<n-m>a)",
        "(?<>a)",
        r"\1",
        r"\8",
        r"\q",
        r"\Z",
        r"\C",
        r"\G",
        r"\k<n>",
        r"\x",
        r"\x4",
        r"\xg0",
        r"\x{}",
        r"\x{110000}",
        r"\x{+41}",
        r"\p",
        r"\p{}",
        r"\p{Nope}",
        r"\",
        "[[:nope:]]",
        r"\ä",
        r"[\b]",
        "(?i",
        "(?P<n",
    ];

    #[test]
    fn expressions_mean_what_they_mean_in_go() {
        for (text, value, found) in FOUND {
            let pattern = Pattern::compile(text.as_bytes());
            let pattern = pattern.unwrap_or_else(|e| panic!("{text}: {e}: {:?}", translated(text)));
            assert_eq!(pattern.finds(value.as_bytes()), *found, "{text} in {value:?}: {pattern:?}");
        }
    }

    #[test]
    fn what_go_refuses_is_refused() {
        for text in REFUSED {
            let compiled = Pattern::compile(text.as_bytes());
            let refused = matches!(compiled, Err(PatternError::Syntax(_) | PatternError::Unsupported));
            assert!(refused, "{text}: {compiled:?}");
        }
    }
}
