/* Physical (and linear) addresses of the guest, shared by host.c and guest.S. */
#define PML4 0x1000
#define PDPT 0x2000
#define PAGE_DIRECTORY 0x3000
#define GDT 0x4000
#define TSS 0x5000
#define IDT 0x6000
#define KERNEL_STACK 0xa000
#define USER_STACK 0xe000
#define PAGE_TABLES 0x10000
#define CODE 0x100000
#define MESSAGES 0x200000
#define TOUCHED 0x300000
#define TOUCHED_PAGES 256
#define WRITTEN 0x500000
#define MEMORY 0x1000000

/* The guest writes one byte to these ports: after 256 passes, and the number of a failed check. */
#define PORT_ROUND 0x98
#define PORT_FAILED 0x99
