"""The machine: a processor on Unicorn, with memory, devices and virtual time, that boots stock Linux kernels."""

from emu.boot import GuestMachine, boot, boot_embedded, load, restore

__all__ = ["GuestMachine", "boot", "boot_embedded", "load", "restore"]
