//! Tars made by code, and what hcsshim's `tar2ext4` made of them.

use crate::tars::{Meta, Random, Tar, Wildness, random};

/// A tar, the flags, and what the tool made of it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) tar: fn() -> Vec<u8>,
    pub(crate) overlay: bool,
    pub(crate) inline: bool,
    /// SHA-256 of the file system, root hash of its dm-verity tree, and SHA-256 of tree and footer without their ids:
    /// with a maximum disk of 16 GiB and of 128 GiB.
    pub(crate) golden: [Golden; 2],
}

/// See [`crate::image::Digests`].
pub(crate) type Golden = (&'static str, &'static str, &'static str);

/// The flags of a case.
const PLAIN: (bool, bool) = (false, false);
const OVERLAY: (bool, bool) = (true, false);
const BOTH: (bool, bool) = (true, true);

const fn case(name: &'static str, tar: fn() -> Vec<u8>, flags: (bool, bool), golden: [Golden; 2]) -> Case {
    Case { name, tar, overlay: flags.0, inline: flags.1, golden }
}

fn kinds() -> Vec<u8> {
    let device = |major, minor| Meta { device: (major, minor), ..Meta::default() };
    Tar::default()
        .dir("./")
        .dir("bin/")
        .file("bin/sh", &Random(1).bytes(10_000))
        .file("bin/empty", b"")
        .add(b"bin/suid", b'0', b"", b"x", &Meta::mode(0o6755))
        .link("bin/bash", "bin/sh")
        .link("z", "./bin/../bin/sh")
        .symlink("lib", "usr/lib")
        .symlink("long59", &"a/".repeat(29))
        .symlink("long60", &"b".repeat(60))
        .symlink("longest", &"c/".repeat(2047))
        .link("link-to-link", "long60")
        .add(b"null", b'3', b"", b"", &device(1, 3))
        .add(b"disk", b'4', b"", b"", &device(259, 70_000))
        .add(b"pipe", b'6', b"", b"", &Meta::default())
        .add(b"big-ids", b'0', b"", b"y", &Meta { uid: 4_000_000_000, gid: 3_000_000, ..Meta::default() })
        .add(&"n".repeat(255).into_bytes(), b'0', b"", b"", &Meta::default())
        .add("ü\\b".as_bytes(), b'5', b"", b"", &Meta::mode(0o1777))
        .end()
}

fn times() -> Vec<u8> {
    let at = |mtime: &str| Meta::default().pax("mtime", mtime);
    Tar::default()
        .add(b"nanos", b'0', b"", b"", &at("1700000000.123456789").pax("atime", "5.5").pax("ctime", "1"))
        .add(b"zero", b'5', b"", b"", &Meta { mtime: 0, ..Meta::default() })
        .add(b"2106", b'0', b"", b"", &at("4294967296"))
        .add(b"latest", b'0', b"", b"", &at("99999999999"))
        .add(b"earliest", b'0', b"", b"", &at("-99999999999"))
        .end()
}

fn xattrs() -> Vec<u8> {
    let full = Meta::default().xattr("user.full", [7; 96 - 20]).xattr("user.g", "");
    Tar::default()
        .add(b"one", b'0', b"", b"1", &Meta::default().xattr("user.a", "v"))
        .add(b"cap", b'0', b"", b"2", &Meta::default().xattr("security.capability", [1; 20]))
        .add(b"full", b'0', b"", b"3", &full)
        .add(
            b"block",
            b'0',
            b"",
            &[4; 5000],
            &Meta::default().xattr("user.big", [9; 3000]).xattr("trusted.t", "x"),
        )
        .add(b"most", b'5', b"", b"", &Meta::mode(0o700).xattr("user.most", [3; 4040]))
        .add(b"link", b'2', &[b'l'; 70], b"", &Meta::default().xattr("trusted.link", [5; 200]))
        .add(b"opaque", b'5', b"", b"", &Meta::mode(0o755).xattr("trusted.overlay.opaque", "y"))
        .add(b"fifo", b'6', b"", b"", &Meta::default().xattr("security.selinux", b"system_u:object_r:x:s0\0"))
        .end()
}

fn whiteouts() -> Vec<u8> {
    Tar::default()
        .dir("etc/")
        .file("etc/.wh.gone", b"")
        .file("new/parent/.wh.x", b"")
        .file("data/.wh..wh..opq", b"")
        .add(b"data/", b'5', b"", b"", &Meta::mode(0o711).xattr("user.a", "1"))
        .add(b"big/", b'5', b"", b"", &Meta::mode(0o711).xattr("user.b", [2; 500]))
        .file("big/.wh..wh..opq", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh.last", b"ignored")
        .end()
}

fn twice() -> Vec<u8> {
    Tar::default()
        .file("a/b/c/file", b"parents are missing")
        .add(b"a/b", b'5', b"", b"", &Meta::mode(0o710).xattr("user.x", "1"))
        .add(b"a/b/", b'5', b"", b"", &Meta::mode(0o700).xattr("user.y", "2"))
        .add(b"a/b", b'5', b"", b"", &Meta::mode(0o500).xattr("user.big", [1; 300]))
        .add(b"a/b", b'5', b"", b"", &Meta::mode(0o555))
        .file("empty", b"")
        .file("empty", b"now it has data")
        .symlink("link", "short")
        .add(b"link", b'6', b"", b"", &Meta::default())
        .file("one", b"1")
        .link("two", "one")
        .file("one", b"another inode")
        .link("three", "two")
        .link("two", "three")
        .add(b"lost+found", b'5', b"", b"", &Meta::mode(0o777))
        .add(
            b".",
            b'5',
            b"",
            b"",
            &Meta { mode: 0o750, uid: 5, gid: 0, mtime: 1_500_000_000, ..Meta::default() },
        )
        .file("later", b"takes the new root's owner")
        .file("fresh/one", b"")
        .end()
}

fn sizes() -> Vec<u8> {
    let mut tar = Tar::default();
    for size in [0, 1, 59, 60, 61, 64, 135, 136, 137, 4095, 4096, 4097] {
        let data = Random(size).bytes(size as usize);
        tar = tar.file(&format!("plain-{size}"), &data).add(
            format!("attr-{size}").as_bytes(),
            b'0',
            b"",
            &data,
            &Meta::default().xattr("user.some", [1; 30]),
        );
    }
    tar.end()
}

fn sparse() -> Vec<u8> {
    Tar::default()
        .sparse("holes", 100_000, &[(4096, &[1; 5000]), (70_000, &[2; 10])], Meta::default())
        .sparse("only-a-hole", 9000, &[], Meta::default())
        .end()
}

/// Six extents and so a leaf, and five groups.
fn large() -> Vec<u8> {
    Tar::default()
        .sparse("four", 512 << 20, &[(0, b"begin")], Meta::default())
        .sparse("leaf", (512 << 20) + 1, &[(512 << 20, b"e")], Meta::default())
        .file("after", b"x")
        .end()
}

/// More inodes than a group can have.
fn many() -> Vec<u8> {
    let mut tar = Tar::default();
    for i in 0..33_000 {
        tar = tar.file(&format!("d{}/{i}", i / 1000), b"");
    }
    tar.end()
}

/// Blocks of a directory that end in all ways.
fn names() -> Vec<u8> {
    let mut tar = Tar::default();
    for i in 0..700usize {
        tar = tar.file(&format!("{}{i}", "x".repeat(i % 250)), b"");
    }
    tar.dir("z").file("z/in", b"1").end()
}

/// What the facts page of this project's plan gives as the root of an empty tar, and of one folder.
fn empty() -> Vec<u8> {
    vec![0; 10_240]
}

fn root_folder() -> Vec<u8> {
    let meta = Meta { mode: 0o750, uid: 5, gid: 0, mtime: 1_500_000_000, ..Meta::default() };
    Tar::default().add(b"./", b'5', b"", b"", &meta).end()
}

fn tame() -> Vec<u8> {
    random(2, 120, Wildness::Tame)
}

/// All cases.
#[rustfmt::skip]
pub(crate) const CASES: &[Case] = &[
    case("empty", empty, OVERLAY, [
        ("a623b87bf0f4115924e5e1fd33e274770e2a0287bc660b8cd383029bff89ac4a", "5a021e8b10137bc7a7658670ccc4898eb1facffaa933aadd9cfe4bccc1f84f85", "577f56b50dc4d2903b4af193eaedb78965c092cf95c4dfb9fb7a421536d48e45"),
        ("ed92c1b95c950cd8cde5265b5bd97104f5b5f235fffe22fe5a0eaa1388860d45", "8b4842f06982817534a75bcf71865213b09dfa8313229c384e5201dadbd75e25", "8ebcf07ec3d1bf0d040bcab5734a203c12ac5fcd3ba72da305cd6ead0b93a843"),
    ]),
    case("root folder", root_folder, OVERLAY, [
        ("0768e9aec337719eb6ea5b298ccb9ce9cab6773a482933f3c8713e1d5a829fb1", "44f4327c3db569a33ee6a41cae4cbbf16f56342d53ef642b424e5ab68d0c0fa3", "57590c9c4c83fa590cad8926302ab9b005b179fcda15298fd8bf89f3f7129ea4"),
        ("dd92d0e50ad099c6f4195e26de71994308626e12250fa6ed0a282c529b989ebd", "eb2da4c7e0b0f420d939ff2e653c821ade1de04e40639809da7e413d4e05b75d", "05d95096242f5a3da3174718267e5d0484b3eb9284c5d2530c75801bfd21f7d3"),
    ]),
    case("kinds", kinds, PLAIN, [
        ("5fe2313a60537c8dd40568239b10b6ba627d0fe40b460844f6a6515eba5a3d7b", "5029eddb7f1527e935cd29801a4dd4f377038af87728f213a2a44c4470c65b36", "7bb7b373013ea3feb554ae914d8b5658986ce2357779133b38b77eb7f907ffd6"),
        ("0537db0fa45454d4b842a02fcf75c895883165db8f16555e5a158b3b7d50b9c3", "6493dffbc970c473167f7d6bf95ffa10edf6c1ee32d6054e44af3112133a114d", "392f7f42800400694db80fef12864d3af0cbdfc2964fd2db8968342bdcbd24c7"),
    ]),
    case("kinds, inline", kinds, BOTH, [
        ("35657a1516d11bb4ca775fd3ece343016d81a597dc7b15d244551da45d55d9aa", "9b22392b134df1bf1f1c803fb34ec08099f20bae915511fb1f59004d8916af82", "dd331ad0e8eeb16254646516a316cd04c455e29e5beeccd9bfdafbd12c89f869"),
        ("4409133395690263389a47ac16365b356a451db575f108e18da1c22e17aba3ee", "75d0d58da307a7fec32ac6f27a98bf1eb539d8b0f0b65654da12ec3ffa24ada6", "908aef107bdb11688d18f93a730d0c9d9421932c7687d0a4ee4493801fa1c133"),
    ]),
    case("times", times, OVERLAY, [
        ("58e0dbb57b049f4ec3dafd6253e1499ffc535a4004e685411804eb17407ff222", "f37de5604cdc142898205789d69c5409896b1422495c2e864974d3a68e15a8b1", "c15152892f85cc1576b65971b14a9cef5d46adb8ac90c52182aef25c3ad329cc"),
        ("7016c50e37afd242b6b9ff174a3a41414c908fd81a6265848f61894241790315", "459b2a4766af6419d149f3816419984bc6cbe5152a891716389ef6934a746324", "3f40c54931cc13acbcc8b0bac75e4816b78504ee00eb07b1f3a2fa1ba2dae7e8"),
    ]),
    case("xattrs", xattrs, OVERLAY, [
        ("689e050251aedcac97097d1fc0540746eb99cc1ec3c9fe0b328eaaf397371b8a", "44c32991d2930bd061f7200ed3810ffe9dbab7914f3df585f0174671d45d11de", "6e91513bbf31c458c36a991368c8096c63509e2e9f7ccc5c2dbe92f8e7a3f657"),
        ("15fff6ee3179e828a28d71c47bd8e86faec521ca9905e8feed7c3d7eaa7e48e2", "dc12db8f91fd76492a91d6b69d33d9ed3904f4e526798c0a8d19ac26fad72d09", "d0abbe2ee79dedd1d666e77de01115a984e0eb3dfbfdd620ecb228c7ad67066f"),
    ]),
    case("xattrs, inline", xattrs, BOTH, [
        ("ab6575cf06ec0c7f7291f5773fe56e428354ee94faf99da8ae4a68e95f730eb8", "f2b26d029da091462194bfd56e5c5c278dc4976fb22f1da921b8f8113b377f4f", "d1e14ff519de1a49480d45ddee48f78f67f3c1b947a33d6dec4d48ae0b2f54e4"),
        ("d969d8b83b6babaa49fe5ade4da5b4ca989ecd6dc417a0c33a935360f18c1065", "284f307874899eb7e06fad1747a3a7219e450fef1a741d67c8b91fc6cc76e8fd", "2f8ce219f960bd1ec09c36c7aacf7aaaadbcee940fadd9513ec0763f581cf1b4"),
    ]),
    case("whiteouts", whiteouts, OVERLAY, [
        ("c6d7cd4d745fd42e58ca792f49d1b3b4870316617835a6feedfb4b4eab02ab03", "686c2f21558354d04b2a5fe18fb80605b48002fcb5416c4cd96d7f5899fafdba", "bcab21dbcc1bbd7c411925a0db81724de9b6666c2edd2a89e1660ac9b48d5402"),
        ("15ad231c2f344517d44ceb61346f74594e3b849d4dc0f71e7ae4967aa2fa9f38", "0359f9f7beea68d1ef6c232b79ac520ec1fbb9ecd26101481f2abd4abf8beca1", "06b999a631d1a218d8eddec22ba9b1406e18ac2a9b5a321d9a617187c2863b88"),
    ]),
    case("whiteouts kept", whiteouts, PLAIN, [
        ("08a96f682a9a359bd997451bb9a3a4d74df05b536eb3dddd1fef49c63cd709a6", "05fe51df3527dda57e0b91eb7f5a54490e757ee6180f16ecd9d29277989ed8e6", "1217b1c009a9d820fe2502c9f11c3deb22c391be39593460b26deb73172aca87"),
        ("aecc40edd1323e19201b29abf9fd7ec4ea7a7c4c02b1f4031a0d715bf38a75fa", "dad3189e6dea832142b2c96de52267841fcd73fa0c1a84487f3a0231d8c47b52", "7023a09ef57615977fc4eeb0278d1f3fbef09d7d5df1a486c702dd5b82a92bb7"),
    ]),
    case("names twice", twice, OVERLAY, [
        ("d0e0df8f3d49a60ff5426342d51b7107ba2f28f21519ffd6e2fc3360d760478f", "d27837af99a9c08b796adc652c2d5d474ed41b8e074eecd8978d1fa13e76e83f", "e8064491992940823d7a685e84705ec42866bd06123577f3d69d0853839a601e"),
        ("7f746a0bcebd2b8dc3abba03b1baa559ec15d5aec63b18c6dfb600abb686cff4", "945bbef551f806d92c228329dc1f651eb2414137160380955ff802f40e192933", "8176e3e8fae78c12a47a42b7e32b4f9333d9987229ecc13713821dce360dd34c"),
    ]),
    case("sizes", sizes, PLAIN, [
        ("357c6710a0cb69865e7efa9d06429d8af42321bb5e988fe8318060f361f9797b", "1e1f184edd9dbd8089ad5ef56bc8051c92187e4619c6c0879ae57d88df0ef832", "b04341ae7478a233ed9b45e2f65539a13e06e45510474037d6d94b43c8b6e011"),
        ("13c8c7de212d0ff8f3648469fd0dc5779ee3bbf1640f832ad0641366a8b6db1e", "3e48b6ce0f9224e3814938b208eeb5dcf0f0443e52ff568758130079903a5cee", "c19514b702520ffa6ced086c6675fd44d217382b35729e5792c5a9383285e3f8"),
    ]),
    case("sizes, inline", sizes, BOTH, [
        ("f8f388e52131af071904cda7e19bc7961b7f13b21314ada0defdcb5cbe392868", "8dd60dede3ab63a1f996d8739e8cb7b07253354aa1bba1f3a1fd52ddc6cc5785", "10b85fc804ed734c8d74660ea8deabccc5c560b1af77d7a878e78b73c30d0124"),
        ("80cf171abd9b03280c73c0c03083372bc2b66322468e4d1f2b9f8ddc258914f6", "d277cb8e3affb85cd81d6e88e8d7c4c5df1153bfffe098a1517396488ea2f174", "6bbe5a77f96d0ff1a4f9fc582cff9d136e78ff585fb19351b61ee8743d7ece6e"),
    ]),
    case("sparse", sparse, OVERLAY, [
        ("c0b12211b4fef5b41444dfc05975ba027aa8bc8275b7fa69d76e2228528426e7", "66ddd5f64b6709d4cddca86185b8944f2e90a37e3a5eb727e371673d47a6f2f4", "1a84128c0edd5fc6adb13d24261f33be01186d66e05fcd3a0e6e688d86965d3f"),
        ("53671717c34f46e3a2c82b2f71f0d2e2f4bdd5b88bb30667baff08275e8e287f", "1d3d70ca6bb071213e43b1b8d554382838dda17d45d04852863556015094dd04", "09047a852f55ea3ac5182918f2bf20b70d95df644d4da6c1004237a390610430"),
    ]),
    case("large", large, OVERLAY, [
        ("656a67717809cacbee9e8b9e3b30e52b78c7b22f6a9d190842e20ea81d2b8ee4", "fc343a8bf3c4a481f67cf613de06c838691fcc905ffb11217f6d4aa436ecc09e", "874be46341f80b4ab7526ca8d75d73288dedf2ca61b02094076fa87153e35ce8"),
        ("51b213aa6efcf37bb484ec59c8f00040cc7e2d5ce8fccd4b759eee2e4067bbbb", "bab0329adc57e232c0e39e56127202dd678a6642255f92998e4dabe055cdbc30", "eccfc83b0a1a66b2242443f9e3c24b01368281017772a4b457e2b8af433fbe30"),
    ]),
    case("many", many, OVERLAY, [
        ("04a53516798aedc03942f25d4cda340d46617f695622ffdbda9cf64292475075", "f11f634ef69e000ade10409e14f725f90e2ec852af65247f53264423ef661cac", "6bf7a2948bfcbc32be5c3083c6f4079c29e3c8d79abd9c42f5aa2f0a5355e671"),
        ("2980fbefb1f8c9512b2b17ba499bd9eea3038ce8c042c1a101f5e6715cb1820b", "7a0b9a651a21a91635d39528e8606807093f9cda2c1b64ec9072baf6f1907340", "5277ad40c5ed8036cf3de5e15fa71f3758d84d4891e273804c555f8c3e23c41a"),
    ]),
    case("names", names, OVERLAY, [
        ("011b72480636db13a58d950679e41a13b3129f20670952ad8c5d9e50be1baac2", "9f853879b204451ddff59d1c9f7ec628c63aa4352a1300cba501654b3e62ae4a", "ed740d5b3a835cc32d89c34fd2eb771b96be1b25297e7731cb66da47cd538c03"),
        ("5dd8a67e198138078bf22f8aa5720a9f473c9d47cc3de52c8325e9df8612b9b0", "dd5ca2a79f42614ae80ffc0950bec2691b7c05cb5ed3453f534ee81316d8dcb7", "d29e12b5a59d607aea33427b15d61b124654847d55cbbde0678ed6189ae9a330"),
    ]),
    case("random", tame, OVERLAY, [
        ("63587a2cfdbb92ef2848507f0b14d9aa3794f94caceab8752e55693cc7cba1a9", "607d38c2873052e11fe8bbd946faa335f99ebf44d99e73e21cc15df22bc6c7d1", "b247ce2da90de50f3c5e0c7d2e384f7267753ff02be22f12a6e081c604687d0b"),
        ("0da1209bf239d3c245bc7f3a2291643eb26cf1d943adba94a8bf43eff7bda7b3", "6b8354a8b2c91f695ffbc6e6408c7b4c23494dc7f4877ade61190aff34f4779c", "a754d01eaba678f231b7860b1cd71f51e4f877b9956972f01c04ce2eea9756b0"),
    ]),
    case("random, inline", tame, BOTH, [
        ("f7a70cf3ebbca8ef99ac59a7c78faea3dc58934d5a4db118b03e9843e00e4d09", "03cf582a8a5bd9e8e145fde4e7aed96019b208c1bf6e66f880fb9dbb9cea068c", "f2d67ab5966d75a0de485f053c9cbcd54166012170622573434c51d53c90291a"),
        ("5973b4754c205cce1a7b61ba8a1b071797c80744beda45ff6d0c54ed5bc0671d", "1c83b1f32876a90963956c7c1e7edda73829255a3be296a2709734bd0c1ae50e", "d65b950036e97e6ee38ec11e50dd6c7705bad2cb57e5a058bfe727711ecd604a"),
    ]),
];
