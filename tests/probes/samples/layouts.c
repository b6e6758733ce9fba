/* Prototypes whose arguments gcc places; each function stores what it found. */
typedef unsigned long long u64;

unsigned long found[8];

void long_first(u64 a, int b, int c) { found[0] = a, found[1] = a >> 32, found[2] = b, found[3] = c; }
void long_second(int a, u64 b, int c) { found[0] = a, found[1] = b, found[2] = b >> 32, found[3] = c; }
void long_third(int a, int b, u64 c, int d) { found[0] = a, found[1] = b, found[2] = c, found[3] = c >> 32, found[4] = d; }
void two_longs(u64 a, u64 b, signed char c) { found[0] = a, found[1] = a >> 32, found[2] = b, found[3] = b >> 32, found[4] = c; }
void variadic(int a, ...)
{
	__builtin_va_list list;

	__builtin_va_start(list, a);
	found[0] = a, found[1] = __builtin_va_arg(list, int), found[2] = __builtin_va_arg(list, int);
	__builtin_va_end(list);
}
u64 long_result(int a) { return ((u64)a << 32) + 5; }
struct triple { long a, b, c; };
struct triple triple(long a) { struct triple t = {a, a + 1, a + 2}; found[0] = a; return t; }
