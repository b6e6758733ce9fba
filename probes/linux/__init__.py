"""The guest's operating system, seen from outside: Linux 5.10 to 6.12 on amd64 and i386, on drgn.

    linux = probes.linux                      # Manager.linux; or linux_of(machine); NotAvailable says why there is none
    task = linux.current()                    # drgn Objects: `struct task_struct *`, members as in C
    task.comm.string_(), int(task.pid), task.mm.exe_file.f_inode.i_ino
    linux.tasks(), linux.processes(), linux.task(pid)
    for m in linux.mappings(task.mm): m.start, m.end, m.executable, m.offset, m.inode, linux.mapping_name(m)
    for fd, file in linux.files(task): linux.path(file)
    inode = linux.inode("/bin/busybox")       # None: no such name in the kernel's cache of names
    linux.page(inode, index), linux.pages(inode)           # physical addresses in the page cache
    linux.read_file(inode, offset, size), linux.read_user(task.mm, address, size)    # MemoryFault: not present
    linux.log()
    linux.object("struct vm_area_struct *", regs.arg(1))   # at a hit: a pointer the kernel has in hand
    with linux.asking("the mount is") as program: ...      # drgn's own helpers, bounded and with one kind of error

Rules: the machine's thread, at any stop and inside any hit; nothing in the guest changes. What a kernel, or the moment,
does not tell is NotAvailable ("... not available because ..."), never a guess. A question costs from 0.05 to some ms:
what is asked at every hit has a reader of its own (tasks.py). drgn is imported in this folder only.
"""

from probes.linux.program import NotAvailable
from probes.linux.system import Linux, Mapping, linux_of

__all__ = ["Linux", "Mapping", "NotAvailable", "linux_of"]
