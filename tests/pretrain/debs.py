"""Small Debian packages made by hand, and an apt that hands them out."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: b"zst" + data,
}  # fmt: skip
"""The last is no Zstandard: only a stand-in of dpkg-deb reads it."""


def png(colour: str = "red", size: tuple[int, int] = (20, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(files: Mapping[str, bytes | str]) -> bytes:
    """A tar archive; a str is where a symbolic link points to."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", encoding="utf-8", errors="surrogateescape") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(f"./{path}")
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def ar(members: Mapping[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def deb(path: Path, name: str, files: Mapping[str, bytes | str], packed: str = ".xz", version: str = "1:2.0-1") -> Path:
    control = f"Package: {name}\nVersion: {version}\nDescription: a test\n of several lines\n".encode()
    sums = {path: hashlib.md5(x).hexdigest() for path, x in files.items() if isinstance(x, bytes)}
    listed = "".join(f"{digest}  {path}\n" for path, digest in sums.items()).encode("utf-8", "surrogateescape")
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(tar({"control": control, "md5sums": listed})),
        f"data.tar{packed}": PACKERS[packed](tar(files)),
    }
    path.write_bytes(ar(members))
    return path


APT = """#!{python} -IS
import json, os, signal, sys
from pathlib import Path

home = Path({home!r})
mode = json.loads((home / "mode.json").read_text())
with (home / "calls.txt").open("a") as log:
    print(Path(sys.argv[0]).name, *sys.argv[1:], file=log)
name = sys.argv[-1].partition("=")[0]
if sys.argv[1] == "show":
    about = mode["packages"].get(name)
    if about is None:
        sys.exit("E: No packages found" if mode["packages"] else "E: Unable to locate package " + name)
    print("Package:", name, *about, sep="\\n")
    sys.exit(0)
content = (home / (name + ".deb")).read_bytes()
target = Path(name + "_2.0-1_all.deb")
if mode["how"] == "offline":
    print("W: something\\nE: Failed to fetch http://nowhere Temporary failure resolving", file=sys.stderr)
    sys.exit(100)
if mode["how"] in ("killed", "killed with its parent"):
    target.write_bytes(content[: len(content) // 2])
    os.kill(os.getppid() if mode["how"] != "killed" else os.getpid(), signal.SIGKILL)
target.write_bytes(content)
"""


class Apt:
    """A folder with `apt-get` and `apt-cache`, to be put on the PATH.

    Args:
        home: the folder.
        debs: the packages that it knows, by name.
    """

    def __init__(self, home: Path, debs: Mapping[str, Path]) -> None:
        self.home = home
        home.mkdir()
        self.packages: dict[str, list[str]] = {}
        for name, path in debs.items():
            content = path.read_bytes()
            (home / f"{name}.deb").write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            self.packages[name] = ["Version: 1:2.0-1", f"Size: {len(content)}", f"SHA256: {sha256}"]
        for tool in ("apt-get", "apt-cache"):
            (home / tool).write_text(APT.format(python=sys.executable, home=str(home)), encoding="utf-8")
            (home / tool).chmod(0o755)
        self.works("well")

    def works(self, how: str) -> None:
        mode = {"how": how, "packages": self.packages}
        (self.home / "mode.json").write_text(json.dumps(mode), encoding="utf-8")

    @property
    def calls(self) -> list[str]:
        path = self.home / "calls.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
