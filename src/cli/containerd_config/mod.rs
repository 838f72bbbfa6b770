//! `containerd-config`: prints the configuration that containerd needs to use this service, and checks an existing one.
//!
//! ```text
//!   options, `containerd --version` ─► face ─► text    a drop-in, or the main file with the sections merged in
//!                                        │
//!   FILE and its imports, or a dump ─► load ─► check   one line per finding; status 1 if there is an error
//! ```
//!
//! Nothing is written and no service is asked, so it works before either runs. The main file and its imports are read
//! with the caller's rights. Called by `cli`.

mod check;
mod face;
mod load;
mod text;

use super::CliError;
use clap::Args;
use face::{Engine, Face, Format, Runtime, System};
use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

/// Where the containerd face listens on Linux.
const SOCKET: &str = "/run/lcow/containerd.sock";
/// Where the containerd face listens on Windows. containerd sends the name as the authority of each HTTP/2 request;
/// only behind an `@` may it contain what a pipe's name does.
const PIPE: &str = r"\\.\pipe\lcow@localhost";
/// The layers of containerd's images and containers, on Linux.
const ROOT: &str = "/var/lib/lcow/containerd";
/// The layers of containerd's images and containers, on Windows.
const WINDOWS_ROOT: &str = r"C:\ProgramData\lcow\containerd";
/// The runtime handler of Linux containers on Windows.
const RUNHCS: &str = "runhcs-lcow";
/// Largest configuration that is read from standard input, in bytes; containerd's own are some kilobytes.
const MAX_INPUT: u64 = 16 << 20;
/// The name of standard input.
const STDIN: &str = "-";

/// Arguments of `containerd-config`.
#[derive(Debug, Args)]
pub(super) struct ContainerdConfigArgs {
    /// The version of containerd, such as 2.1; by default, what `containerd --version` prints.
    #[arg(long, value_name = "VERSION", conflicts_with = "containerd")]
    containerd_version: Option<Engine>,
    /// The containerd whose version is asked for.
    #[arg(long, value_name = "PROGRAM", default_value = "containerd")]
    containerd: PathBuf,
    /// Version of the configuration file, 2 or 3; by default, the newest that this containerd reads. A drop-in must have
    /// the version of the main file.
    #[arg(long, value_name = "2|3", value_parser = format_number)]
    config_version: Option<Format>,
    /// The socket (Windows: the pipe) of `serve --containerd-socket`.
    #[arg(long, value_name = "SOCKET")]
    containerd_socket: Option<String>,
    /// The directory of `serve --containerd-root`.
    #[arg(long, value_name = "DIRECTORY")]
    containerd_root: Option<String>,
    /// The operating system of containerd; by default, that of this program.
    #[arg(long, value_enum, default_value_t = THIS_SYSTEM)]
    os: System,
    /// Platform of the images; by default, Linux on this machine's architecture.
    #[arg(long, value_name = "OS/ARCHITECTURE", value_parser = platform)]
    platform: Option<String>,
    /// Name of the snapshotter; the differ's name is this one with -diff behind it.
    #[arg(long, default_value = "lcow", value_parser = name)]
    name: String,
    /// Makes it the snapshotter of pods and of requests that name none. On Windows, of the runtime handler runhcs-lcow.
    #[arg(long)]
    default: bool,
    /// A runtime handler of CRI that uses it: NAME of one that exists, NAME=TYPE for a new one; can be repeated.
    #[arg(long, value_name = "NAME[=TYPE]")]
    runtime: Vec<Runtime>,
    /// Layers of an image to unpack at once (containerd 2.2 and later).
    #[arg(long, value_name = "NUMBER", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    unpacks: u32,
    /// Prints this file with the sections merged in, instead of a drop-in.
    #[arg(long, value_name = "FILE", conflicts_with = "check")]
    into: Option<PathBuf>,
    /// Checks this file and what it imports, or a `containerd config dump` on standard input (-); exits with 1 if there is
    /// an error.
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

#[cfg(not(windows))]
const THIS_SYSTEM: System = System::Linux;
#[cfg(windows)]
const THIS_SYSTEM: System = System::Windows;

fn format_number(text: &str) -> Result<Format, String> {
    text.parse().ok().and_then(Format::from_number).ok_or_else(|| "expected 2 or 3".into())
}

fn platform(text: &str) -> Result<String, String> {
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
    match text.split('/').collect::<Vec<_>>()[..] {
        [os, arch] | [os, arch, _] if plain(os) && plain(arch) => Ok(text.into()),
        _ => Err("expected OS/ARCHITECTURE, such as linux/amd64".into()),
    }
}

/// A name that needs no quotes in TOML.
fn name(text: &str) -> Result<String, String> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) {
        Ok(text.into())
    } else {
        Err("expected letters, digits, - and _".into())
    }
}

