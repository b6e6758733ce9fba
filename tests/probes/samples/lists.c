/* A whole guest for perf probe's form of definitions: it walks a list three times and halts. */
struct inner { int x; char tag[4]; };
struct item { int id; const char *name; struct item *next; struct inner in; unsigned char flags; };
static struct item second = {7, "second", 0, {70, "in2"}, 3};
static struct item first = {5, "first", &second, {50, "in1"}, 9};
volatile int sink;
static inline __attribute__((always_inline)) int twice(int v)
{
	return v * 2 + sink;
}
__attribute__((noinline)) long walk(struct item *it, long limit)
{
	long total = 0;
	for (; it; it = it->next) {
		int here = it->id;
		total += here;
		sink = here;
		if (total > limit)
			break;
	}
	return total;
}
__attribute__((noinline)) int other(int n)
{
	sink = twice(n);
	return sink + 1;
}
void _start(void)
{
	for (int round = 0; round < 3; round++) {
		walk(&first, 100);
		other(round);
	}
	for (;;)
		__asm__ volatile("hlt");
}
