/*
 * The host of `ci/rig --self-test`: raw KVM ioctls, and no code of the project.
 *
 * usage: stress SECONDS
 *
 * One vCPU runs guest.S while three threads do what a live migration does to a guest: one reads and
 * clears the dirty log every 0 to 0.4 ms, one injects MSIs, and one kicks the vCPU out of KVM_RUN, whose
 * state is then read and written back. On a sound CPU the guest runs until the time is over. QEMU's
 * multi-threaded emulation of SVM with 2 CPUs fails about every second run of 100 s: the guest meets a
 * triple fault (exit 8), a check of the guest fails, or the host panics.
 *
 * Exit status: 0 when the guest ran for SECONDS; 1 when it failed; 2 when KVM lacks something.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "layout.h"

#define PAGES (MEMORY / 4096)

extern const unsigned char guest_begin[], guest_end[];
__asm__(".section .rodata\n"
	".globl guest_begin, guest_end\n"
	".balign 8\n"
	"guest_begin: .incbin \"guest.bin\"\n"
	"guest_end:\n"
	".previous");

static int vm, vcpu;
static uint8_t *memory;
static pthread_t runner;
static atomic_bool over;
static atomic_ulong clears, messages, kicks;
static unsigned long saves;

/* Ends the program when a call failed. */
static int must(int result, const char *call)
{
	if (result < 0) {
		perror(call);
		exit(2);
	}
	return result;
}

/* Sleeps for a random time below a limit in microseconds. */
static void pause_below(unsigned *seed, long limit)
{
	struct timespec time = { .tv_nsec = rand_r(seed) % limit * 1000 };
	nanosleep(&time, NULL);
}

/* One harvest after the other, as precopy's rounds. */
static void *harvest(void *seed)
{
	static uint64_t bits[PAGES / 64];
	while (!over) {
		struct kvm_dirty_log get = { .dirty_bitmap = bits };
		struct kvm_clear_dirty_log clear = { .num_pages = PAGES, .dirty_bitmap = bits };
		must(ioctl(vm, KVM_GET_DIRTY_LOG, &get), "KVM_GET_DIRTY_LOG");
		/* All pages are write-protected again, not only those that were dirty. */
		memset(bits, 0xff, sizeof bits);
		must(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear), "KVM_CLEAR_DIRTY_LOG");
		clears++;
		pause_below(seed, 400);
	}
	return NULL;
}

static void *inject(void *seed)
{
	while (!over) {
		struct kvm_msi msi = { .address_lo = 0xfee00000, .data = 0x40 };
		must(ioctl(vm, KVM_SIGNAL_MSI, &msi), "KVM_SIGNAL_MSI");
		messages++;
		pause_below(seed, 300);
	}
	return NULL;
}

static void *kick(void *seed)
{
	while (!over) {
		pthread_kill(runner, SIGUSR1);
		kicks++;
		pause_below(seed, 2000);
	}
	return NULL;
}

static void ignore(int signal) { (void)signal; }