pub(super) fn run(args: &ContainerdConfigArgs) -> Result<ExitCode, CliError> {
    if let Some(file) = &args.check {
        return check_file(args, file);
    }
    let engine = engine(args)?;
    if let Some(file) = &args.into {
        let text = read(file)?;
        let format = load::merged_text(file, &text)?.format();
        let format = format.filter(|format| *format <= engine.format()).ok_or_else(|| {
            format!("{}: containerd {engine} needs version = {}", file.display(), engine.format().number())
        })?;
        let face = face(args, engine, format);
        let merged = text::into(&face, &text).map_err(|e| format!("{}: {e}", file.display()))?;
        return print(&merged);
    }
    let format = args.config_version.unwrap_or(engine.format());
    if format > engine.format() {
        return Err(
            format!("containerd {engine} reads no version later than {}", engine.format().number()).into()
        );
    }
    let face = face(args, engine, format);
    if text::cri_is_comment(&face) {
        eprintln!(
            "lcow-graphdriver: note: CRI's section is a comment, because containerd {engine} would replace the main \
             file's; --into FILE merges it"
        );
    }
    print(&text::drop_in(&face))
}

fn face(args: &ContainerdConfigArgs, engine: Engine, format: Format) -> Face {
    let windows = args.os == System::Windows;
    let or = |value: &Option<String>, unix: &str, other: &str| {
        value.clone().unwrap_or_else(|| if windows { other } else { unix }.to_owned())
    };
    let mut runtimes = args.runtime.clone();
    if windows && args.default && runtimes.iter().all(|runtime| runtime.name != RUNHCS) {
        runtimes.push(Runtime { name: RUNHCS.into(), shim: None });
    }
    Face {
        engine,
        format,
        system: args.os,
        address: or(&args.containerd_socket, SOCKET, PIPE),
        root: or(&args.containerd_root, ROOT, WINDOWS_ROOT),
        platform: args.platform.clone().unwrap_or_else(|| format!("linux/{}", architecture())),
        name: args.name.clone(),
        default: args.default,
        runtimes,
        unpacks: args.unpacks,
    }
}

/// This machine's architecture, as Go and OCI name it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The engine's version, from the arguments or from the program itself.
fn engine(args: &ContainerdConfigArgs) -> Result<Engine, CliError> {
    if let Some(engine) = args.containerd_version {
        return Ok(engine);
    }
    let program = args.containerd.display();
    let remedy = "name another program with --containerd, or the version with --containerd-version";
    let output = Command::new(&args.containerd)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {program} to learn its version; {remedy}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{program} --version failed ({}); {remedy}", output.status).into());
    }
    Engine::from_output(&String::from_utf8_lossy(&output.stdout))
        .map_err(|e| format!("{program} --version: {e}; {remedy}").into())
}

fn check_file(args: &ContainerdConfigArgs, file: &Path) -> Result<ExitCode, CliError> {
    let known = match engine(args) {
        Ok(engine) => Some(engine),
        // A file can be checked on a machine without containerd.
        Err(error) if args.containerd_version.is_none() && args.containerd == Path::new("containerd") => {
            eprintln!("lcow-graphdriver: note: the version of containerd is inferred from the file: {error}");
            None
        }
        Err(error) => return Err(error),
    };
    let loaded = if file == Path::new(STDIN) {
        load::merged_text(file, &read(file)?)?
    } else {
        load::with_imports(file, known)?
    };
    let format = loaded.format();
    let engine = known.unwrap_or(match format {
        Some(Format::V3) => face::PARALLEL_UNPACK,
        _ => face::OLDEST,
    });
    let face = face(args, engine, format.unwrap_or(engine.format()));
    let findings = check::check(&face, &loaded);
    let errors = findings.iter().filter(|finding| finding.severity == check::Severity::Error).count();
    let mut lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    if errors == 0 {
        let files = loaded.files.len();
        lines.push(format!("no errors: containerd {engine}, snapshotter {}, files read: {files}", face.name));
    }
    let printed = print(&(lines.join("\n") + "\n"))?;
    Ok(if errors == 0 { printed } else { ExitCode::FAILURE })
}

/// The text of a file, or of standard input.
fn read(file: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let read = if file == Path::new(STDIN) {
        io::stdin().take(MAX_INPUT).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(MAX_INPUT).read_to_string(&mut text))
    };
    read.map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    Ok(text)
}

/// Writes to standard output; a reader that has closed it gets the exit status of a shell's closed pipe.
fn print(text: &str) -> Result<ExitCode, CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::from(super::layer::CLOSED_PIPE)),
        Err(e) => Err(e.into()),
    }
}
