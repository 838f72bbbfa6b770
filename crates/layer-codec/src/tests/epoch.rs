//! An upper bound of the times in an exported tar (`source_date_epoch`).

use super::*;

#[test]
#[cfg_attr(windows, ignore = "needs the mounts and overlayfs of Linux")]
fn times_beyond_the_bound_are_the_bound_and_nothing_else_changes() {
    const EPOCH: i64 = 1_600_000_000;
    let mut stack = Stack::new();
    stack.layer("mkdir d; echo 1 > d/gone; echo 2 > gone").layer(
        "rm gone; rm -r d; mkdir d; echo x > d/old; ln d/old d/link; echo y > d/new; ln d/new d/z; ln -s t d/sym
         echo n > exact; echo n > above; echo n > below; echo n > ancient; chown 7:8 d/new; setfattr -n user.a -v b d/new
         touch -d @1500000000.25 d/old; touch -d @1600000000 exact; touch -d @1600000000.000000001 above
         touch -d @1599999999.999999999 below; touch -d '1960-01-01 UTC' ancient; touch -d @1600000001 d/new d",
    );
    let export_with = |source_date_epoch| {
        let options = ExportOptions { source_date_epoch, ..ExportOptions::default() };
        let mut tar = Vec::new();
        export(&stack.sources(1), Some(ParentSpec::Own), &options, &mut NoHooks, &mut tar).unwrap();
        tar
    };
    // As GNU tar reads it: times in full, and everything else.
    let listed = |tar: &[u8]| -> Vec<(String, String)> {
        let file = stack.path("listed.tar");
        fs::write(&file, tar).unwrap();
        let lines = sh(&format!("TZ=UTC0 tar --full-time --numeric-owner -tvf {}", file.display()));
        let entries = lines.lines().map(|line| {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            let time = words.drain(3..5).collect::<Vec<_>>().join(" ");
            (time, words.join(" "))
        });
        entries.collect()
    };
    let (own, bounded) = (listed(&export_with(None)), listed(&export_with(Some(EPOCH))));
    let rest =
        |entries: &[(String, String)]| entries.iter().map(|(_, rest)| rest.clone()).collect::<Vec<_>>();
    assert_eq!(rest(&own), rest(&bounded));
    let time = |name: &str| {
        let found = bounded.iter().find(|(_, rest)| rest.split(' ').any(|word| word == name));
        found.unwrap_or_else(|| panic!("{name} in {bounded:?}")).0.clone()
    };
    let epoch = "2020-09-13 12:26:40";
    for (name, want) in [
        ("above", epoch),
        ("exact", epoch),
        ("below", "2020-09-13 12:26:39.999999999"),
        ("ancient", "1960-01-01 00:00:00"),
        ("d/", epoch),
        ("d/new", epoch),
        ("d/z", epoch),
        ("d/link", "2017-07-14 02:40:00.25"),
        ("d/old", "2017-07-14 02:40:00.25"),
        ("d/sym", epoch),
        (".wh.gone", "1970-01-01 00:00:00"),
        ("d/.wh..wh..opq", "1970-01-01 00:00:00"),
    ] {
        assert_eq!(time(name), want, "{name}");
    }
    assert_eq!(export_with(Some(EPOCH)), export_with(Some(EPOCH)));
    // A bound that nothing exceeds leaves the canonical tar.
    assert_eq!(export_with(Some(i64::MAX)), export_with(None));
    assert_eq!(stack.export(1, Some(ParentSpec::Own)).0, export_with(None));
}
