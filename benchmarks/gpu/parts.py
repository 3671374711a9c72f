"""vLLM for a CUDA machine without package access, in folders small enough to be carried there.

    python benchmarks/gpu/parts.py prepare FOLDER          where packages can be fetched
    python benchmarks/gpu/parts.py unpack FOLDER... --into SITE     on the CUDA machine

``prepare`` writes FOLDER/first and FOLDER/second, each with one ``part.tar.xz`` and a
``manifest.json`` that lists every file with its size and SHA-256. The files are those of the
published wheels, unmodified; what a dense model with FlashAttention 3 does not import is left out.
For Python 3.12 on x86-64; torch, triton and transformers must be on the machine already.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).parent
LIMIT_BYTES = 64 * 2**20
VLLM = "vllm==0.32.0"
PYTHON = "3.12"
PACKAGES = HERE / "packages.txt"
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]

# The one large file of the first folder; everything else is in the second.
FIRST = ("vllm/_C_stable_libtorch.abi3.so",)
COMPILED = (*FIRST, "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
# Headers and sources of kernels that are compiled while serving stay behind.
KINDS = (".py", ".json", ".pyi", ".txt", ".typed", ".jinja", ".yaml", ".yml", ".toml")

Json = dict[str, Any]


def is_wanted(name: str) -> bool:
    """Whether a file of vLLM's wheel travels: its Python tree, its metadata and two extensions."""
    return name in COMPILED or ".dist-info/" in name or name.endswith(KINDS)


def fetch(requirements: list[str], into: Path) -> None:
    """Wheels for the CUDA machine's Python, without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements], check=True)


def requirements_of(listing: Path) -> list[str]:
    """One ``name==version`` a line; lines that begin with # say why."""
    lines = (line.strip() for line in listing.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def unzip_wheels(wheels: Iterable[Path], into: Path) -> None:
    """What an installer would put into site-packages; no scripts."""
    for wheel in sorted(wheels):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.split("/")[0].endswith(".data") or name.endswith("/"):
                    continue
                if not wheel.name.startswith("vllm-") or is_wanted(name):
                    archive.extract(name, into)


def pack(root: Path, names: list[str], folder: Path) -> Json:
    """Write ``part.tar.xz`` with these files of ``root``, and the manifest. Same files, same bytes.

    Raises ValueError where the folder is too large to be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "part.tar.xz"
    with (
        lzma.open(archive, "wb", preset=9) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name in sorted(names):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = (root / name).stat().st_size, 0o644
            with (root / name).open("rb") as content:
                tar.addfile(entry, content)
    manifest: Json = {
        "archive_bytes": archive.stat().st_size,
        "archive_sha256": sha256(archive),
        "files": {
            name: {"bytes": (root / name).stat().st_size, "sha256": sha256(root / name)}
            for name in sorted(names)
        },
    }
    written = folder / "manifest.json"
    written.write_text(json.dumps(manifest, indent=0) + "\n", encoding="utf-8")
    total = manifest["archive_bytes"] + written.stat().st_size
    if total > LIMIT_BYTES:
        raise ValueError(
            f"{folder} has {total / 2**20:.1f} MiB; at most {LIMIT_BYTES / 2**20:.0f} can be"
            " carried: move files to the other folder"
        )
    return manifest


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def unpack(folders: list[Path], into: Path) -> int:
    """Check and extract folders, in any order, also one at a time. Returns the number of files.

    Raises ValueError where a file is not what the manifest says.
    """
    num_files = 0
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        archive = folder / "part.tar.xz"
        if sha256(archive) != manifest["archive_sha256"]:
            raise ValueError(f"{archive} is not the archive of its manifest; carry it again")
        # In the archive's order, so that it is decompressed once. extractall() has no filter before
        # Python 3.11.4.
        found = set()
        with tarfile.open(archive, "r|xz") as tar:
            for entry in tar:
                content = tar.extractfile(entry)
                if content is None or entry.name not in manifest["files"]:
                    raise ValueError(f"{entry.name} in {archive} is no file of the manifest")
                (into / entry.name).parent.mkdir(parents=True, exist_ok=True)
                with content, (into / entry.name).open("wb") as out:
                    shutil.copyfileobj(content, out)
                found.add(entry.name)
        for name, expected in manifest["files"].items():
            if name not in found or sha256(into / name) != expected["sha256"]:
                raise ValueError(f"{into / name} differs from the manifest of {folder}")
        num_files += len(found)
    return num_files


def files_under(root: Path) -> Iterator[str]:
    """Relative names with forward slashes."""
    for path in root.rglob("*"):
        if path.is_file():
            yield str(PurePosixPath(path.relative_to(root)))


def split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files of the first and of the second folder."""
    listed = list(names)
    missing = sorted(set(COMPILED) - set(listed))
    if missing:
        raise ValueError(f"the wheel of {VLLM} lacks {missing}: it is not the CUDA build")
    return [n for n in listed if n in FIRST], [n for n in listed if n not in FIRST]


def prepare(folder: Path) -> None:
    """Fetch, choose, pack."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        wheels, root = Path(name, "wheels"), Path(name, "site")
        wheels.mkdir()
        fetch([VLLM], wheels)
        fetch(requirements_of(PACKAGES), wheels)
        unzip_wheels(wheels.glob("*.whl"), root)
        for part, names in zip(("first", "second"), split(files_under(root)), strict=True):
            manifest = pack(root, names, folder / part)
            size = sum(file["bytes"] for file in manifest["files"].values())
            print(
                f"{folder / part}: {len(names)} files, {size / 2**20:.1f} MiB,"
                f" packed {manifest['archive_bytes'] / 2**20:.1f} MiB"
            )
    print(f"took {time.monotonic() - began:.0f} s")


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="fetch and pack")
    preparing.add_argument("folder", type=Path)
    unpacking = commands.add_parser("unpack", help="check and extract")
    unpacking.add_argument("folders", type=Path, nargs="+")
    unpacking.add_argument("--into", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.folder)
    else:
        print(f"{unpack(args.folders, args.into)} files in {args.into}")


if __name__ == "__main__":
    main()
