//! Text of an image in messages: quoted, escaped and short, so that a hostile name can neither flood a log nor move a
//! terminal's cursor.

/// Characters of foreign text in a message.
const MAX_SHOWN: usize = 200;

/// Foreign text as messages show it: quoted, escaped, and truncated to 200 characters.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        None => format!("{text:?}"),
        Some((at, _)) => format!("{:?}…", &text[..at]),
    }
}

/// A list of foreign texts as messages show it, at most ten of them.
pub(crate) fn shown_list<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    const MOST: usize = 10;
    let texts: Vec<&str> = texts.into_iter().collect();
    let mut list = texts.iter().take(MOST).map(|text| shown(text)).collect::<Vec<_>>().join(", ");
    if texts.len() > MOST {
        list.push_str(" and ");
        list.push_str(&(texts.len() - MOST).to_string());
        list.push_str(" more");
    }
    list
}
