//! Files that use each other in a circle, within a crate.
//!
//! ```text
//!   use crate::a::{B, c::D}; super::e()   ─► paths ─► the file of the deepest module ─► through its `use` lines
//!   mod f; … f::g()                                                                      to where the name is defined
//!   file ─► file arrows ─► strongly connected sets of more than one file: circles
//! ```
//!
//! A `pub use` passes a name on and is not an arrow. Neither is what a file and the module that it is a part of take from
//! each other: a type in `mod.rs` whose methods stand in several files is one thing in several files. Tests are not
//! looked at: they may use what they test and more.
//! Called by the test of the same name in `main`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

/// A module's path below its crate.
type Module = Vec<String>;

/// One file of a crate: which module it is, and its code without comments and tests.
pub(crate) struct Source {
    /// For messages.
    pub(crate) name: String,
    pub(crate) module: Module,
    pub(crate) code: String,
}

/// Arrows between files, and the names that make them.
type Arrows = BTreeMap<(usize, usize), BTreeSet<String>>;

/// What a file says of names: those that it imports, with their paths, and whether it only passes them on.
struct Scope {
    children: BTreeSet<String>,
    /// Name ─► path from the crate's root; and whether it is a `pub use`.
    imports: BTreeMap<String, (Module, bool)>,
    /// Paths in the code itself, outside of `use`.
    inline: Vec<Module>,
}

/// The circles, each as lines for people.
pub(crate) fn circles(sources: &[Source]) -> Vec<String> {
    let arrows = arrows(sources);
    let mut found = Vec::new();
    for set in connected(sources.len(), &arrows) {
        let mut text = String::from("circle:");
        for ((from, to), names) in arrows.iter().filter(|((a, b), _)| set.contains(a) && set.contains(b)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let (from, to) = (&sources[*from].name, &sources[*to].name);
            let _ = write!(text, "\n  {from} -> {to}: {}", names.join(", "));
        }
        found.push(text);
    }
    found
}

fn arrows(sources: &[Source]) -> Arrows {
    let files: BTreeMap<&Module, usize> = sources.iter().enumerate().map(|(n, s)| (&s.module, n)).collect();
    let scopes: Vec<Scope> = sources.iter().map(scope).collect();
    let mut arrows = Arrows::new();
    for (from, scope) in scopes.iter().enumerate() {
        let imported = scope.imports.values().filter(|(_, passed_on)| !passed_on).map(|(path, _)| path);
        for path in imported.chain(&scope.inline) {
            if let Some((to, name)) = definition(path, &files, &scopes, 8)
                && !sources[from].module.starts_with(&sources[to].module)
                && !sources[to].module.starts_with(&sources[from].module)
            {
                arrows.entry((from, to)).or_default().insert(name);
            }
        }
    }
    arrows
}

/// The file that defines what `path` names, and the name there.
fn definition(
    path: &Module,
    files: &BTreeMap<&Module, usize>,
    scopes: &[Scope],
    depth: usize,
) -> Option<(usize, String)> {
    let (file, rest) = (0..=path.len())
        .rev()
        .find_map(|len| files.get(&path[..len].to_vec()).map(|file| (*file, &path[len..])))?;
    let Some(name) = rest.first() else {
        // The module itself: what is used of it, other paths say.
        return None;
    };
    match scopes[file].imports.get(name) {
        Some((next, _)) if depth > 0 && next != path => {
            let mut next = next.clone();
            next.extend_from_slice(&rest[1..]);
            definition(&next, files, scopes, depth - 1)
        }
        _ => Some((file, name.clone())),
    }
}

fn scope(source: &Source) -> Scope {
    let mut scope = Scope { children: BTreeSet::new(), imports: BTreeMap::new(), inline: Vec::new() };
    let code = without_strings(&source.code);
    for line in code.lines() {
        let words: Vec<&str> = line.trim().trim_end_matches(';').split_whitespace().collect();
        if let [.., "mod", name] = words[..]
            && line.trim_end().ends_with(';')
        {
            scope.children.insert(name.to_owned());
        }
    }
    let mut rest = code.as_str();
    let mut body = String::new();
    while let Some((before, statement, after)) = next_use(rest) {
        body.push_str(before);
        let passed_on = before.trim_end().ends_with("pub")
            || before
                .rsplit(['\n', ';', '}'])
                .next()
                .is_some_and(|line| line.trim_start().starts_with("pub"));
        for (path, name) in leaves(statement) {
            if let Some(path) = absolute(&path, &source.module, &scope.children) {
                scope.imports.insert(name, (path, passed_on));
            }
        }
        rest = after;
    }
    body.push_str(rest);
    scope.inline = inline(&body)
        .into_iter()
        .filter_map(|path| match scope.imports.get(&path[0]) {
            Some((start, _)) => Some(start.iter().cloned().chain(path[1..].iter().cloned()).collect()),
            None => absolute(&path, &source.module, &scope.children),
        })
        .collect();
    scope
}

