/* What the samples need of the kernel's headers, as Linux 6.1 has it on x86. */
typedef unsigned long size_t;
typedef unsigned int u32;

struct pt_regs {
#ifdef __x86_64__
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
#else
	unsigned long bx, cx, dx, si, di, bp, ax, ds, es, fs, gs, orig_ax, ip, cs, flags, sp, ss;
#endif
};

struct kprobe {
	void *hlist[2], *list[2];
	unsigned long nmissed;
	unsigned char *addr;
	const char *symbol_name;
	unsigned int offset;
};

struct kretprobe_instance {
	void *rcu[2], *llist, *rph;
	unsigned long ret_addr, frame;
	char data[];
};

#define NULL ((void *)0)
