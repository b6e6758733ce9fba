"""Names of open files and of mappings, as /proc shows them.

Rules: pure readers over drgn objects; they raise what drgn raises (see program.question).
"""

from __future__ import annotations

from drgn import Object
from drgn.helpers.linux.fs import d_path
from drgn.helpers.linux.mm import vma_name

_BARE = {b"pipefs": "pipe", b"sockfs": "socket"}  # their d_dname: fs/pipe.c, net/socket.c


def file_path(file: Object) -> str:
    """What readlink of /proc/PID/fd/N gives for a `struct file *` (d_path() in fs/d_path.c)."""
    dentry = file.f_path.dentry.read_()
    operations = dentry.d_op.read_()
    if not operations or not operations.d_dname:
        path = _text(d_path(file.f_path))
        return f"{path} (deleted)" if _unlinked(dentry) else path
    kind = dentry.d_sb.s_type.name.string_()
    name = _text(dentry.d_name.name.string_())
    if kind in _BARE:
        return f"{_BARE[kind]}:[{file.f_inode.i_ino.value_()}]"
    if kind == b"anon_inodefs":
        return f"anon_inode:{name}"
    if kind == b"nsfs":
        return f"{name}:[{file.f_inode.i_ino.value_()}]"
    return f"/{name} (deleted)"  # simple_dname(): files without a name, memfd_create() and shared memory


def mapping_name(vma: Object) -> str:
    """The last column of /proc/PID/maps for a `struct vm_area_struct *`."""
    file = vma.vm_file.read_()
    if file and not vma_name(vma).startswith(b"[anon_shmem:"):
        return file_path(file).replace("\n", "\\012")
    return _text(vma_name(vma))


def _unlinked(dentry: Object) -> bool:
    """d_unlinked(): in no hash list, and not the root of its tree (include/linux/dcache.h)."""
    return not dentry.d_hash.pprev and dentry != dentry.d_parent


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
