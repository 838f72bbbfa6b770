//! Options that map owners: `FIRST:HOST:COUNT`, as `pack` applies them, and backwards, as `commit` does.

use crate::cli::CliError;
use layer_codec::{IdMaps, IdRange};

/// Parses a range of ids.
pub(super) fn id_range(text: &str) -> Result<IdRange, String> {
    let numbers: Vec<u32> = text
        .split(':')
        .map(str::parse)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("{e}; expected FIRST:HOST:COUNT, for example 0:100000:65536"))?;
    let [container_id, host_id, size] = numbers[..] else {
        return Err("expected FIRST:HOST:COUNT, for example 0:100000:65536".to_owned());
    };
    let last = size.checked_sub(1).ok_or("a range of no ids")?;
    if container_id.checked_add(last).is_none() || host_id.checked_add(last).is_none() {
        return Err("the range ends above 4294967295".to_owned());
    }
    Ok(IdRange { container_id, host_id, size })
}

/// The maps of both options: without ranges of their own, groups have those of users.
pub(super) fn maps(uids: &[IdRange], gids: &[IdRange]) -> IdMaps {
    let gids = if gids.is_empty() { uids } else { gids };
    IdMaps { uids: uids.to_vec(), gids: gids.to_vec() }
}

/// Ranges as the options have them.
pub(super) fn texts(ranges: &[IdRange]) -> Vec<String> {
    ranges.iter().map(|r| format!("{}:{}:{}", r.container_id, r.host_id, r.size)).collect()
}

/// Refuses maps that cannot be applied backwards, because two ids of the image became one.
pub(super) fn check_backwards(maps: &IdMaps) -> Result<(), CliError> {
    for (option, ranges) in [("--uid-map", &maps.uids), ("--gid-map", &maps.gids)] {
        let mut sorted: Vec<&IdRange> = ranges.iter().collect();
        sorted.sort_by_key(|range| range.host_id);
        for pair in sorted.windows(2) {
            if let [a, b] = pair
                && b.host_id - a.host_id < a.size
            {
                return Err(format!(
                    "two ranges of {option} have the host's id {}; it cannot be mapped back",
                    b.host_id
                )
                .into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_they_are_shown() {
        for text in ["0:100000:65536", "4294967295:0:1", "0:0:4294967295"] {
            assert_eq!(texts(&[id_range(text).unwrap()]), [text]);
        }
        for bad in ["", "0:1", "0:1:2:3", "a:1:1", "0:1:0", "2:0:4294967295", "0:4294967295:2", "-1:0:1"] {
            assert!(id_range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_that_share_an_id_of_the_host_have_no_way_back() {
        let of = |texts: &[&str]| texts.iter().map(|text| id_range(text).unwrap()).collect::<Vec<_>>();
        let check = |uids: &[&str], gids: &[&str]| check_backwards(&maps(&of(uids), &of(gids)));
        assert!(check(&["0:1000:10", "10:1010:5", "20:0:1000"], &[]).is_ok());
        assert!(check(&["0:1000:10", "10:1009:5"], &[]).unwrap_err().to_string().contains("1009"));
        assert!(check(&["0:1000:10"], &["0:5:9", "9:5:1"]).unwrap_err().to_string().contains("--gid-map"));
    }
}
