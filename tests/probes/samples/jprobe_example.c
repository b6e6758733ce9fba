/* After samples/kprobes/jprobe_example.c (until 4.14): the arguments, and an end by jprobe_return(). */
#include "samples.h"

extern void jprobe_return(void);

unsigned long arguments[8], calls, came_back;

long jsum8(long a, long b, long c, long d, long e, long f, long g, long h)
{
	arguments[0] = a, arguments[1] = b, arguments[2] = c, arguments[3] = d;
	arguments[4] = e, arguments[5] = f, arguments[6] = g, arguments[7] = h;
	calls++;
	a = h = 0;
	jprobe_return();
	came_back++;
	return 0;
}
