/* After samples/kprobes/kretprobe_example.c: a stamp at the entry, the value and the stamp at the return. */
#include "samples.h"

struct my_data {
	unsigned long stamp;
};
unsigned long entered, declined, returned, last_value, last_stamp, last_return;

int entry_handler(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct my_data *data = (struct my_data *)ri->data;

	if (++entered % 3 == 0) {
		declined++;
		return 1;
	}
	data->stamp = 1000 + entered;
	return 0;
}

int ret_handler(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct my_data *data = (struct my_data *)ri->data;

	last_value = regs->ax;
	last_stamp = data->stamp;
	last_return = ri->ret_addr;
	returned++;
	return 0;
}
