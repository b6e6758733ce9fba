/* After samples/kprobes/kprobe_example.c: what a hit looks like, kept where the test can read it. */
#include "samples.h"

extern unsigned long strlen(const char *s);

struct record {
	unsigned long addr, ip, flags, sp, argument, name_length, count;
} before, after;
unsigned long misses = 7;
unsigned long *misses_at = &misses;

static void keep(struct record *r, struct kprobe *p, struct pt_regs *regs)
{
	r->addr = (unsigned long)p->addr;
	r->ip = regs->ip;
	r->flags = regs->flags;
	r->sp = regs->sp;
#ifdef __x86_64__
	r->argument = regs->di;
#else
	r->argument = regs->ax;
#endif
	r->name_length = p->symbol_name ? strlen(p->symbol_name) : 0;
	r->count++;
}

int handler_pre(struct kprobe *p, struct pt_regs *regs)
{
	keep(&before, p, regs);
	*misses_at = p->nmissed;
	return 0;
}

void handler_post(struct kprobe *p, struct pt_regs *regs, unsigned long flags)
{
	keep(&after, p, regs);
	after.count += flags;
}

/* The probed function is left at once, with a result of its own. */
int handler_override(struct kprobe *p, struct pt_regs *regs)
{
	regs->ax = 4242;
	regs->ip = *(unsigned long *)regs->sp;
	regs->sp += sizeof(long);
	return 1;
}

int handler_spin(struct kprobe *p, struct pt_regs *regs)
{
	for (;;)
		;
}
