//! Images of registries: the distribution's registry, plain, with TLS and with passwords; connections that are cut; servers
//! that are wrong or hostile.

mod fake;
mod server;

use crate::{Scene, sample};
use fake::{Answer, Body, Fake, Request, right};
use oci_image::{
    Digest,
    testing::{Packing, Store, Tar},
};
use serde_json::{Value, json};
use server::{Proxy, Server, certificates};
use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// The password of the user `ali`.
const PASSWORD: &str = "open sesame";
/// Its line in a file of htpasswd.
const HTPASSWD: &str = "ali:$2b$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n";
/// `ali:open sesame` in base64.
const BASIC: &str = "YWxpOm9wZW4gc2VzYW1l";

/// A cache, and a file with credentials that is not there at first.
struct Client {
    scene: Scene,
}

impl Client {
    fn new() -> Self {
        Self { scene: Scene::new() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = crate::image(&arguments[..1]);
        command.arg("--cache").arg(self.scene.path("cache")).args(&arguments[1..]);
        command.env("REGISTRY_AUTH_FILE", self.scene.path("auth.json")).env_remove("DOCKER_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The output of a command that must succeed.
    fn ok(&self, arguments: &[&str]) -> Vec<u8> {
        let done = self.run(arguments);
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(String::from_utf8_lossy(&done.stderr), "", "{arguments:?}");
        done.stdout
    }

    fn text(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.ok(arguments)).unwrap()
    }

    /// The message of a command that must fail.
    fn fails(&self, arguments: &[&str]) -> String {
        crate::failed(arguments, &self.run(arguments))
    }

    /// The place of a blob in the cache.
    fn cached(&self, digest: &Digest) -> PathBuf {
        self.scene.path("cache").join("blobs").join("sha256").join(digest.hex())
    }

    /// The names of the blobs in the cache.
    fn blobs(&self) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.scene.path("cache/blobs/sha256")) else { return BTreeSet::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Writes the file with credentials.
    fn log_in(&self, content: &Value) {
        fs::write(self.scene.path("auth.json"), content.to_string()).unwrap();
    }
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let step = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

/// An image with one plain layer of 300 KB, and the digest of this layer.
fn large() -> (Store, Digest) {
    let tar = Tar::default().file("noise", &noise(300_000)).finish();
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &[(&tar, Packing::Plain)]);
    store.list(manifest, "");
    (store, Digest::sha256(&tar))
}

fn plain(port: u16, name: &str) -> String {
    format!("docker://127.0.0.1:{port}/{name}")
}

#[test]
fn an_image_of_a_registry_is_read_as_a_layout_of_it() {
    let client = Client::new();
    let store = sample(Packing::Gzip);
    let layout = client.scene.layout("layout", &store);
    let server = Server::start(&client.scene, "storage", "");
    server.push(&store, "team/app", &store.entries[0], "1.0");
    let by_tag = plain(server.port, "team/app:1.0");
    let by_digest = plain(server.port, &format!("team/app@{}", store.entries[0].digest));
    for source in [&by_tag, &by_digest] {
        let at = |command: &str, more: &[&str]| {
            client.ok(&[&[command, "--plain-http", source][..], more].concat())
        };
        assert_eq!(at("ls", &["-R"]), crate::ok(&["ls", "-R", &layout]));
        assert_eq!(at("cat", &["bin/ash"]), crate::ok(&["cat", &layout, "bin/ash"]));
        assert_eq!(client.text(&["diff", "--plain-http", source, &layout]), "");
        let inspected: Value = serde_json::from_slice(&at("inspect", &["--json"])).unwrap();
        let expected = crate::json(&["inspect", "--json", &layout]);
        for field in ["config", "manifest", "layers"] {
            assert_eq!(inspected[field], expected[field], "{field}");
        }
    }
    let missing = client.fails(&["ls", "--plain-http", &plain(server.port, "team/app:2.0")]);
    assert!(missing.contains("has no manifest \"2.0\" in team/app"), "{missing}");
    let port = server.port;
    drop(server);
    // What a digest names is in the cache; a tag must be asked for.
    assert_eq!(client.ok(&["ls", "-R", "--plain-http", &by_digest]), crate::ok(&["ls", "-R", &layout]));
    let refused = client.fails(&["ls", "--plain-http", &by_tag]);
    assert!(refused.contains(&format!("cannot connect to 127.0.0.1:{port}")), "{refused}");
    assert!(refused.contains("onnection refused"), "{refused}");
}

#[test]
fn of_several_platforms_the_right_one_is_fetched_and_no_other() {
    let client = Client::new();
    let mut store = Store::default();
    let of = |store: &mut Store, platform: &str| {
        let tar = Tar::default().file("platform", platform.as_bytes()).finish();
        store.manifest(platform, &[(&tar, Packing::Gzip)])
    };
    let mut entries: Vec<_> =
        ["linux/amd64", "linux/arm/v6", "linux/arm/v7"].iter().map(|p| of(&mut store, p)).collect();
    let mut attestation = of(&mut store, "linux/arm/v8");
    attestation.annotations.insert("vnd.docker.reference.type".into(), "attestation-manifest".into());
    entries.push(attestation);
    let index = store.index(&entries);
    let server = Server::start(&client.scene, "storage", "");
    server.push(&store, "app", &index, "latest");
    let source = plain(server.port, "app");
    let cat =
        |platform: &str| client.text(&["cat", "--plain-http", "--platform", platform, &source, "platform"]);
    assert_eq!(cat("linux/arm/v7"), "linux/arm/v7");
    // Index, manifest, configuration and layer.
    assert_eq!(client.blobs().len(), 4, "{:?}", client.blobs());
    assert_eq!(cat("linux/arm/v8"), "linux/arm/v7", "an attestation is no image");
    assert_eq!(cat("linux/arm/v6"), "linux/arm/v6");
    let none = client.fails(&["ls", "--plain-http", "--platform", "linux/s390x", &source]);
    assert!(none.contains("linux/arm/v7") && none.contains("--platform"), "{none}");
}

#[test]
fn disks_and_commits_are_those_of_the_layout() {
    let client = Client::new();
    let store = sample(Packing::Zstd);
    let layout = client.scene.layout("layout", &store);
    let server = Server::start(&client.scene, "storage", "");
    server.push(&store, "app", &store.entries[0], "1.0");
    let source = plain(server.port, "app:1.0");
    let path = |name: &str| client.scene.path(name).into_os_string().into_string().unwrap();
    client.ok(&["pack", "--plain-http", "--size", "32MiB", &source, &path("a.img")]);
    crate::ok(&["pack", "--size", "32MiB", &layout, &path("b.img")]);
    assert!(fs::read(path("a.img")).unwrap() == fs::read(path("b.img")).unwrap());
    assert_eq!(fs::read(path("a.img.json")).unwrap(), {
        let text = fs::read_to_string(path("b.img.json")).unwrap();
        text.replace("b.img", "a.img").into_bytes()
    });
    let to = format!("oci:{}:2.0", path("committed"));
    client.ok(&["commit", &path("a.img"), "--plain-http", "--base", &source, "--to", &to]);
    assert_eq!(client.text(&["ls", "-R", &to]), client.text(&["ls", "-R", "--plain-http", &source]));
}

#[test]
fn tls_needs_an_authority_that_is_trusted() {
    let client = Client::new();
    let store = sample(Packing::Gzip);
    let filling = Server::start(&client.scene, "storage", "");
    filling.push(&store, "app", &store.entries[0], "1.0");
    certificates(&client.scene.path(""));
    let path = |name: &str| client.scene.path(name).into_os_string().into_string().unwrap();
    let tls = format!("  tls:\n    certificate: {}\n    key: {}\n", path("cert.pem"), path("key.pem"));
    let server = Server::start(&client.scene, "storage", &tls);
    let source = plain(server.port, "app:1.0");
    let unknown = client.fails(&["ls", &source]);
    assert!(unknown.contains("the certificate of 127.0.0.1:") && unknown.contains("--ca"), "{unknown}");
    let trusted = client.ok(&["ls", "-R", "--ca", &path("ca.pem"), &source]);
    assert_eq!(trusted, crate::ok(&["ls", "-R", &client.scene.layout("layout", &store)]));
    let no_tls = client.fails(&["ls", "--ca", &path("ca.pem"), &plain(filling.port, "app:1.0")]);
    assert!(no_tls.contains("does not speak TLS") && no_tls.contains("--plain-http"), "{no_tls}");
    fs::write(path("no.pem"), "no certificate").unwrap();
    let no_pem = client.fails(&["ls", "--ca", &path("no.pem"), &source]);
    assert!(no_pem.contains("no.pem") && no_pem.contains("PEM"), "{no_pem}");
}

#[test]
fn passwords_come_from_files_and_helpers_and_stand_in_no_message() {
    let client = Client::new();
    let store = sample(Packing::Gzip);
    let filling = Server::start(&client.scene, "storage", "");
    filling.push(&store, "app", &store.entries[0], "1.0");
    let file = client.scene.file("htpasswd", HTPASSWD.as_bytes());
    let server = Server::start(
        &client.scene,
        "storage",
        &format!("auth:\n  htpasswd:\n    realm: test\n    path: {file}\n"),
    );
    let source = plain(server.port, "app:1.0");
    let arguments = ["ls", "-R", "--plain-http", &source];
    let host = format!("127.0.0.1:{}", server.port);
    let none = client.fails(&arguments);
    assert!(none.contains(&format!("docker login {host}")) && none.contains("auth.json"), "{none}");
    client.log_in(&json!({ "auths": { &host: { "auth": "YWxpOndyb25nIHBhc3N3b3Jk" } } }));
    let wrong = client.fails(&arguments);
    assert!(wrong.contains("do not suffice") && !wrong.contains("wrong password"), "{wrong}");
    assert!(!wrong.contains("YWxp"), "{wrong}");
    client.log_in(&json!({ "auths": { &host: { "auth": BASIC } } }));
    let expected = client.ok(&arguments);
    // A helper, which is asked for the host.
    let bin = client.scene.path("bin");
    fs::create_dir(&bin).unwrap();
    let helper = bin.join("docker-credential-of-test");
    let script = |reply: &str| {
        let text = format!("#!/bin/sh\n[ \"$1 $(cat)\" = 'get {host}' ] || exit 1\n{reply}\n");
        let source = client.scene.file("helper", text.as_bytes());
        // Made by another process: a fork of this one may still have a file open that it writes, and then it is busy.
        let done = Command::new("install").args(["-m", "755", &source]).arg(&helper).status().unwrap();
        assert!(done.success());
    };
    let with_helper = || {
        let mut command = client.command(&arguments);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let all = [bin.clone()].into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(all).unwrap()).output().unwrap()
    };
    client.log_in(&json!({ "credsStore": "of-test", "auths": {} }));
    script(&format!("echo '{{\"ServerURL\":\"x\",\"Username\":\"ali\",\"Secret\":\"{PASSWORD}\"}}'"));
    let done = with_helper();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(done.stdout, expected);
    script("echo 'the vault is locked'; exit 1");
    let message = crate::failed(&arguments, &with_helper());
    assert!(message.contains("docker-credential-of-test") && message.contains("locked"), "{message}");
    script("echo 'credentials not found in native keychain'; exit 1");
    let message = crate::failed(&arguments, &with_helper());
    assert!(message.contains("there are no credentials"), "{message}");
}

#[test]
fn a_cut_connection_is_continued_and_the_whole_is_right() {
    let client = Client::new();
    let (store, layer) = large();
    let server = Server::start(&client.scene, "storage", "");
    server.push(&store, "app", &store.entries[0], "1.0");
    let cutter = Proxy::that_cuts(server.port, &[100_000, 90_000]);
    let source = plain(cutter.port, "app:1.0");
    assert!(client.ok(&["cat", "--plain-http", &source, "noise"]) == noise(300_000));
    assert!(cutter.connections() >= 3, "{}", cutter.connections());
    assert!(fs::read(client.cached(&layer)).unwrap() == store.blobs[&layer]);
    assert!(client.blobs().iter().all(|name| !name.contains('.')), "{:?}", client.blobs());
}

#[test]
fn what_was_fetched_before_a_failure_is_kept_and_not_fetched_again() {
    let client = Client::new();
    let (store, layer) = large();
    let path = format!("/v2/app/blobs/{layer}");
    let length = store.blobs[&layer].len();
    let requests = Arc::new(AtomicUsize::new(0));
    let (answers, counter, wanted) = (store.clone(), Arc::clone(&requests), path.clone());
    // The first reply ends early, the next ones at once; then the registry is well again.
    let server = Fake::start(move |request| {
        let mut answer = right(&answers, request);
        if request.path == wanted && counter.fetch_add(1, Ordering::Relaxed) < 4 {
            let Body::Whole(bytes) = std::mem::replace(&mut answer.body, Body::Endless) else { panic!() };
            let most = if request.from() == 0 { 100_000 } else { 0 };
            answer.body = Body::Cut(bytes, most);
        }
        answer
    });
    let arguments = ["cat", "--plain-http", &plain(server.port, "app"), "noise"];
    let message = client.fails(&arguments);
    assert!(message.contains(&format!("lost after 100000 of {length} bytes")), "{message}");
    assert!(!client.cached(&layer).exists());
    assert!(client.ok(&arguments) == noise(300_000));
    let starts: Vec<usize> =
        server.requests().iter().filter(|request| request.path == path).map(Request::from).collect();
    assert_eq!(starts, [0, 100_000, 100_000, 100_000, 100_000]);
}

#[test]
fn a_blob_that_is_wrong_after_a_resumption_is_fetched_as_a_whole() {
    let client = Client::new();
    let (store, layer) = large();
    let answers = store.clone();
    let server = Fake::start(move |request| right(&answers, request));
    let arguments = ["cat", "--plain-http", &plain(server.port, "app"), "noise"];
    // A crash may leave a part whose length is right and whose bytes are not.
    let part = client.cached(&layer).with_extension("part");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, vec![0; 200_000]).unwrap();
    assert!(client.ok(&arguments) == noise(300_000));
    assert!(fs::read(client.cached(&layer)).unwrap() == store.blobs[&layer]);
    let starts: Vec<usize> = server
        .requests()
        .iter()
        .filter(|request| request.path.ends_with(&layer.to_string()))
        .map(Request::from)
        .collect();
    assert_eq!(starts, [200_000, 0]);
    // One that is longer than the blob, or has all its bytes, is no better.
    for len in [store.blobs[&layer].len(), 1 << 20] {
        fs::remove_file(client.cached(&layer)).unwrap();
        fs::write(&part, vec![0; len]).unwrap();
        assert!(client.ok(&arguments) == noise(300_000));
    }
}

