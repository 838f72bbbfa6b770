//! Lists a tar archive: `cargo run --example list_tar -- ARCHIVE` (not compressed; `-` is standard input).
//!
//! Without an argument, it lists a small archive that it writes itself.

use layer_tar::{Event, TarReader, writer};
use std::{
    error::Error,
    fs::File,
    io::{self, Read},
};

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None => list(sample().as_slice()),
        Some("-") => list(io::stdin().lock()),
        Some(path) => list(File::open(path)?),
    }
}

fn list(input: impl Read) -> Result<(), Box<dyn Error>> {
    let mut reader = TarReader::new(input);
    loop {
        match reader.next_event()? {
            Event::Entry(entry) => {
                let path = entry.path.escape_ascii();
                println!(
                    "{:?} {:o} {}:{} {} {path}",
                    entry.kind, entry.mode, entry.uid, entry.gid, entry.size
                );
                for xattr in &entry.xattrs {
                    println!("  {} = \"{}\"", xattr.name.escape_ascii(), xattr.value.escape_ascii());
                }
            }
            Event::Raw(_) | Event::Data { .. } => {}
            Event::End => break,
        }
    }
    if let Some(difference) = reader.go_differs() {
        println!("not as Go's archive/tar reads it: {difference}");
    }
    Ok(())
}

fn sample() -> Vec<u8> {
    let directory = writer::Header {
        kind: writer::Kind::Directory,
        path: b"etc/",
        link: b"",
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        device: (0, 0),
        size: 0,
        xattrs: &[],
        sparse: None,
    };
    let file = writer::Header {
        kind: writer::Kind::File,
        path: b"etc/motd",
        mode: 0o644,
        size: 6,
        xattrs: &[(b"user.origin", b"example")],
        ..directory
    };
    let mut tar = Vec::new();
    writer::append(&mut tar, &directory, writer::Version::V2);
    let data = writer::append(&mut tar, &file, writer::Version::V2);
    tar.extend_from_slice(b"hello\n");
    tar.resize(tar.len() + writer::padding(data) + 1024, 0);
    tar
}
