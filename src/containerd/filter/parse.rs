//! The syntax of a filter: text to selectors, without looking at a snapshot.
//!
//! ```text
//!   selectors = selector ("," selector)*            fieldpath = field ("." field)*
//!   selector  = fieldpath [operator value]          field     = [A-Za-z0-9_]+ | "…"
//!   operator  = "==" | "!=" | "~="                  value     = [^\s,]+ | "…" | /…/ or |…| behind "~="
//! ```
//!
//! Quotes hold a Go string: `\n`, `\"`, `\x41`, `\101`, `\u00e4`, `\U0001f600`. A quote that starts with `/` or `|` ends
//! with the same and has the same escapes, so a regular expression in it doubles its backslashes. A value without quotes
//! starts with neither a quote, an operator nor `.`, and may hold them. White space is allowed in front of a field, an
//! operator and a value, and nowhere else.
//!
//! The model is `pkg/filters/{scanner,parser,quote}.go` of containerd. Called by `filter`.

use super::pattern::PatternError;
use std::{borrow::Cow, iter::Peekable, str::CharIndices};

/// Bytes of one filter: twice a label's greatest size, quoted byte by byte.
pub const MAX_TEXT: usize = 32 << 10;
/// Selectors of one filter.
pub const MAX_SELECTORS: usize = 64;

/// Why a filter is refused. The filter's text is a client's and not part of the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter}, offset {offset}: {reason}")]
pub struct FilterError {
    /// Which filter of the request, counted from 0.
    pub filter: usize,
    /// Where in it, in bytes.
    pub offset: usize,
    /// What is wrong.
    pub reason: Reason,
}

/// What is wrong with a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// More than [`MAX_FILTERS`](super::MAX_FILTERS).
    #[error("a request may have at most {} filters", super::MAX_FILTERS)]
    TooManyFilters,
    /// More than `MAX_SELECTORS`.
    #[error("a filter may have at most {MAX_SELECTORS} selectors")]
    TooManySelectors,
    /// More than [`MAX_PATTERNS`](super::MAX_PATTERNS).
    #[error("a request may have at most {} regular expressions", super::MAX_PATTERNS)]
    TooManyPatterns,
    /// More than `MAX_TEXT` bytes.
    #[error("a filter may have at most {MAX_TEXT} bytes")]
    TooLong,
    /// NUL or U+FFFD, which stands for bytes that are not UTF-8.
    #[error("a NUL or replacement character is not allowed")]
    Character,
    /// Something else where a field must stand.
    #[error("a field or a quoted field is expected")]
    Field,
    /// Something else where an operator must stand.
    #[error("an operator (==, != or ~=) is expected")]
    Operator,
    /// Operator characters that are no operator.
    #[error("an operator must be ==, != or ~=")]
    UnknownOperator,
    /// Something else where a value must stand.
    #[error("a value or a quoted value is expected")]
    Value,
    /// `/` or `|` quotes something else than a regular expression.
    #[error("only the value of ~= may be quoted with / or |")]
    Quote,
    /// A quote without an end.
    #[error("a quoted text has no end")]
    Unterminated,
    /// An escape sequence that Go does not know, or whose value is too large.
    #[error("an escape sequence is invalid")]
    Escape,
    /// Text behind a complete selector.
    #[error("a comma or the end is expected")]
    Behind,
    /// The regular expression of `~=`.
    #[error(transparent)]
    Pattern(PatternError),
}

/// What a selector looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Field {
    Name,
    Parent,
    Kind,
    /// A label, by its key; a quoted key can hold any bytes.
    Label(Vec<u8>),
    /// Present in no snapshot.
    Unknown,
}

/// What a selector asks of its field. Quoted values can hold any bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    Matches(Vec<u8>),
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selector {
    pub(super) field: Field,
    pub(super) test: Test,
    /// Where the value starts, in bytes.
    pub(super) offset: usize,
}

/// Where, and what.
type Fault = (usize, Reason);

/// The selectors of a filter, all of which must hold; none for an empty text.
pub(super) fn selectors(text: &str) -> Result<Vec<Selector>, Fault> {
    if text.len() > MAX_TEXT {
        return Err((MAX_TEXT, Reason::TooLong));
    }
    if let Some(bad) = text.find(['\0', char::REPLACEMENT_CHARACTER]) {
        return Err((bad, Reason::Character));
    }
    let mut selectors = Vec::new();
    if text.is_empty() {
        return Ok(selectors);
    }
    let mut scanner = Scanner { text, at: text.char_indices().peekable() };
    loop {
        if selectors.len() == MAX_SELECTORS {
            return Err((scanner.offset(), Reason::TooManySelectors));
        }
        selectors.push(scanner.selector()?);
        match scanner.at.next() {
            None => return Ok(selectors),
            Some((_, ',')) => {}
            Some((offset, _)) => return Err((offset, Reason::Behind)),
        }
    }
}

struct Scanner<'a> {
    text: &'a str,
    at: Peekable<CharIndices<'a>>,
}

