"""A kernel and a userland from Debian's packages, in the cache: what `gdbstub boot amd64` starts.

Rules: blocking (network, subprocesses through `apt`), so not for trio's thread; writes only under the cache. As any
user, without dpkg; what apt cannot verify is not used, but packages that the user has put in place are.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from emu.images import deb, initramfs
from emu.images.apt import Apt, Candidate, FetchError, archives
from emu.images.cache import Progress, cache_root, quiet, write_atomic

DEFAULT_PACKAGES = {
    "amd64": "linux-image-6.1.0-*-cloud-amd64-unsigned",
    "i386": "linux-image-6.1.0-*-686-unsigned",
}
"""Architecture -> pattern of its kernel's package; the newest match is taken. "unsigned" is the one without a signature
for Secure Boot; the kernel is the same."""
BUSYBOX = "busybox-static"
_PLACED = "packages"
"""Folder under an architecture's in the cache for packages that a user has got some other way."""
_TRIES = 5  # kernels that are asked for before a pattern is given up
_DEBUG_LIMIT = 1 << 30  # bytes of a vmlinux with debug information; amd64's has 700 MB
_KERNEL_FILE, _BUSYBOX_FILE = "vmlinuz", "busybox"

__all__ = ["BUSYBOX", "DEFAULT_PACKAGES", "FetchError", "Fetched", "debug_image", "fetch"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A kernel ready to boot: files in the cache, and the package and version the kernel came from."""

    kernel: Path
    initramfs: Path
    busybox: Path
    package: str
    version: str


def fetch(
    architecture: str = "amd64", package: str | None = None, *, cache: Path | None = None, progress: Progress = quiet
) -> Fetched:
    """The kernel of `package` (a name, or a pattern's newest match; default DEFAULT_PACKAGES) and an initramfs.

    What an earlier call fetched for the same request is returned without network. FetchError says what to do instead
    where it cannot be had; ImageError for a package that is damaged. `cache` defaults to `cache_root()`.
    """
    if architecture not in DEFAULT_PACKAGES:
        raise FetchError(f"no kernels for {architecture!r}: one of {', '.join(DEFAULT_PACKAGES)}")
    pattern = package or DEFAULT_PACKAGES[architecture]
    if not re.fullmatch(r"linux-image-[A-Za-z0-9.+*?\[\]~-]+", pattern):
        raise FetchError(f"{pattern!r} does not name a kernel's package: linux-image-...")
    root = (cache or cache_root()) / "kernels" / architecture
    record = root / f"{quote(pattern, safe='')}.json"
    try:
        with _locked(root / ".lock"):
            kept = _read_record(record)
            if kept is not None:
                _write_initramfs(kept)
                progress(f"using {kept.package} {kept.version} from {kept.kernel.parent}")
                return kept
            return _download(architecture, pattern, root, record, progress)
    except OSError as error:
        raise FetchError(f"cannot keep kernels in {root}: {error.strerror or error}") from error


@contextmanager
def debug_image(
    architecture: str, fetched: Fetched, *, cache: Path | None = None, progress: Progress = quiet
) -> Iterator[tuple[Path, str]]:
    """The vmlinux with debug information of a fetched kernel, and its release; the file is there inside the `with`.

    From the package of the same version: 800 MB over the network, 1 GB in the cache meanwhile. FetchError, ImageError.
    """
    root = (cache or cache_root()) / "kernels" / architecture
    release = fetched.package.removeprefix("linux-image-").removesuffix("-unsigned")
    wanted = Candidate(f"linux-image-{release}-dbg", fetched.version)
    with _locked(root / ".lock"):
        for apt in archives(architecture, root, progress):
            if wanted.name in apt.names(wanted.name):
                break
        else:
            raise FetchError(f"no {wanted.name} in what apt could verify")
        package = apt.download(wanted)
        image = package.with_name("vmlinux")
        try:
            progress(f"unpacking {wanted.name} {wanted.version}")
            name = f"usr/lib/debug/boot/vmlinux-{release}"
            image.write_bytes(deb.extract(package, lambda path: path == name, _DEBUG_LIMIT))
            package.unlink()
            yield image, release
        finally:
            package.unlink(missing_ok=True)
            image.unlink(missing_ok=True)


def _download(architecture: str, pattern: str, root: Path, record: Path, progress: Progress) -> Fetched:
    placed = _by_hand(architecture, pattern, root / _PLACED)
    if placed is not None:
        progress(f"using the packages in {root / _PLACED}")
        return _unpack(*placed, root, record, progress)
    advice = (
        f"by hand: put the packages {pattern} and {BUSYBOX} ({architecture}, from packages.debian.org) into "
        f"{root / _PLACED} and run this again; or `gdbstub boot FILE --initrd FILE`, which takes any kernel"
    )
    userlands: list[tuple[Apt, Candidate]] = []  # any release's serves with any kernel: the first there is
    for apt in archives(architecture, root, progress):
        try:
            kernels = _candidates(apt, pattern)
            userlands += [(apt, found) for found in apt.newest_first([BUSYBOX])]
            if kernels and userlands:
                source, found = userlands[0]
                userland = source.download(found)
                chosen, kernel = _first_of(kernels, apt, progress)
                fetched = _unpack(chosen, kernel, userland, root, record, progress)
                userland.unlink()
                kernel.unlink()
                return fetched
        except FetchError as error:
            raise FetchError(f"{error}; {advice}") from error
    raise FetchError(f"no {pattern} or no {BUSYBOX} for {architecture} in what apt could verify; {advice}")


def _first_of(kernels: list[Candidate], apt: Apt, progress: Progress) -> tuple[Candidate, Path]:
    """The newest that can be downloaded, as a mirror's index may be ahead of its packages. FetchError."""
    *newer, last = kernels[:_TRIES]
    for candidate in newer:
        try:
            return candidate, apt.download(candidate)
        except FetchError as error:
            progress(str(error))
    return last, apt.download(last)


def _candidates(apt: Apt, pattern: str) -> list[Candidate]:
    prefix = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    names = [name for name in apt.names(prefix) if fnmatch.fnmatchcase(name, pattern)]
    return apt.newest_first(sorted(names, key=_numeric, reverse=True))


def _by_hand(architecture: str, pattern: str, folder: Path) -> tuple[Candidate, Path, Path] | None:
    """The newest kernel matching `pattern`, its package and BusyBox's, if the user has put both into `folder`."""
    found: dict[Candidate, Path] = {}
    for path in folder.glob(f"*_{architecture}.deb"):
        name, _, version = path.name.removesuffix(f"_{architecture}.deb").partition("_")
        found[Candidate(name, unquote(version))] = path
    newest = sorted(found, key=lambda one: (_numeric(one.name), _numeric(one.version)), reverse=True)
    kernel = next((one for one in newest if fnmatch.fnmatchcase(one.name, pattern)), None)
    userland = next((one for one in newest if one.name == BUSYBOX), None)
    return (kernel, found[kernel], found[userland]) if kernel and userland else None


def _numeric(name: str) -> tuple[list[int], str]:
    """Orders 6.1.0-9 before 6.1.0-10: by the numbers in a name, then by the name."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def _unpack(
    candidate: Candidate, kernel: Path, userland: Path, root: Path, record: Path, progress: Progress
) -> Fetched:
    """Take what is needed out of the two packages; the record is written last, when everything it names is there."""
    progress(f"unpacking {candidate.name} {candidate.version}")
    folder = root / quote(f"{candidate.name}_{candidate.version}", safe="+")
    busybox = deb.extract(userland, lambda name: name in ("bin/busybox", "usr/bin/busybox"))
    write_atomic(folder / _KERNEL_FILE, deb.extract(kernel, lambda name: name.startswith("boot/vmlinuz-")))
    write_atomic(folder / _BUSYBOX_FILE, busybox)
    values = {"folder": folder.name, "package": candidate.name, "version": candidate.version}
    write_atomic(record, json.dumps(values, indent=1).encode())
    fetched = _from_record(root, values)
    _write_initramfs(fetched)
    progress(f"kept in {folder}")
    return fetched


def _from_record(root: Path, values: dict[str, str]) -> Fetched:
    folder = root / values["folder"]
    return Fetched(
        kernel=folder / _KERNEL_FILE,
        initramfs=folder / "initramfs.cpio",
        busybox=folder / _BUSYBOX_FILE,
        package=values["package"],
        version=values["version"],
    )


def _write_initramfs(fetched: Fetched) -> None:
    """Made anew where it differs: what an older version of this program kept may lack what this one relies on."""
    wanted = initramfs.build(fetched.busybox.read_bytes())
    if not fetched.initramfs.is_file() or fetched.initramfs.read_bytes() != wanted:
        write_atomic(fetched.initramfs, wanted)


def _read_record(record: Path) -> Fetched | None:
    """What an earlier call left, if all its files are there."""
    try:
        fetched = _from_record(record.parent, json.loads(record.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fetched if fetched.kernel.is_file() and fetched.busybox.is_file() else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file: of two processes that want the same kernel, one downloads and the other waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
