//! What `image ls` lists is what debugfs finds on the disk that `image pack` writes, and `image cat` gives its contents.

use crate::{
    Scene, image, ok,
    pack::run,
    stacks::{Item, all_orders, chosen, tar_of},
};
use ext4_image::testing::fsck;
use oci_image::testing::{Packing, Store};
use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

/// Stacks of [`all_orders`] that are tried, besides [`chosen`]: each one in so many.
const EACH: usize = 101;

/// Asks debugfs; an answer for each request.
fn debugfs(disk: &Path, requests: &[String], folder: &Path) -> Vec<String> {
    let script = folder.join("requests");
    fs::write(&script, requests.join("\n") + "\n").unwrap();
    let done = Command::new("debugfs")
        .args(["-f", &script.display().to_string()])
        .arg(disk)
        .output()
        .expect("this test needs debugfs: scripts/install-deps test");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    // Each answer follows its request.
    let answers: Vec<String> = text.split("debugfs: ").skip(1).map(str::to_owned).collect();
    assert_eq!(answers.len(), requests.len(), "{text}{}", String::from_utf8_lossy(&done.stderr));
    answers
        .iter()
        .map(|answer| answer.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned()))
        .collect()
}

/// The word behind a label.
fn after<'t>(text: &'t str, label: &str) -> &'t str {
    let Some((_, rest)) = text.split_once(label) else { panic!("no {label:?} in {text}") };
    rest.split_whitespace().next().unwrap_or_default()
}

/// Seconds since 1970 of `2001-09-09 01:46:40`.
fn seconds(date: &str) -> i64 {
    let numbers: Vec<i64> = date.split([' ', '-', ':']).map(|part| part.parse().unwrap()).collect();
    let [year, month, day, hour, minute, second] = numbers[..] else { panic!("{date}") };
    let leap = |year: i64| year % 4 == 0 && year % 100 != 0 || year % 400 == 0;
    let mut days = (1970..year).map(|year| 365 + i64::from(leap(year))).sum::<i64>() + day - 1;
    let lengths = [31, 28 + i64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    days += lengths.iter().take(month as usize - 1).sum::<i64>();
    ((days * 24 + hour) * 60 + minute) * 60 + second
}

/// What an entry of `ls` is on the disk, in the words of debugfs; without the size and links of a directory.
fn expected(row: &serde_json::Value) -> String {
    let kind = match row["type"].as_str().unwrap() {
        "file" => "regular",
        "directory" => "directory",
        "symlink" => "symlink",
        "fifo" => "FIFO",
        "char-device" => "character",
        "block-device" => "block",
        other => panic!("{other}"),
    };
    let mut text = format!("{kind} {} {} {}", row["mode"].as_str().unwrap(), row["uid"], row["gid"]);
    let _ = write!(text, " {}", seconds(row["mtime"].as_str().unwrap()));
    if kind != "directory" {
        let _ = write!(text, " {} x{}", row["size"], row["links"]);
    }
    if let Some(target) = row["target"].as_str() {
        let _ = write!(text, " -> {target}");
    }
    if row["device"].is_array() {
        let _ = write!(text, " {}:{}", row["device"][0], row["device"][1]);
    }
    text
}

/// The same from `stat` of debugfs.
fn found(stat: &str) -> String {
    let kind = after(stat, "Type:");
    let mode = format!("{:04o}", u16::from_str_radix(after(stat, "Mode:"), 8).unwrap());
    let time = after(stat, "mtime: 0x");
    let time = i64::from_str_radix(time.split(':').next().unwrap(), 16).unwrap();
    let mut text = format!("{kind} {} {} {} {time}", mode, after(stat, "User:"), after(stat, "Group:"));
    if kind != "directory" {
        let _ = write!(text, " {} x{}", after(stat, "Size:"), after(stat, "Links:"));
    }
    if kind == "symlink" {
        let _ = write!(text, " -> {}", after(stat, "link dest: ").trim_matches('"'));
    }
    if matches!(kind, "character" | "block") {
        let (major, minor) = after(stat, "major/minor number:").split_once(':').unwrap();
        let number = |text: &str| text.parse::<u32>().unwrap();
        let _ = write!(text, " {}:{}", number(major), number(minor));
    }
    text
}

/// The names in a directory, from `ls -p` of debugfs: `/INODE/MODE/UID/GID/NAME/SIZE/`.
fn names(listing: &str) -> Vec<String> {
    let lines = listing.lines().filter_map(|line| line.strip_prefix('/')?.split('/').nth(4));
    let mut names: Vec<String> =
        lines.filter(|name| !matches!(*name, "" | "." | "..")).map(str::to_owned).collect();
    names.sort();
    names
}

/// Compares one stack; false if the image is refused by both commands.
fn compare(stack: &[Vec<Item>], scene: &Scene) -> bool {
    let tars: Vec<Vec<u8>> = stack.iter().map(|items| tar_of(items)).collect();
    let mut store = Store::default();
    let layers: Vec<(&[u8], Packing)> = tars.iter().map(|tar| (&tar[..], Packing::Gzip)).collect();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "");
    let source = scene.oci_archive("image.tar", &store);
    let disk = scene.path("disk.img");
    let target = disk.display().to_string();
    let list = image(&["ls", "-R", "--json", &source]).output().unwrap();
    if !list.status.success() {
        assert!(!image(&["pack", &source, &target]).output().unwrap().status.success(), "{stack:?}");
        return false;
    }
    let rows: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let rows: BTreeMap<&str, &serde_json::Value> =
        rows.as_array().unwrap().iter().map(|row| (row["path"].as_str().unwrap(), row)).collect();
    ok(&["pack", &source, &target]);
    fsck(&disk);
    let mut requests: Vec<String> = rows.keys().map(|path| format!("stat /{path}")).collect();
    let mut dirs = vec![""];
    dirs.extend(rows.iter().filter(|(_, row)| row["type"] == "directory").map(|(path, _)| *path));
    requests.extend(dirs.iter().map(|path| format!("ls -p /{path}")));
    let answers = debugfs(&disk, &requests, &scene.path(""));
    let (stats, lists) = answers.split_at(rows.len());
    for ((path, row), stat) in rows.iter().zip(stats) {
        assert_eq!(found(stat), expected(row), "{path} of {stack:?}");
    }
    for (dir, list) in dirs.iter().zip(lists) {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let below = rows.keys().filter_map(|path| path.strip_prefix(prefix.as_str()));
        let listed: Vec<&str> = below.filter(|name| !name.contains('/')).collect();
        assert_eq!(names(list), listed, "in /{dir} of {stack:?}");
    }
    if let Some((path, row)) = rows.iter().rfind(|(_, row)| row["type"] == "file") {
        let copy = scene.path("copy").display().to_string();
        run("debugfs", &["-R", &format!("dump /{path} {copy}"), &target]);
        let mut bytes = fs::read(&copy).unwrap();
        // Of a file in its inode, debugfs dumps all the room that is there.
        bytes.truncate(row["size"].as_u64().unwrap() as usize);
        assert!(ok(&["cat", &source, path]) == bytes, "{path} of {stack:?}");
    }
    true
}

#[test]
fn debugfs_finds_on_the_disk_what_ls_lists() {
    let scene = Scene::new();
    let stacks = chosen().into_iter().chain(all_orders().into_iter().step_by(EACH));
    let mut compared = 0;
    for stack in stacks {
        compared += usize::from(compare(&stack, &scene));
    }
    assert!(compared > 50, "only {compared} stacks");
}
