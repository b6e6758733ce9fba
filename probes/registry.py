"""All probes of a machine as objects, whatever their kind: the parts of the engine put together.

Rules: belongs to the thread that runs the machine; the composition root of this package, so the one place that names a
processor's module. Knows no event and no definition: those are `manager`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from emu.iface import Guest, Machine
from probes.arch.x86 import X86Arch
from probes.core import Kprobes
from probes.embedded import embedded_programs
from probes.guest import GuestHandlers
from probes.jprobe import Jprobe, Jprobes
from probes.kinds import Probe, check_kind, kernel_list, kprobe_of
from probes.kprobe import Arm, Kprobe
from probes.kretprobe import Kretprobe, Kretprobes, ReturnInstance
from probes.linux import Linux, linux_of
from probes.linux.kernel import kernel_types
from probes.linux.modulewatch import ModuleWatch
from probes.linux.programs import linux_programs
from probes.linux.tasks import current_tasks
from probes.objects import ObjectLoader
from probes.planting import Planting
from probes.programs import Copies, Programs
from probes.room import Room
from probes.tasks import find_tasks
from probes.uprobe import Uprobe
from probes.uprobes import Uprobes


class Registry:
    """What is registered, and what registers it. The arguments are `Manager`'s.

    `tasks` tells tasks apart, by number; `task_info` knows their names, or where it does not, `unknown_tasks` says why.
    Being made, it becomes the machine's trap client.
    """

    def __init__(
        self, machine: Machine, *, arm: Arm, settled: bool | None, linux_limits: bool, copies: Copies | None
    ) -> None:
        arch = X86Arch(machine, self)
        self._machine = machine
        self._arch = arch
        self._copies = copies
        self._linux: Linux | None = None
        self._uprobes: Uprobes | None = None
        self._registered: dict[Probe, None] = {}  # in this order
        self.convention = arch.convention
        kernel = kernel_types(machine)
        current = kernel if isinstance(kernel, str) else current_tasks(machine.memory, kernel)
        linux = None if isinstance(current, str) else current
        self.tasks = find_tasks(machine, linux)
        self.task_info = linux or self.tasks
        self.unknown_tasks = current if isinstance(current, str) and not self.tasks.tells else None
        guest: Guest | None = getattr(machine, "guest", None)
        now = settled if settled is not None else guest is None or guest.settled
        self._kprobes = Kprobes(machine, arch, arm, now, linux_limits=linux_limits)
        self._room = Room(machine.window)
        self.objects = ObjectLoader(machine, arch.convention.word, self._room)
        self._jprobes = Jprobes(machine, arch.convention.word, self._kprobes, self.objects)
        self.guest = GuestHandlers(
            machine, arch.convention, self._kprobes.calls, self._room, self.objects, self._take_out_of_service
        )
        self._kretprobes = Kretprobes(machine, arch, self._kprobes, self.tasks)
        machine.trap_client = self._kprobes
        self.modules = ModuleWatch(machine.symbols, self._kprobes, lambda: self.linux)
        if now:
            self.modules.start()
        if settled is None and guest is not None:
            guest.on_settled(self._settle)

    def _settle(self) -> None:
        self.settled = True
        self.modules.start()

    def _take_out_of_service(self, probe: Kprobe, reason: str) -> None:
        self._kprobes.disable(probe)
        probe.notes += (f"disabled, because {reason}",)

    @property
    def settled(self) -> bool:
        return self._kprobes.settled

    @settled.setter
    def settled(self, value: bool) -> None:
        self._kprobes.settled = value

    @property
    def linux(self) -> Linux:
        """The guest's operating system. NotAvailable (a ProbeError) where it is no Linux whose types are known."""
        if self._linux is None:
            self._linux = linux_of(self._machine)
        return self._linux

    @property
    def uprobes(self) -> Uprobes:
        """Probes on programs. ProbeError where nobody knows the guest's operating system."""
        if self._uprobes is None:
            programs: Programs | None = embedded_programs(self._machine, self._kprobes)
            if programs is None:
                programs = linux_programs(self._machine, self.linux, self._kprobes)
            planting = Planting(self._machine, self._arch, self._kprobes, self._room, programs)
            self._uprobes = Uprobes(self._machine, self._arch, programs, planting, self._copies)
            self._kprobes.after_restore(self._uprobes.after_restore)
        return self._uprobes

    # -------------------------------------------------------------------------------------------------- registration

    def register(self, probe: Probe, *, ours: bool = False) -> None:
        """ProbeError with the kernel's errno where it is refused; nothing has changed then.

        `ours`: it serves something that knows when to end it; lists do not show it and `reset` leaves it.
        """
        check_kind(probe)
        if isinstance(probe, Uprobe):
            self.uprobes.register(probe)
        elif isinstance(probe, Kretprobe):
            self._kretprobes.register(probe)
        elif isinstance(probe, Jprobe):
            self._jprobes.register(probe)
        else:
            self._kprobes.register(probe)
        if not ours:
            self._registered[probe] = None

    def unregister(self, probe: Probe) -> None:
        check_kind(probe)
        if isinstance(probe, Uprobe):
            self.uprobes.unregister(probe)
        elif isinstance(probe, Kretprobe):
            self._kretprobes.unregister(probe)
        elif isinstance(probe, Jprobe):
            self._jprobes.unregister(probe)
        else:
            self._kprobes.unregister(probe)
        self._registered.pop(probe, None)

    def switch(self, probe: Probe, on: bool) -> None:
        """Enable it or disable it; ProbeError where it is not registered, is GONE or cannot be armed."""
        if isinstance(probe, Uprobe):
            (self.uprobes.enable if on else self.uprobes.disable)(probe)
        else:
            (self._kprobes.enable if on else self._kprobes.disable)(kprobe_of(probe))

    # ------------------------------------------------------------------------------------------------------- for people

    @property
    def registered(self) -> Sequence[Probe]:
        """In the order of registration, without those that serve others."""
        return list(self._registered)

    def lines(self) -> Sequence[str]:
        """Every probe of every kind, as the kernel's kprobes/list shows its own (see `kinds`)."""
        return kernel_list(self._machine, self._registered)

    def info(self, probe: Probe) -> list[str]:
        """Where a probe stands and how it is armed, how a return probe's entries ended, and its notes."""
        if isinstance(probe, Uprobe):
            return self.uprobes.info(probe)
        kprobe = kprobe_of(probe)
        back_end = self._kprobes.back_end(kprobe)
        how = "[GONE]" if kprobe.gone else "not armed" if back_end is None else back_end.value
        lines = [f"at {kprobe.address or 0:#x}, {'waits for its module' if kprobe.waiting else how}"]
        if isinstance(probe, Kretprobe):
            lines.append(f"by {'shadow' if probe.shadow else 'trampoline'}: {probe.accounting()}")
        return [*lines, *(f"note: {note}" for note in probe.notes)]

    def instances(self, rp: Kretprobe) -> Sequence[ReturnInstance]:
        """The calls that have not returned yet, oldest first."""
        return self._kretprobes.instances(rp)
