/* A program of 32 bits that knows neither large files nor a C library: what it gets from stat and getdents of a file and a
   folder of a lower layer. Built by tests/e2e/identity.rs: gcc -m32 -nostdlib. Numbers are those of the i386 interface. */
#define SYS_exit 1
#define SYS_write 4
#define SYS_open 5
#define SYS_stat 106
#define SYS_getdents 141
#define O_DIRECTORY 0200000

static int call(int number, int a, int b, int c)
{
	int result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
	return result;
}

static void say(const char *what, int value)
{
	char text[64];
	int n = 0, at = sizeof(text);
	unsigned rest = value < 0 ? -(unsigned)value : (unsigned)value;

	while (what[n])
		n++;
	call(SYS_write, 1, (int)what, n);
	text[--at] = '\n';
	do
		text[--at] = '0' + rest % 10;
	while (rest /= 10);
	if (value < 0)
		text[--at] = '-';
	call(SYS_write, 1, (int)(text + at), sizeof(text) - at);
}

void _start(void)
{
	static char buffer[4096];
	int folder, got;

	say("stat ", call(SYS_stat, (int)"/data/layer1/a", (int)buffer, 0));
	folder = call(SYS_open, (int)"/data/layer1", O_DIRECTORY, 0);
	do
		got = call(SYS_getdents, folder, (int)buffer, sizeof(buffer));
	while (got > 0);
	say("getdents ", got);
	call(SYS_exit, 0, 0, 0);
}
