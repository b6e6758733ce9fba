/* Handlers that talk through the kernel's own printk, as the samples do. */
#include "samples.h"

extern int _printk(const char *fmt, ...);
extern void jprobe_return(void);

static unsigned long said;

int handler_pre(struct kprobe *p, struct pt_regs *regs)
{
	if (said++ < 3)
		_printk("<%s> pre_handler: p->addr = %lx, ip = %lx\n", p->symbol_name, (long)p->addr, regs->ip);
	return 0;
}

long jdo_filp_open(int dfd, void *name, void *flags)
{
	if (said++ < 3)
		_printk("jprobe: dfd = %d\n", dfd);
	jprobe_return();
	return 0;
}

int ret_handler(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	if (said++ < 6)
		_printk("returned %ld\n", (long)regs->ax);
	return 0;
}
