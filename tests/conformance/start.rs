//! `serve` with virtual machines that cannot be made: it says so at its start, names what is missing and what to do.

use crate::support::refusal::refused;

pub(crate) fn names_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let kird = folder.path().join("kird");
    let options = ["lcow.svm=qemu".to_owned(), format!("lcow.kirdpath={}", kird.display())];
    let said = refused(folder.path(), &options);
    for expected in [&kird.join("vmlinux").display().to_string(), "scripts/build-svm-image", "lcow.kirdpath"]
    {
        assert!(said.contains(expected), "{expected} is missing in:\n{said}");
    }

    // A folder of that name can be opened, and is no kernel; an initrd that is missing beside a good kernel.
    std::fs::create_dir_all(kird.join("vmlinux")).unwrap();
    let said = refused(folder.path(), &options);
    assert!(said.contains("vmlinux") && said.contains("is no file"), "{said}");
    std::fs::remove_dir(kird.join("vmlinux")).unwrap();
    std::fs::write(kird.join("vmlinux"), b"\x7fELF").unwrap();
    let said = refused(folder.path(), &options);
    assert!(said.contains("initrd") && !said.contains("vmlinux:"), "{said}");
}