impl<'a> Scanner<'a> {
    fn offset(&mut self) -> usize {
        self.at.peek().map_or(self.text.len(), |(offset, _)| *offset)
    }

    fn peek(&mut self) -> Option<char> {
        self.at.peek().map(|(_, c)| *c)
    }

    fn skip_space(&mut self) {
        while self.at.next_if(|(_, c)| c.is_whitespace()).is_some() {}
    }

    /// The characters from here on that `belongs` accepts.
    fn run(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let start = self.offset();
        while self.at.next_if(|(_, c)| belongs(*c)).is_some() {}
        let end = self.offset();
        &self.text[start..end]
    }

    fn selector(&mut self) -> Result<Selector, Fault> {
        let field = self.field_path()?;
        let offset = self.offset();
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present, offset });
        }
        self.skip_space();
        let offset = self.offset();
        let operator = self.run(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator {
            "" => return Err((offset, Reason::Operator)),
            "==" => Test::Equal,
            "!=" => Test::NotEqual,
            "~=" => Test::Matches,
            _ => return Err((offset, Reason::UnknownOperator)),
        };
        self.skip_space();
        let offset = self.offset();
        let value = match self.peek() {
            None | Some(',' | '.' | '=' | '!' | '~') => return Err((offset, Reason::Value)),
            Some(quote @ ('"' | '/' | '|')) => {
                let value = self.quoted(quote)?;
                if quote != '"' && operator != "~=" {
                    return Err((offset, Reason::Quote));
                }
                value
            }
            Some(_) => {
                self.at.next();
                self.run(continues_value);
                self.text.as_bytes()[offset..self.offset()].to_vec()
            }
        };
        Ok(Selector { field, test: test(value), offset })
    }

    fn field_path(&mut self) -> Result<Field, Fault> {
        let first = self.field()?;
        let mut rest: Option<Vec<u8>> = None;
        while self.at.next_if(|(_, c)| *c == '.').is_some() {
            let part = self.field()?;
            match &mut rest {
                None => rest = Some(part.into_owned()),
                Some(rest) => {
                    rest.push(b'.');
                    rest.extend_from_slice(&part);
                }
            }
        }
        Ok(match &*first {
            b"name" => Field::Name,
            b"parent" => Field::Parent,
            b"kind" => Field::Kind,
            b"labels" => Field::Label(rest.unwrap_or_default()),
            _ => Field::Unknown,
        })
    }

    fn field(&mut self) -> Result<Cow<'a, [u8]>, Fault> {
        self.skip_space();
        let offset = self.offset();
        match self.peek() {
            Some('"') => self.quoted('"').map(Cow::Owned),
            Some(quote @ ('/' | '|')) => {
                self.quoted(quote)?;
                Err((offset, Reason::Quote))
            }
            _ => match self.run(|c| c == '_' || c.is_ascii_alphanumeric()) {
                "" => Err((offset, Reason::Field)),
                field => Ok(Cow::Borrowed(field.as_bytes())),
            },
        }
    }

    /// A quoted text from its first quote to behind its last.
    fn quoted(&mut self, quote: char) -> Result<Vec<u8>, Fault> {
        let start = self.offset();
        self.at.next();
        let mut value = Vec::new();
        loop {
            match self.at.next() {
                None | Some((_, '\n')) => return Err((start, Reason::Unterminated)),
                Some((_, c)) if c == quote => return Ok(value),
                Some((offset, '\\')) => self.escape(quote, &mut value).ok_or((offset, Reason::Escape))?,
                Some((_, c)) => push(&mut value, c),
            }
        }
    }

    /// What follows a backslash; `None` if it is no escape sequence.
    fn escape(&mut self, quote: char, value: &mut Vec<u8>) -> Option<()> {
        let (_, c) = self.at.next()?;
        let byte = match c {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            '0'..='7' => {
                let number = (c.to_digit(8)? << 6) | self.number(8, 2)?;
                u8::try_from(number).ok()?
            }
            'x' => u8::try_from(self.number(16, 2)?).ok()?,
            'u' | 'U' => {
                let number = self.number(16, if c == 'u' { 4 } else { 8 })?;
                if number > u32::from(char::MAX) {
                    return None;
                }
                // Go writes surrogates as replacement characters.
                push(value, char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER));
                return Some(());
            }
            c if c == quote => u8::try_from(c).ok()?,
            _ => return None,
        };
        value.push(byte);
        Some(())
    }

    /// Exactly so many digits.
    fn number(&mut self, radix: u32, digits: u32) -> Option<u32> {
        let mut number = 0;
        for _ in 0..digits {
            let (_, c) = self.at.next()?;
            // At most eight hexadecimal digits: no overflow.
            number = number * radix + c.to_digit(radix)?;
        }
        Some(number)
    }
}

fn push(value: &mut Vec<u8>, c: char) {
    value.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// Whether a character belongs to a value without quotes, behind its first one: letters, marks, numbers, punctuation and
/// symbols. Characters that are not assigned are accepted, since versions of Unicode differ.
fn continues_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}
