//! The QEMU backend: a real virtual machine for layer bytes, on Linux.
//!
//! ```text
//!   find ─ QEMU, KVM or TCG ─► machine ─ command line, process by `launch` ─► template ─ saved once, restored in 0.2 s
//!                                                                               └─► vm ─ disks by descriptor, channels
//! ```
//!
//! The guest consists of the kernel of a distribution package and the agent (`scripts/build-svm-image`). QEMU runs as a
//! separate user, without network, capabilities or paths, behind its own system-call filter; everything that it uses is
//! a descriptor. It dies with the daemon and owns nothing that has a name, so a killed daemon leaves only the template,
//! which the next one uses. Called by `pool` through the traits in `svm`.

mod find;
mod machine;
mod qmp;
mod template;
mod vm;

pub use find::{Accelerator, OLDEST, Qemu, find, kvm_device};
pub use qmp::QmpError;

use super::{BackendLimits, ServiceVm, SvmError, VmBackend, VmSpec};
use futures_util::{FutureExt, future::BoxFuture};
use machine::Recipe;
use std::{
    ffi::OsString,
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use template::{Image, Template};
use vm::QemuVm;

/// Kernel command line of a guest: skips what only real hardware needs.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 quiet cryptomgr.notests no_timer_check tsc=reliable random.trust_cpu=on ipv6.disable=1 audit=0";
/// Added under TCG, where no other tenant shares the processor's caches with the guest's code, and where the work of a
/// kernel for each page and each task switch (clearing, accounting) costs ten times as much as on a processor.
const TCG_LINE: &str = " mitigations=off nokaslr init_on_alloc=0 cgroup_disable=memory psi=0";
/// The processor under TCG. Without the hints that string instructions are fast: copies then use vectors, while an
/// emulated `rep movsb` goes byte by byte.
const TCG_CPU: &str = "max,-erms,-fsrm";
/// How long the first boot under KVM may take before KVM counts as broken.
const KVM_DEADLINE: Duration = Duration::from_secs(5);
/// What to do if `lcow.accelerator=kvm` cannot work.
const NO_KVM: &str = "lcow.accelerator=kvm, but KVM is not usable here; set lcow.accelerator=auto, or give the service access to /dev/kvm";
/// Granularity of memory; bytes.
const MEMORY_STEP: u64 = 2 << 20;

/// How machines are made.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// QEMU; `None` = where distributions put it.
    pub program: Option<PathBuf>,
    /// The guest's kernel, an uncompressed vmlinux with PVH.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initrd: PathBuf,
    /// Added to the kernel command line.
    pub boot_parameters: String,
    /// The guest's memory; bytes.
    pub memory: u64,
    /// Largest image that an apply may write; bytes.
    pub growing_bytes: u64,
    /// QEMU's model of the processor under TCG; KVM shows the host's.
    pub cpu: String,
    /// Most disks of one machine at a time, at most 1,024.
    pub disks: u32,
    /// Directory of the template.
    pub cache: PathBuf,
    /// How long a boot or a restored guest's greeting may take.
    pub deadline: Duration,
    /// Use this accelerator only.
    pub accelerator: Option<Accelerator>,
    /// QEMU does not start if a part of its confinement is missing, see [`Order::strict`](lcow_sys::linux::launch::Order).
    pub strict: bool,
    /// The program with the hidden `launch` subcommand, and its arguments and environment.
    pub launcher: PathBuf,
    /// See above.
    pub launcher_args: Vec<OsString>,
    /// See above.
    pub launcher_env: Vec<(OsString, OsString)>,
}

impl QemuConfig {
    /// The defaults, with this guest and this cache.
    pub fn new(kernel: impl Into<PathBuf>, initrd: impl Into<PathBuf>, cache: impl Into<PathBuf>) -> Self {
        Self {
            program: None,
            kernel: kernel.into(),
            initrd: initrd.into(),
            boot_parameters: String::new(),
            memory: 512 << 20,
            growing_bytes: 128 << 30,
            cpu: TCG_CPU.into(),
            disks: vm::MAX_DISKS,
            cache: cache.into(),
            deadline: Duration::from_mins(1),
            accelerator: None,
            strict: false,
            launcher: "/proc/self/exe".into(),
            launcher_args: vec!["launch".into()],
            launcher_env: Vec::new(),
        }
    }
}

