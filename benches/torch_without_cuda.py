"""Unpacks the wheel of PyTorch so that Python can import it without the CUDA libraries.

    torch_without_cuda.py WHEEL LIBTORCH OUT

The wheel's own `libtorch_cpu.so` and `libcudart.so.13` come from LIBTORCH, where scripts/setup has
put them; torchvision is in OUT already. What both want of libtorch_cuda, cuDNN and cuFile (a gigabyte and a half) is
answered by libraries with the same names and symbols and nothing behind them: on the CPU no one uses
what they give. So the peer is the published binary of PyTorch, and only its CUDA half is
missing. Needs cc and nm.
"""

import pathlib
import shutil
import subprocess
import sys
import zipfile

# Left out of the wheel: the CUDA half, the compilers for it, and PyTorch's own tests.
LEFT_OUT = ("torch/lib/libtorch_cuda", "torch/lib/libtorch_nvshmem", "torch/lib/libcaffe2_nvrtc",
            "torch/lib/libtorch_cpu.so", "torch/bin/p", "torch/testing/_internal/distributed")
FROM_LIBTORCH = ("libtorch_cpu.so", "libcudart.so.13", "libcupti.so.13")
# Who asks, and the libraries of the wheel and of the system whose symbols are there.
ASKING = ("torch/lib/libtorch_python.so", "torchvision/_C.so")
PRESENT = ("libtorch_cpu.so", "libc10.so", "libc10_cuda.so", "libcudart.so.13", "libshm.so")
OF_SYSTEM = ("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6")


def unpack(wheel, out):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not entry.filename.startswith(LEFT_OUT):
                archive.extract(entry, out)


def symbols(library, *options):
    """Names with their versions, as nm prints them."""
    command = ["nm", "-D", *options, library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[-2:] for line in text.splitlines()]


def of_system(name):
    """Where the compiler finds a library of the system."""
    command = ["cc", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def missing(out, folder):
    """What is asked for and not there: from the name of a versioned library, or "", to names."""
    libraries = [folder / it for it in PRESENT] + [of_system(it) for it in OF_SYSTEM]
    present = {name.split("@")[0] for it in libraries
               for _, name in symbols(it, "--defined-only")}
    wanted = {}
    for asking in ASKING:
        for kind, name in symbols(out / asking, "--undefined-only"):
            name, _, version = name.partition("@")
            elsewhere = name.startswith(("Py", "_Py")) or version.startswith("GLIBC")
            if kind == "U" and not elsewhere and name not in present:
                wanted.setdefault(version, set()).add(name)
    return wanted


def assembly(names):
    """A symbol of each name. A function gives the address of a page of zeros: while it is loaded
    libtorch_python asks one for a variable. Types hold their name, which Python's bindings read."""
    lines = [".local zeros", ".comm zeros, 4096, 64"]
    for name in sorted(names):
        lines += [f".globl {name}"]
        if name.startswith("_ZTI"):
            lines += [".section .rodata", f'1: .string "{name[4:]}"', ".section .data", ".balign 8",
                      f"{name}: .quad _ZTVN10__cxxabiv117__class_type_infoE+16", ".quad 1b"]
        elif name.startswith("_ZTV"):
            lines += [".section .data", ".balign 8", f"{name}: .fill 64, 8, 0"]
        else:
            lines += [".text", f".type {name}, @function", f"{name}: lea zeros(%rip), %rax", "ret"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def stand_in(folder, soname, names, version=None):
    """Makes a library of that name."""
    source = folder / "stand_in.s"
    source.write_text(assembly(names))
    command = ["cc", "-shared", "-nostartfiles", f"-Wl,-soname,{soname}", "-o", folder / soname, source]
    if version:
        script = folder / "stand_in.map"
        script.write_text(f"{version} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, "-lstdc++"], check=True)
    for it in ("stand_in.s", "stand_in.map"):
        (folder / it).unlink(missing_ok=True)


def main():
    wheel, libtorch, out = map(pathlib.Path, sys.argv[1:])
    unpack(wheel, out)
    folder = out / "torch" / "lib"
    for name in FROM_LIBTORCH:
        shutil.copy(libtorch / "lib" / name, folder / name)
    wanted = missing(out, folder)
    cudnn = wanted.pop("libcudnn.so.9", set())
    unversioned = wanted.pop("", set())
    if wanted:
        sys.exit(f"torch_without_cuda: symbols of {', '.join(sorted(wanted))} are wanted, too")
    stand_in(folder, "libcudnn.so.9", cudnn, "libcudnn.so.9")
    stand_in(folder, "libcufile.so.0", set())
    stand_in(folder, "libtorch_cuda.so", unversioned)


if __name__ == "__main__":
    main()
