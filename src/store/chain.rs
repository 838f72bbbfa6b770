//! `layerchain.json`: the ancestors of a layer, nearest first.
//!
//! The file has the form of the original driver, a JSON array (`null` for a base layer), but holds ids instead of
//! absolute paths, so that a home can be moved. The absolute form is read as well.

use super::{LayerId, StoreError, durable, layout};
use std::path::Path;

/// Longest chain of ancestors, the same as in moby's overlay2. The kernel's `OVL_MAX_STACK` is 500 with the new mount
/// API; one page of option string (4,095 bytes) holds 170 names of sandboxes as `layout` makes them, 23 bytes each.
pub const MAX_CHAIN: usize = 128;

/// Writes and syncs the chain of a layer in its new directory, which the caller syncs.
pub fn write(folder: &Path, chain: &[LayerId]) -> Result<(), StoreError> {
    let value = if chain.is_empty() { None } else { Some(chain) };
    durable::new_json(&folder.join(layout::CHAIN_FILE), &value)
}

/// Reads the chain from a layer's directory; a missing file is an empty chain, as in the original.
pub fn read(folder: &Path) -> Result<Vec<LayerId>, StoreError> {
    let path = folder.join(layout::CHAIN_FILE);
    let names: Option<Option<Vec<String>>> = durable::read_json(&path)?;
    parse(names.flatten().unwrap_or_default()).map_err(|reason| StoreError::corrupt(path, reason))
}

/// Turns the entries of a chain file into ids.
fn parse(names: Vec<String>) -> Result<Vec<LayerId>, String> {
    if names.len() > MAX_CHAIN {
        return Err(format!("{} ancestors; the limit is {MAX_CHAIN}", names.len()));
    }
    let mut chain = Vec::with_capacity(names.len());
    for name in names {
        // The original wrote paths (`C:\ProgramData\docker\lcow\<id>`): the id is the last component.
        let id: LayerId =
            name.rsplit(['/', '\\']).next().unwrap_or_default().parse().map_err(|e| format!("{e}"))?;
        if chain.contains(&id) {
            return Err(format!("{id} is its own ancestor"));
        }
        chain.push(id);
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_the_originals_absolute_folders_are_read() {
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let chain =
            parse(names(&["abc", r"C:\ProgramData\docker\lcow\def", "/var/lib/docker/lcow/123-init"]))
                .unwrap();
        assert_eq!(chain.iter().map(LayerId::as_str).collect::<Vec<_>>(), ["abc", "def", "123-init"]);
        assert!(parse(names(&["a", "b", "a"])).unwrap_err().contains("own ancestor"));
        assert!(parse(names(&[r"C:\home\..", "x"])).is_err());
        assert!(parse(names(&["x/"])).is_err());
        assert!(
            parse((0..=MAX_CHAIN).map(|n| format!("l{n}")).collect()).unwrap_err().contains("129 ancestors")
        );
    }

    #[test]
    fn a_base_layer_is_null_and_a_missing_file_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), []);
        write(folder.path(), &[]).unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("layerchain.json")).unwrap(), "null\n");
        assert_eq!(read(folder.path()).unwrap(), []);
        let chain = ["b".parse().unwrap(), "a".parse().unwrap()];
        let again = write(folder.path(), &chain).unwrap_err();
        assert!(again.to_string().contains("cannot write"), "only a new layer's chain is written: {again}");
        std::fs::remove_file(folder.path().join("layerchain.json")).unwrap();
        write(folder.path(), &chain).unwrap();
        assert_eq!(read(folder.path()).unwrap(), chain);
        std::fs::write(folder.path().join("layerchain.json"), "{").unwrap();
        assert!(matches!(read(folder.path()).unwrap_err(), StoreError::Corrupt(_)));
    }
}
