//! Whether the machine has an NVIDIA GPU, where its CUDA libraries are, and loading them.
//!
//! One binary serves machines with and without a GPU: it is linked with the CPU's libtorch, and
//! the CUDA part is loaded at run time. Says nothing to libtorch itself: that is `libtorch.rs`.

use std::{
    env,
    ffi::{CStr, CString},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// What a look at the machine gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No NVIDIA GPU.
    Nothing,
    /// One that cannot be used, for this reason.
    Unusable(String),
    /// One with a driver, and the CUDA libraries in this directory.
    Set(PathBuf),
}

/// The library that holds libtorch's CUDA operators, in a set laid out as Python lays out the
/// wheels: `torch/lib` beside `nvidia/`.
const OPERATORS: &str = "torch/lib/libtorch_cuda.so";

/// The directories that may hold the CUDA libraries: what is configured, or else
/// `$GHOSTWATCH_CUDA` and `cuda` beside the binary.
pub fn places(configured: Option<&Path>) -> Vec<PathBuf> {
    if let Some(configured) = configured {
        return vec![configured.to_owned()];
    }
    let beside = env::current_exe().ok().and_then(|it| Some(it.parent()?.join("cuda")));
    let named = env::var_os("GHOSTWATCH_CUDA").map(PathBuf::from);
    named.into_iter().chain(beside).collect()
}

/// Looks for a GPU, its driver and the CUDA libraries. `root` is `/`; `places` are the
/// directories that may hold the libraries, or hold them in `site/`; the first that does counts.
pub fn find(root: &Path, places: &[PathBuf]) -> Found {
    let node = fs::exists(root.join("dev/nvidia0")).unwrap_or(false);
    let driver = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok();
    let Some(gpu) = pci_gpu(root).or(node.then(|| "/dev/nvidia0".to_owned())) else {
        return Found::Nothing;
    };
    if driver.is_none() {
        let hint = "install the NVIDIA driver, 580 or newer";
        return Found::Unusable(format!("GPU {gpu} has no NVIDIA driver loaded: {hint}"));
    }
    if !node {
        let hint = "run nvidia-modprobe, or give the container or service the device";
        return Found::Unusable(format!("GPU {gpu} has a driver but no /dev/nvidia0: {hint}"));
    }
    let sites = places.iter().flat_map(|it| [it.clone(), it.join("site")]);
    match sites.into_iter().find(|it| it.join(OPERATORS).is_file()) {
        Some(set) => Found::Set(set),
        None => {
            let looked: Vec<String> = places.iter().map(|it| it.display().to_string()).collect();
            let looked = looked.join(", ");
            let hint = "run scripts/setup, or name their directory in GHOSTWATCH_CUDA";
            Found::Unusable(format!("GPU {gpu} needs the CUDA libraries, not in {looked}: {hint}"))
        }
    }
}

/// The PCI address of the first NVIDIA display or 3D controller.
fn pci_gpu(root: &Path) -> Option<String> {
    let devices = fs::read_dir(root.join("sys/bus/pci/devices")).ok()?;
    let mut addresses: Vec<String> = devices
        .filter_map(|it| Some(it.ok()?.path()))
        .filter(|it| {
            let starts = |file: &str, with: &str| {
                fs::read_to_string(it.join(file)).is_ok_and(|it| it.starts_with(with))
            };
            starts("vendor", "0x10de") && starts("class", "0x03")
        })
        .filter_map(|it| Some(it.file_name()?.to_str()?.to_owned()))
        .collect();
    addresses.sort();
    addresses.into_iter().next()
}

/// Loads the CUDA libraries of a set into the process, for good and visible to all.
///
/// # Errors
/// What the dynamic linker said.
pub fn load(set: &Path) -> Result<(), String> {
    let lib = set.join(OPERATORS);
    // c10_cuda first: the wheel's own run path then finds the rest relative to each library, and
    // libtorch_cpu is taken as already loaded, by its name.
    open(&lib.with_file_name("libc10_cuda.so"))?;
    open(&lib)
}

fn open(path: &Path) -> Result<(), String> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| format!("the path {} holds a zero byte", path.display()))?;
    // SAFETY: `name` is a C string that outlives the call. The library's initialisers run here:
    // they register operators with libtorch, which is already loaded and used by no thread yet.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: after a failed `dlopen` this is a C string that is valid until the next call of
    // the `dl` family on this thread, or null; it is copied at once.
    let reason = unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            None
        } else {
            Some(CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    Err(format!("cannot load the CUDA libraries: {}", reason.unwrap_or("no reason given".into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str) -> Machine {
            let root = std::env::temp_dir().join(format!("gpu-{name}-{}", std::process::id()));
            fs::create_dir_all(&root).unwrap();
            Machine(root)
        }

        fn with(self, path: &str, text: &str) -> Machine {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn card(self) -> Machine {
            let at = "sys/bus/pci/devices/0000:01:00.0";
            self.with(&format!("{at}/vendor"), "0x10de\n")
                .with(&format!("{at}/class"), "0x030200\n")
        }

        fn find(&self) -> Found {
            find(&self.0, &[self.0.join("cuda")])
        }

        fn reason(&self) -> String {
            match self.find() {
                Found::Unusable(reason) => reason,
                other => panic!("{other:?}"),
            }
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn a_machine_without_an_nvidia_gpu_has_none() {
        let at = "sys/bus/pci/devices";
        let machine = Machine::new("none")
            .with(&format!("{at}/0000:00:02.0/vendor"), "0x8086\n")
            .with(&format!("{at}/0000:00:02.0/class"), "0x030000\n")
            .with(&format!("{at}/0000:01:00.1/vendor"), "0x10de\n") // The card's sound device.
            .with(&format!("{at}/0000:01:00.1/class"), "0x040300\n");
        assert_eq!(machine.find(), Found::Nothing);
        assert_eq!(Machine::new("empty").find(), Found::Nothing);
    }

    #[test]
    fn each_missing_part_is_the_reason_named() {
        let machine = Machine::new("parts").card();
        assert!(machine.reason().contains("0000:01:00.0 has no NVIDIA driver"));
        let machine = machine.with("proc/driver/nvidia/version", "580.65\n");
        assert!(machine.reason().contains("no /dev/nvidia0"));
        let machine = machine.with("dev/nvidia0", "");
        let reason = machine.reason();
        assert!(
            reason.contains("needs the CUDA libraries") && reason.contains("/cuda"),
            "{reason}"
        );
        let machine = machine.with("cuda/site/torch/lib/libtorch_cuda.so", "");
        assert_eq!(machine.find(), Found::Set(machine.0.join("cuda/site")));
    }

    #[test]
    fn a_library_that_cannot_be_loaded_is_named_with_the_linkers_reason() {
        let machine = Machine::new("broken").with("torch/lib/libc10_cuda.so", "not a library");
        let reason = load(&machine.0).unwrap_err();
        assert!(reason.contains("libc10_cuda.so") && reason.contains("too short"), "{reason}");
    }
}
