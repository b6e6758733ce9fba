"""Images: files that can be started, read into a plan the machine carries out, and where such files come from.

plan.py        what a loader hands over: segments of memory, the processor's state at the start
elf.py flat.py multiboot.py linux.py   one loader each; detect.py picks among them
payload.py     decompression with a bound
symbolelf.py orc.py                    symbols and unwind tables as a file stock gdb reads
fetch.py initramfs.py cache.py         kernels and a userland from Debian, made into something that boots
"""