/* Reads the state of the vCPU and writes it back, events last. */
static void save_and_restore(void)
{
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xsave xsave;
	struct kvm_lapic_state lapic;
	must(ioctl(vcpu, KVM_GET_VCPU_EVENTS, &events), "KVM_GET_VCPU_EVENTS");
	must(ioctl(vcpu, KVM_GET_MP_STATE, &mp), "KVM_GET_MP_STATE");
	must(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	must(ioctl(vcpu, KVM_GET_XSAVE, &xsave), "KVM_GET_XSAVE");
	must(ioctl(vcpu, KVM_GET_LAPIC, &lapic), "KVM_GET_LAPIC");
	must(ioctl(vcpu, KVM_SET_MP_STATE, &mp), "KVM_SET_MP_STATE");
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	must(ioctl(vcpu, KVM_SET_XSAVE, &xsave), "KVM_SET_XSAVE");
	must(ioctl(vcpu, KVM_SET_LAPIC, &lapic), "KVM_SET_LAPIC");
	must(ioctl(vcpu, KVM_SET_VCPU_EVENTS, &events), "KVM_SET_VCPU_EVENTS");
	saves++;
}

static uint64_t *quads(unsigned address) { return (uint64_t *)(memory + address); }

/* An interrupt gate of ring 0. Software interrupts of ring 3 need privilege 3. */
static void gate(int vector, uint64_t handler, unsigned privilege)
{
	uint64_t *entry = quads(IDT) + 2 * vector;
	entry[0] = (handler & 0xffff) | 8u << 16 | (uint64_t)(0x8e | privilege << 5) << 40 | (handler >> 16 & 0xffff) << 48;
	entry[1] = handler >> 32;
}

/* Page tables that map all memory to itself for ring 3, the code, and the tables of the CPU. */
static void fill_memory(void)
{
	memcpy(memory + CODE, guest_begin, guest_end - guest_begin);
	*quads(PML4) = PDPT | 7;
	*quads(PDPT) = PAGE_DIRECTORY | 7;
	for (unsigned i = 0; i < PAGES / 512; i++)
		quads(PAGE_DIRECTORY)[i] = (PAGE_TABLES + i * 4096) | 7;
	for (unsigned i = 0; i < PAGES; i++)
		quads(PAGE_TABLES)[i] = (uint64_t)i * 4096 | 7;
	for (unsigned i = 0; i < TOUCHED_PAGES; i++)
		quads(PAGE_TABLES)[TOUCHED / 4096 + i] &= ~1ull;

	uint64_t *gdt = quads(GDT);
	gdt[1] = 0x00af9b000000ffff; /* ring 0: code, data */
	gdt[2] = 0x00cf93000000ffff;
	gdt[3] = 0x00affb000000ffff; /* ring 3: code, data */
	gdt[4] = 0x00cff3000000ffff;
	gdt[5] = 0x67 | TSS << 16 | 0x89ull << 40;
	uint64_t stack = KERNEL_STACK;
	memcpy(memory + TSS + 4, &stack, sizeof stack);

	/* The addresses behind the first jump of guest.S. */
	const uint64_t *handlers = quads(CODE + 8);
	for (int vector = 0; vector < 256; vector++)
		gate(vector, handlers[5], 0);
	gate(14, handlers[0], 0);
	gate(6, handlers[1], 0);
	gate(0x80, handlers[2], 3);
	gate(0x81, handlers[3], 3);
	gate(0x40, handlers[4], 0);
}

static void set_registers(void)
{
	struct kvm_sregs sregs;
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cr0 = 0x80010031; /* PG, WP, NE, ET, PE */
	sregs.cr3 = PML4;
	sregs.cr4 = 0x620; /* PAE, OSFXSR, OSXMMEXCPT */
	sregs.efer = 0xd00; /* LME, LMA, NXE */
	sregs.cs = (struct kvm_segment){ .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	sregs.ss = (struct kvm_segment){ .limit = ~0u, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss;
	sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = 0x37 };
	sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 0xfff };
	sregs.apic_base |= 0xc00; /* x2APIC */
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static struct kvm_run *make_vm(void)
{
	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	must(ioctl(vm, KVM_CREATE_IRQCHIP), "KVM_CREATE_IRQCHIP");
	struct kvm_enable_cap manual = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET },
	};
	must(ioctl(vm, KVM_ENABLE_CAP, &manual), "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(memory == MAP_FAILED ? -1 : 0, "mmap");
	struct kvm_userspace_memory_region slot = {
		.flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory,
	};
	must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");

	vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = { .head.nent = 256 };
	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	for (unsigned i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == 1)
			cpuid.entries[i].ecx |= 1u << 21; /* x2APIC */
	must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
	int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	must(run == MAP_FAILED ? -1 : 0, "mmap of the vCPU");
	return run;
}

/* Prints why the guest ended; what an exit 8 leaves of RIP on AMD is the value after a reset. */
static void print_failure(const struct kvm_run *run)
{
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	must(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	printf("stress: the guest failed: exit %u%s, RIP %#llx, RSP %#llx, CR2 %#llx, CR3 %#llx, R12 %#llx, R13 %#llx, R14 %#llx\n",
	       run->exit_reason, run->exit_reason == KVM_EXIT_SHUTDOWN ? " (triple fault)" : "", regs.rip, regs.rsp, sregs.cr2,
	       sregs.cr3, regs.r12, regs.r13, regs.r14);
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Runs the guest until the time or the guest is over, and returns the number of its rounds. */
static unsigned long run_guest(struct kvm_run *run, double end, int *failed)
{
	unsigned long rounds = 0;
	while (now() < end) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			must(errno == EINTR ? 0 : -1, "KVM_RUN");
			save_and_restore();
		} else if (run->exit_reason == KVM_EXIT_IO && run->io.port == PORT_ROUND) {
			rounds++;
		} else {
			if (run->exit_reason == KVM_EXIT_IO)
				printf("stress: check %#x of the guest failed\n", *((uint8_t *)run + run->io.data_offset));
			print_failure(run);
			*failed = 1;
			break;
		}
	}
	return rounds;
}

int main(int argc, char **argv)
{
	int seconds = argc == 2 ? atoi(argv[1]) : 0;
	if (seconds < 1) {
		fprintf(stderr, "usage: stress SECONDS\n");
		return 2;
	}
	struct kvm_run *run = make_vm();
	fill_memory();
	set_registers();
	/* The handler does nothing: the signal only interrupts KVM_RUN. */
	struct sigaction action = { .sa_handler = ignore };
	sigaction(SIGUSR1, &action, NULL);
	runner = pthread_self();
	pthread_t threads[3];
	unsigned seeds[3] = { 1, 2, 3 };
	void *(*tasks[3])(void *) = { harvest, inject, kick };
	for (int i = 0; i < 3; i++)
		must(-pthread_create(&threads[i], NULL, tasks[i], &seeds[i]), "pthread_create");

	int failed = 0;
	unsigned long rounds = run_guest(run, now() + seconds, &failed);
	over = true;
	for (int i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	printf("stress: %s: %lu rounds of 256 page faults, %lu harvests, %lu of %lu MSIs taken, %lu kicks, %lu states\n",
	       failed ? "FAILED" : "passed", rounds, clears, *quads(MESSAGES), messages, kicks, saves);
	/* A guest that did nothing proves nothing. */
	return failed || rounds == 0 || *quads(MESSAGES) == 0;
}