/// Code with the insides of its string and character literals taken out.
fn without_strings(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut chars = code.chars().peekable();
    while let Some(c) = chars.next() {
        out.push(c);
        if c != '"' {
            continue;
        }
        while let Some(inside) = chars.next() {
            if inside == '\\' {
                chars.next();
            } else if inside == '"' {
                out.push('"');
                break;
            }
        }
    }
    out
}

/// What stands before the next `use`, its tree, and what follows.
fn next_use(code: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let at = from + code[from..].find("use ")?;
        let begins = code[..at].chars().next_back().is_none_or(|c| c.is_whitespace() || c == ';' || c == '}');
        if begins {
            let end = at + code[at..].find(';')?;
            return Some((&code[..at], &code[at + 4..end], &code[end + 1..]));
        }
        from = at + 4;
    }
}

/// The leaves of a `use` tree: path, and the name it gives.
fn leaves(tree: &str) -> Vec<(Module, String)> {
    fn walk(tree: &str, prefix: &[String], found: &mut Vec<(Module, String)>) {
        let tree = tree.trim();
        if let Some(open) = tree.find('{') {
            let mut prefix = prefix.to_vec();
            prefix
                .extend(tree[..open].split("::").map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned));
            let inside = &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())];
            let (mut depth, mut start) = (0, 0);
            for (at, c) in inside.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        walk(&inside[start..at], &prefix, found);
                        start = at + 1;
                    }
                    _ => {}
                }
            }
            walk(&inside[start..], &prefix, found);
            return;
        }
        let (path, alias) = tree.split_once(" as ").map_or((tree, None), |(p, a)| (p, Some(a.trim())));
        let mut full = prefix.to_vec();
        full.extend(path.split("::").map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()));
        if full.last().is_some_and(|last| last == "self") {
            full.pop();
        }
        if let Some(last) = full.last().cloned() {
            found.push((full, alias.map_or(last, str::to_owned)));
        }
    }
    let mut found = Vec::new();
    walk(tree, &[], &mut found);
    found
}

/// Paths of two names or more in code.
fn inline(code: &str) -> Vec<Module> {
    let mut found = Vec::new();
    for word in code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':') {
        let path: Module = word.split("::").map(str::to_owned).collect();
        if path.len() > 1 && path.iter().all(|part| !part.is_empty() && !part.contains(':')) {
            found.push(path);
        }
    }
    found
}

/// A path from the crate's root; `None` for another crate's.
fn absolute(path: &Module, module: &Module, children: &BTreeSet<String>) -> Option<Module> {
    let mut base = module.clone();
    let mut rest = path.as_slice();
    match rest.first()?.as_str() {
        "crate" => return Some(rest[1..].to_vec()),
        "self" => rest = &rest[1..],
        "super" => {
            while rest.first().is_some_and(|part| part == "super") {
                base.pop()?;
                rest = &rest[1..];
            }
        }
        name if children.contains(name) => {}
        _ => return None,
    }
    base.extend_from_slice(rest);
    Some(base)
}

/// Sets of files that reach each other, of two and more (Tarjan's algorithm, by plain reachability: crates are small).
fn connected(count: usize, arrows: &Arrows) -> Vec<BTreeSet<usize>> {
    let reach: Vec<BTreeSet<usize>> = (0..count)
        .map(|start| {
            let (mut seen, mut todo) = (BTreeSet::new(), vec![start]);
            while let Some(from) = todo.pop() {
                for (_, to) in arrows.keys().filter(|(a, _)| *a == from) {
                    if seen.insert(*to) {
                        todo.push(*to);
                    }
                }
            }
            seen
        })
        .collect();
    let mut sets: BTreeSet<BTreeSet<usize>> = BTreeSet::new();
    for a in 0..count {
        let set: BTreeSet<usize> =
            (0..count).filter(|b| reach[a].contains(b) && reach[*b].contains(&a)).collect();
        if set.len() > 1 {
            sets.insert(set);
        }
    }
    sets.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, code: &str) -> Source {
        let module = name.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        Source { name: name.to_owned(), module, code: code.to_owned() }
    }

    #[test]
    fn circles_are_found_through_groups_reexports_and_parents() {
        let tree = |b: &str| {
            vec![
                source("", "mod a;"),
                source("a", "mod b;\nmod c;\npub use b::Thing;\nconst SIZE: u32 = 1;\nfn h() { b::g(); }"),
                source("a/b", b),
                source("a/c", "use super::{Thing, SIZE};\nfn f() { let x = \"crate::a::b::No\"; }"),
            ]
        };
        assert!(circles(&tree("pub struct Thing;")).is_empty());
        let found = circles(&tree("use crate::{x, a::{c::f}};\npub struct Thing;"));
        assert_eq!(found, ["circle:\n  a/b -> a/c: f\n  a/c -> a/b: Thing"]);
        let found = circles(&tree("pub struct Thing;\nfn g() { super::c::f(); }"));
        assert_eq!(found, ["circle:\n  a/b -> a/c: f\n  a/c -> a/b: Thing"]);
    }
}