#[test]
fn commands_that_need_the_same_blob_fetch_it_once() {
    let client = Client::new();
    let (store, layer) = large();
    let server = Fake::start(move |request| right(&store, request));
    let arguments = ["cat", "--plain-http", &plain(server.port, "app"), "noise"];
    let children: Vec<_> = (0..4)
        .map(|_| {
            let mut command = client.command(&arguments);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let done: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    for done in done {
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(done.stdout == noise(300_000));
    }
    let fetched = server.requests().iter().filter(|r| r.path.ends_with(&layer.to_string())).count();
    assert_eq!(fetched, 1);
}

#[test]
fn a_proxy_of_the_environment_leads_to_hosts_that_are_not_loopback() {
    const HOST: &str = "registry.invalid:5000";
    let client = Client::new();
    let (store, _) = large();
    let server = Fake::start(move |request| right(&store, request));
    let proxy = Proxy::for_host(HOST, server.port);
    let source = format!("docker://{HOST}/app");
    let arguments = ["cat", "--plain-http", &source, "noise"];
    let through = |variable: &str, value: String| client.command(&arguments).env(variable, value).output();
    let done = through("HTTP_PROXY", format!("http://127.0.0.1:{}", proxy.port)).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.stdout == noise(300_000));
    assert!(proxy.connections() > 0);
    let wrong = through("HTTP_PROXY", "http://user:secret@[".to_owned()).unwrap();
    let message = crate::failed(&arguments, &wrong);
    assert!(message.contains("HTTP_PROXY") && !message.contains("secret"), "{message}");
    // A registry on loopback is asked itself.
    let direct = plain(server.port, "app:2");
    let mut command = client.command(&["ls", "--plain-http", &direct]);
    let before = proxy.connections();
    let done = command.env("HTTP_PROXY", format!("http://127.0.0.1:{}", proxy.port)).output().unwrap();
    assert!(done.status.success() && proxy.connections() == before);
}

#[test]
fn wrong_bytes_are_never_in_the_cache_under_their_name() {
    let client = Client::new();
    let (store, layer) = large();
    let answers = store.clone();
    let server = Fake::start(move |request| {
        let mut answer = right(&answers, request);
        if let Body::Whole(bytes) = &mut answer.body
            && bytes.len() > 100_000
        {
            bytes[70_000] ^= 1;
        }
        answer
    });
    let message = client.fails(&["cat", "--plain-http", &plain(server.port, "app"), "noise"]);
    assert!(message.contains("digest mismatch of blob") && message.contains("corrupt"), "{message}");
    assert!(message.contains("127.0.0.1") && !client.cached(&layer).exists(), "{message}");
    // Also if the connection is cut each time.
    let answers = store.clone();
    let cut = Fake::start(move |request| {
        let mut answer = right(&answers, request);
        if let Body::Whole(bytes) = &mut answer.body
            && bytes.len() > 100_000
        {
            let mut bytes = std::mem::take(bytes);
            bytes[70_000] ^= 1;
            answer.body = Body::Cut(bytes, 90_000);
        }
        answer
    });
    let message = client.fails(&["cat", "--plain-http", &plain(cut.port, "app"), "noise"]);
    assert!(message.contains("digest mismatch of blob") && !client.cached(&layer).exists(), "{message}");
    // A manifest that is not the one that was asked for.
    let answers = store.clone();
    let other = Fake::start(move |request| {
        let mut answer = right(&answers, request);
        answer.headers.clear();
        answer
    });
    let source = plain(other.port, &format!("app@{}", Digest::sha256(b"another")));
    let message = client.fails(&["ls", "--plain-http", &source]);
    assert!(message.contains("digest mismatch of manifest"), "{message}");
}

#[test]
fn hostile_registries_are_limited_and_named() {
    let (store, layer) = large();
    let redirect = |to: &str| Answer::new(307, "").with("Location", to);
    type Case = (&'static str, Box<dyn Fn(&Store, &Request) -> Answer + Send + Sync>);
    let of_layer = move |request: &Request| request.path.ends_with(&layer.to_string());
    let body = move |store: &Store| store.blobs[&layer].clone();
    let cases: Vec<Case> = vec![
        ("exceeds a limit: more than 8388608 bytes", Box::new(|_, _| Answer::body(Body::Endless))),
        (
            "exceeds a limit: more than 8388608 bytes",
            Box::new(|_, _| Answer::body(Body::Lie(Vec::new(), 1 << 40))),
        ),
        ("more than 10 redirects", Box::new(move |_, request| redirect(&request.path))),
        ("a redirect without a usable location", Box::new(move |_, _| redirect("file:///etc/passwd"))),
        ("not the expected JSON", Box::new(|_, _| Answer::new(200, "<html>"))),
        ("answered 503", Box::new(|_, _| Answer::new(503, "come back later\u{1b}[2J"))),
        (
            "names no way to log in",
            Box::new(|_, _| Answer::new(401, "").with("WWW-Authenticate", "Negotiate")),
        ),
        (
            "size mismatch",
            Box::new(move |store, request| {
                let longer = Answer::body(Body::Lie(body(store), 1 << 40));
                if of_layer(request) { longer } else { right(store, request) }
            }),
        ),
        (
            "size mismatch",
            Box::new(move |store, request| {
                if of_layer(request) { Answer::new(200, &body(store)[1..]) } else { right(store, request) }
            }),
        ),
        (
            "size mismatch",
            Box::new(
                move |store, request| {
                    if of_layer(request) { Answer::body(Body::Endless) } else { right(store, request) }
                },
            ),
        ),
        (
            "lost after 0 of",
            Box::new(move |store, request| {
                let nothing = Answer::body(Body::Cut(body(store), 0));
                if of_layer(request) { nothing } else { right(store, request) }
            }),
        ),
        (
            "not the bytes from 5 on",
            Box::new(move |store, request| {
                let wrong = |at: &str| Answer::new(206, "x").with("Content-Range", at);
                match (of_layer(request), request.from()) {
                    (false, _) => right(store, request),
                    (true, 0) => Answer::body(Body::Cut(body(store), 5)),
                    (true, _) => wrong("bytes 7-8/9"),
                }
            }),
        ),
        (
            "status 206",
            Box::new(
                move |store, request| {
                    if of_layer(request) { Answer::new(206, body(store)) } else { right(store, request) }
                },
            ),
        ),
    ];
    for (expected, answer) in cases {
        let (client, store) = (Client::new(), store.clone());
        let server = Fake::start(move |request| answer(&store, request));
        let message = client.fails(&["cat", "--plain-http", &plain(server.port, "app:1"), "noise"]);
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(message.contains(&format!("127.0.0.1:{}", server.port)), "{message}");
        assert!(!message.contains('\u{1b}'), "{message}");
        assert!(!client.cached(&layer).exists(), "{expected}");
    }
}

/// A registry that wants tokens of another server.
fn with_tokens(store: &Store, realm: u16, blobs: Option<u16>) -> Fake {
    let store = store.clone();
    Fake::start(move |request| {
        if request.header("authorization") != Some("Bearer a.token") {
            let challenge = format!("Bearer realm=\"http://127.0.0.1:{realm}/token\",service=\"a registry\"");
            return Answer::new(401, "").with("WWW-Authenticate", challenge);
        }
        match blobs {
            Some(port) if request.path.contains("/blobs/") => Answer::new(307, "")
                .with("Location", format!("http://127.0.0.1:{port}{}?signed=yes", request.path)),
            _ => right(&store, request),
        }
    })
}

#[test]
fn tokens_are_fetched_and_credentials_stay_where_they_belong() {
    let client = Client::new();
    let (store, _) = large();
    let service = Fake::start(|request| {
        let basic = request.header("authorization") == Some(format!("Basic {BASIC}").as_str());
        let identity = request.body.contains("refresh_token=an-identity");
        if basic || identity {
            Answer::new(200, r#"{"access_token":"a.token"}"#)
        } else {
            Answer::new(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you?"}]}"#)
        }
    });
    let blobs = {
        let store = store.clone();
        Fake::start(move |request| {
            let path = request.path.trim_end_matches("?signed=yes").to_owned();
            right(&store, &Request { path, ..request.clone() })
        })
    };
    let server = with_tokens(&store, service.port, Some(blobs.port));
    let arguments = ["cat", "--plain-http", &plain(server.port, "app:1"), "noise"];
    let none = client.fails(&arguments);
    assert!(none.contains("who are you?") && none.contains("docker login 127.0.0.1:"), "{none}");
    let host = format!("127.0.0.1:{}", server.port);
    client.log_in(&json!({ "auths": { &host: { "auth": BASIC } } }));
    assert!(client.ok(&arguments) == noise(300_000));
    for request in service.requests() {
        assert_eq!(request.path, "/token?scope=repository%3Aapp%3Apull&service=a%20registry");
    }
    // The token is asked for once in each run, and shown to nobody else.
    assert_eq!(service.requests().len(), 2);
    assert!(blobs.requests().len() >= 2);
    for request in blobs.requests() {
        assert_eq!(request.header("authorization"), None, "{}", request.path);
    }
    for request in server.requests() {
        assert_ne!(request.header("authorization"), Some(&*format!("Basic {BASIC}")), "{}", request.path);
    }
    // An identity token, as the registries of clouds give them.
    client.log_in(&json!({ "auths": { &host: { "identitytoken": "an-identity" } } }));
    fs::remove_dir_all(client.scene.path("cache")).unwrap();
    assert!(client.ok(&arguments) == noise(300_000));
}

#[test]
fn without_the_option_nothing_is_sent_in_plain_text() {
    let client = Client::new();
    let server = Fake::start(|_| Answer::new(200, "{}"));
    client.log_in(&json!({ "auths": { format!("127.0.0.1:{}", server.port): { "auth": BASIC } } }));
    // What it sees is the first message of TLS.
    client.fails(&["ls", &plain(server.port, "app:1")]);
    assert!(server.requests().iter().all(|request| request.header("authorization").is_none()));
}
