//! A container's hard quota: the product's alone, so there is no control.

use crate::{engine::EngineOptions, rootfs};

#[test]
fn a_container_cannot_write_more_than_its_size() {
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    engine.run_container("box1", "base", &["--storage-opt", "size=64m"]);
    engine.exec("box1", "echo before >/data/before");
    let full =
        engine.try_docker(&["exec", "box1", "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=100"]);
    assert!(full.expect_failure().contains("No space left on device"));
    let kept: u64 = engine.exec("box1", "wc -c </data/big").parse().expect("a number");
    assert!((40 << 20..64 << 20).contains(&kept), "{kept} bytes fitted into 64 MiB");
    // It lives, reads, frees, and writes again.
    assert_eq!(
        engine.exec("box1", "cat /data/before && rm /data/big && sync && echo after >/data/after"),
        "before"
    );
    engine.exec("box1", "dd if=/dev/zero of=/data/big bs=1M count=30 2>/dev/null && rm /data/big");
    let total: u64 =
        engine.exec("box1", "df -k / | tail -n 1 | { read -r a b c; echo $b; }").parse().expect("df");
    assert!((50 << 10..=64 << 10).contains(&total), "df shows {total} KiB");
    engine.docker(&["stop", "-t", "0", "box1"]);
    engine.docker(&["start", "box1"]);
    assert_eq!(engine.exec("box1", "cat /data/after"), "after");
    engine.docker(&["commit", "box1", "committed"]);
    assert_eq!(engine.shell("committed", "cat /data/before /data/after"), "before\nafter");

    for (size, said) in [("lots", "lots"), ("-5", "-5"), ("1k", "1k"), ("", "size")] {
        let option = format!("size={size}");
        let args = ["run", "--rm", "--network", "none", "--storage-opt", &option, "base", "true"];
        let failure = engine.try_docker(&args).expect_failure();
        assert!(failure.contains(said) && failure.contains("accepted"), "size={size:?}: {failure}");
    }
    let args = ["run", "--rm", "--network", "none", "--storage-opt", "speed=9", "base", "true"];
    let failure = engine.try_docker(&args).expect_failure();
    assert!(failure.contains("speed"), "{failure}");
    engine.remove_everything();
    engine.assert_nothing_mounted();
}

#[test]
fn the_default_size_comes_from_the_options() {
    let options = EngineOptions::lcow().storage_option("lcow.sandboxsize=100MiB");
    let (engine, _) = rootfs::engine_with(options, &rootfs::small());
    let total: u64 =
        engine.shell("base", "df -k / | tail -n 1 | { read -r a b c; echo $b; }").parse().expect("df");
    assert!((80 << 10..=100 << 10).contains(&total), "df shows {total} KiB");
    // Builds get it, too.
    let context = engine.scratch("context");
    let dockerfile = "FROM base\nRUN dd if=/dev/zero of=/data/big bs=1M count=200\n";
    std::fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    let failure = engine.build_by("0", "big", &context, &[]).expect_failure();
    assert!(failure.contains("No space left on device"), "{failure}");
}