/// Starts machines.
#[derive(Debug)]
pub struct QemuBackend {
    config: QemuConfig,
    ready: tokio::sync::Mutex<Option<Arc<Ready>>>,
    detail: parking_lot::Mutex<String>,
    cold_boots: AtomicU64,
    restores: AtomicU64,
}

/// Result of the first boot.
#[derive(Debug)]
struct Ready {
    recipe: Recipe,
    template: Template,
    kvm: Option<File>,
}

/// Runs blocking work (waiting for a process, reading a hundred megabytes) on a thread that may block.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
}

impl QemuBackend {
    /// A backend. It searches for nothing until the first boot.
    pub fn new(config: QemuConfig) -> Self {
        Self {
            config,
            ready: tokio::sync::Mutex::default(),
            detail: parking_lot::Mutex::default(),
            cold_boots: AtomicU64::new(0),
            restores: AtomicU64::new(0),
        }
    }

    /// Checks what can be checked without starting a machine: the guest's files, QEMU, and KVM if it is required. Runs
    /// `qemu --version`, which takes some ten milliseconds.
    ///
    /// # Errors
    /// Everything that is missing, and what the operator has to do.
    pub fn preflight(&self) -> Result<(), String> {
        let c = &self.config;
        let no_kvm = c.accelerator == Some(Accelerator::Kvm) && kvm_device().is_none();
        let faults: Vec<String> = [
            Image::open(&c.kernel, &c.initrd).err(),
            find(c.program.as_deref()).err(),
            no_kvm.then(|| NO_KVM.to_owned()),
        ]
        .into_iter()
        .flatten()
        .collect();
        if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
    }

    fn recipe(&self, qemu: Qemu, accelerator: Accelerator) -> Recipe {
        let c = &self.config;
        let mut kernel_line = KERNEL_LINE.to_owned();
        if accelerator == Accelerator::Tcg {
            kernel_line += TCG_LINE;
        }
        if !c.boot_parameters.is_empty() {
            kernel_line = format!("{kernel_line} {}", c.boot_parameters);
        }
        Recipe {
            qemu,
            accelerator,
            cpu: c.cpu.clone(),
            memory: c.memory.next_multiple_of(MEMORY_STEP),
            kernel_line,
            strict: c.strict,
            launcher: c.launcher.clone(),
            launcher_args: c.launcher_args.clone(),
            launcher_env: c.launcher_env.clone(),
        }
    }

    /// The template; one caller makes it if there is none, and the others wait.
    async fn ready(&self, anew: bool) -> Result<Arc<Ready>, SvmError> {
        let mut ready = self.ready.lock().await;
        if anew {
            *ready = None;
        }
        if let Some(ready) = &*ready {
            return Ok(ready.clone());
        }
        let failed = |reason: String| SvmError::Boot { reason, console: String::new() };
        let (program, kernel, initrd) =
            (self.config.program.clone(), self.config.kernel.clone(), self.config.initrd.clone());
        let (qemu, image) =
            on_a_thread(move || Ok((find(program.as_deref())?, Arc::new(Image::open(&kernel, &initrd)?))))
                .await
                .map_err(failed)?;
        let kvm = match self.config.accelerator {
            Some(Accelerator::Tcg) => None,
            _ => kvm_device(),
        };
        let mut tries = Vec::new();
        if let Some(device) = kvm {
            let deadline =
                if self.config.accelerator.is_some() { self.config.deadline } else { KVM_DEADLINE };
            tries.push((Accelerator::Kvm, Some(device), deadline));
        }
        if self.config.accelerator != Some(Accelerator::Kvm) {
            tries.push((Accelerator::Tcg, None, self.config.deadline));
        }
        let mut last = failed(NO_KVM.into());
        for (accelerator, kvm, deadline) in tries {
            let recipe = self.recipe(qemu.clone(), accelerator);
            match self.template(&recipe, &image, kvm.as_ref(), deadline, anew).await {
                Ok(template) => {
                    *self.detail.lock() =
                        format!("QEMU {}, {accelerator}, template {}", qemu.version, template.key);
                    let made = Arc::new(Ready { recipe, template, kvm });
                    *ready = Some(made.clone());
                    return Ok(made);
                }
                Err(e) => {
                    tracing::warn!("{accelerator}: {e}");
                    last = e;
                }
            }
        }
        Err(last)
    }

