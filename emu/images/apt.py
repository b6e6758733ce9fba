"""apt-get as any user: packages of one architecture, in folders of our own, verified as apt verifies them.

Rules: runs apt-get and apt-cache, and nothing else; blocking, so not for trio's thread. Each pair of architecture and
sources has its own folder: where one index of a foreign architecture is broken, apt drops the whole suite for every
architecture that shares the lists. Nothing that apt has not authenticated is ever used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu.iface import MachineError
from emu.images.cache import Progress

_KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/etc/apt/trusted.gpg.d/debian-archive-keyring.gpg",
)
_SOURCES = """\
deb [signed-by={keyring}] http://deb.debian.org/debian {release} main
deb [signed-by={keyring}] http://deb.debian.org/debian-security {release}-security main
"""
_RELEASES = ("bookworm", "bullseye")  # with kernels 6.1 and 6.12, and 5.10
_CLEARED = (
    "APT::Architectures",
    "APT::Update::Pre-Invoke",
    "APT::Update::Post-Invoke",
    "APT::Update::Post-Invoke-Success",
)
_ERROR_LINES = 3


class FetchError(MachineError):
    """A package that cannot be had; the text says what to do about it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A package as the indexes have it."""

    name: str
    version: str


class Apt:
    """apt for one architecture ("amd64", "i386") and one set of sources, with its state under `folder`.

    `release` takes that release of Debian instead of the host's sources.
    """

    def __init__(self, architecture: str, folder: Path, progress: Progress, *, release: str = "") -> None:
        self._architecture = architecture
        self._folder = folder
        self._progress = progress
        self._release = release
        self._updated = False

    def newest_first(self, names: Sequence[str]) -> list[Candidate]:
        """Of these exact names those that can be downloaded, each in its newest version, in the order of `names`."""
        if not names:
            return []
        self._update()
        found: dict[str, Candidate] = {}
        for line in self._run("apt-cache", "madison", *names).stdout.splitlines():
            # "busybox-static | 1:1.35.0-4+b3 | http://... Packages", newest version of a package first.
            fields = [field.strip() for field in line.split("|")]
            if len(fields) == 3 and "Packages" in fields[2]:
                found.setdefault(fields[0], Candidate(fields[0], fields[1]))
        return [found[name] for name in names if name in found]

    def names(self, prefix: str) -> list[str]:
        """Every package name the indexes mention that starts with `prefix`, in no order."""
        self._update()
        return self._run("apt-cache", "pkgnames", prefix).stdout.split()

    def download(self, candidate: Candidate) -> Path:
        """The package's .deb file, its hash checked by apt against the signed index. FetchError."""
        target = self._folder / "downloads" / candidate.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._progress(f"downloading {candidate.name} {candidate.version} ({self._architecture})")
        done = self._run("apt-get", "download", f"{candidate.name}={candidate.version}", cwd=target)
        found = list(target.glob("*.deb"))
        if done.returncode or len(found) != 1:
            raise FetchError(f"apt-get could not download {candidate.name}: {_last_lines(done.stderr)}")
        return found[0]

    def _update(self) -> None:
        if self._updated:
            return
        self._updated = True
        for name in ("lists/partial", "cache/archives/partial", "etc"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        source = f"Debian {self._release}" if self._release else "the host's package sources"
        self._progress(f"reading the package indexes of {source} for {self._architecture}")
        self._write_sources()
        done = self._run("apt-get", "update", "-q")
        if done.returncode:
            # One index in trouble is no reason to stop: what could not be verified is not in the lists.
            self._progress(f"apt-get update: {_last_lines(done.stderr)}")

    def _write_sources(self) -> None:
        if self._release:
            keyring = next((name for name in _KEYRINGS if os.path.exists(name)), None)
            if keyring is None:
                raise FetchError(
                    "no Debian archive keyring on this host: install the package debian-archive-keyring, "
                    "or get a kernel by hand (`gdbstub boot FILE --initrd FILE`)"
                )
            (self._folder / "etc/sources.list").write_text(_SOURCES.format(keyring=keyring, release=self._release))

    def _options(self) -> Iterator[str]:
        folder = self._folder
        values = {
            "APT::Architecture": self._architecture,
            "Dir::State": f"{folder}/",
            "Dir::State::lists": f"{folder}/lists/",
            "Dir::State::status": f"{folder}/status",
            "Dir::Cache": f"{folder}/cache/",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "60",
            # As root, apt would read and write our folders as the user _apt, who may not.
            "APT::Sandbox::User": "root",
            # Said again, whatever the host's configuration allows.
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "APT::Get::AllowUnauthenticated": "false",
        }
        if self._release:
            values |= {"Dir::Etc::SourceList": f"{folder}/etc/sources.list", "Dir::Etc::SourceParts": "/dev/null"}
        for name, value in values.items():
            yield from ("-o", f"{name}={value}")

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        if shutil.which(program) is None:
            raise FetchError(f"this host has no {program}")
        # A -c file is read last; only there can a list be emptied. The host's hooks are not for private folders, and
        # a host with a foreign architecture would read that one's indexes too.
        configuration = self._folder / "etc/apt.conf"
        configuration.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"#clear {name};" for name in _CLEARED] + [f'APT::Architectures {{ "{self._architecture}"; }};']
        configuration.write_text("\n".join(lines) + "\n")
        command = [program, "-c", str(configuration), *self._options(), *arguments]
        environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            return subprocess.run(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise FetchError(f"{program} cannot be run: {error}") from error


def archives(architecture: str, root: Path, progress: Progress) -> Iterator[Apt]:
    """Where a package may be found: the host's sources, then Debian's releases whose kernels we know, for hosts that
    are of none of them. Each has its own folder in `root`."""
    for release in ("", *_RELEASES):
        yield Apt(architecture, root / f"apt-{release or 'host'}", progress, release=release)


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")] or lines
    return "; ".join(errors[-_ERROR_LINES:]) or "it gave no reason"