    async fn template(
        &self,
        recipe: &Recipe,
        image: &Arc<Image>,
        kvm: Option<&File>,
        deadline: Duration,
        anew: bool,
    ) -> Result<Template, SvmError> {
        let cache = template::folder(&self.config.cache);
        let (folder, of_recipe, of_image) = (cache.clone(), recipe.clone(), image.clone());
        let known = on_a_thread(move || {
            let key = template::key(&of_recipe, &of_image).map_err(|e| e.to_string())?;
            let template = if anew { None } else { Template::load(&folder, &key) };
            Ok((key, template))
        });
        let failed = |reason: String| SvmError::Boot { reason, console: String::new() };
        let (key, template) = known.await.map_err(failed)?;
        if let Some(template) = template {
            return Ok(template);
        }
        let begin = std::time::Instant::now();
        self.cold_boots.fetch_add(1, Ordering::Relaxed);
        let template = Template::make(recipe, image, kvm, &cache, &key, deadline).await?;
        tracing::info!(
            key = template.key,
            seconds = begin.elapsed().as_secs_f64(),
            "service VM template made"
        );
        Ok(template)
    }

    async fn restore(&self, ready: &Ready, spec: &VmSpec) -> Result<Arc<dyn ServiceVm>, SvmError> {
        let machine = ready.template.restore(&ready.recipe, spec.number, ready.kvm.as_ref()).await?;
        let (growing, disks) = (self.config.growing_bytes, self.limits().disks as u32);
        let vm = QemuVm::greet(machine, spec.number, growing, disks, self.config.deadline).await?;
        self.restores.fetch_add(1, Ordering::Relaxed);
        Ok(vm)
    }

    async fn start(&self, spec: VmSpec) -> Result<Arc<dyn ServiceVm>, SvmError> {
        let ready = self.ready(false).await?;
        match self.restore(&ready, &spec).await {
            Ok(vm) => Ok(vm),
            Err(e) => {
                // The template is damaged, or this QEMU cannot read it after all: make it again.
                tracing::warn!("{e}; making the template again");
                let ready = self.ready(true).await?;
                self.restore(&ready, &spec).await
            }
        }
    }
}

impl VmBackend for QemuBackend {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: self.config.disks.min(vm::MAX_DISKS) as usize, vms: 64 }
    }

    fn detail(&self) -> String {
        self.detail.lock().clone()
    }

    fn cold_boots(&self) -> u64 {
        self.cold_boots.load(Ordering::Relaxed)
    }

    fn restores(&self) -> u64 {
        self.restores.load(Ordering::Relaxed)
    }

    fn boot(&self, spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        self.start(spec).boxed()
    }

    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        // Machines die with the daemon and own nothing that has a name; half-made templates do.
        async {
            let cache = template::folder(&self.config.cache);
            tokio::task::spawn_blocking(move || template::reap(&cache))
                .await
                .map_err(|_| SvmError::Cancelled("clearing up was interrupted"))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn a_preflight_tells_all_that_is_missing_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let old = path("qemu");
        fs::write(&old, "#!/bin/sh\necho QEMU emulator version 7.2.17\n").unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("initrd"), b"").unwrap();
        let mut config = QemuConfig::new(path("vmlinux"), path("initrd"), folder.path());
        config.program = Some(old);
        let said = QemuBackend::new(config.clone()).preflight().unwrap_err();
        for expected in
            ["vmlinux: No such file", "initrd: is empty", "build-svm-image", "7.2.17; 8.2 or later"]
        {
            assert!(said.contains(expected), "{expected} is missing in: {said}");
        }
        config.program = Some(path("no-qemu"));
        for name in ["vmlinux", "initrd"] {
            fs::write(path(name), b"x").unwrap();
        }
        let said = QemuBackend::new(config).preflight().unwrap_err();
        assert!(said.contains("no-qemu cannot be run") && !said.contains("initrd"), "{said}");
    }
}
