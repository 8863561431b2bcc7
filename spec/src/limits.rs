//! Bounds on what a client may send.

/// Bytes of a request's body.
pub const BODY_LEN: usize = 1 << 20;

/// Bytes of a VM's name.
pub const VM_ID_LEN: usize = 64;

/// Bytes of a kernel command line, with the NUL at its end (`COMMAND_LINE_SIZE` of Linux on x86).
pub const CMDLINE_LEN: usize = 2048;

/// The page that memory sizes are multiples of.
pub const PAGE: u64 = 4096;

/// Alignment of hotplugged memory in a guest, and unit of the `Acpi` method: a memory section of
/// Linux on x86.
pub const HOTPLUG_ALIGNMENT: u64 = 128 << 20;

/// The least block that virtio-mem plugs: a huge page of x86.
pub const HOTPLUG_BLOCK: u64 = 2 << 20;

/// Memory zones of a VM. A snapshot has 64 blocks of memory at most, and a zone that can grow has two.
pub const MEMORY_ZONES: usize = 32;

/// The unit of a zone's size: a huge page of x86, so that no huge page of the guest, and no ring of a
/// virtqueue, is in two zones.
pub const ZONE_UNIT: u64 = 2 << 20;

/// The NUMA nodes of a guest have numbers below this. The guest has a table of all distances.
pub const NUMA_NODES: u32 = 64;

/// Ports of the machine itself, first and last of each range: interrupt controllers and timer (KVM's),
/// keyboard, clock, progress codes, serial port, ACPI, PCI. The debug console cannot be there.
pub(crate) const PLATFORM_PORTS: &[(u16, u16)] = &[
    (0x20, 0x21),
    (0x40, 0x43),
    (0x60, 0x64),
    (0x70, 0x71),
    (0x80, 0x80),
    (0xa0, 0xa1),
    (0x3f8, 0x3ff),
    (0x4d0, 0x4d1),
    (0x600, 0x6ff),
    (0xcf8, 0xcff),
];

/// PCI segments of a VM, as in Cloud Hypervisor.
pub const PCI_SEGMENTS: u16 = 96;

/// Devices of a VM, with its console and its source of entropy.
pub const DEVICES: usize = 64;

/// Queues of a device.
pub const QUEUES: usize = 32;

/// Entries of a queue.
pub const QUEUE_SIZE: u16 = 4096;

/// The least entries of a disk's queue. No descriptor chain may be longer than its queue (virtio 1.3,
/// 2.7.5.3.1), and a request has a header, data and a status (5.2.6): three descriptors, and a size
/// is a power of two.
pub const DISK_QUEUE_SIZE_MIN: u16 = 4;

/// The least entries of a network interface's queue. Linux sends a frame in up to 19 descriptors
/// (`MAX_SKB_FRAGS` + 2), and the next power of two is 32. QEMU allows no fewer than 256; a driver
/// that wants a smaller queue sets its size itself (virtio 1.3, 4.1.4.3).
pub const NET_QUEUE_SIZE_MIN: u16 = 32;

/// Bytes of a disk's serial number (virtio 1.3, 5.2.6).
pub const DISK_SERIAL_LEN: usize = 20;

/// Pairs of queues of a network interface: with the queue for control they are all that a device
/// can have.
pub const NET_PAIRS: usize = 15;

/// The least MTU that a network interface may have: that of IPv6.
pub const MIN_MTU: u16 = 1280;

/// The highest APIC id of a vCPU. Id 255 is the broadcast address of the xAPIC, and what is above it
/// needs an x2APIC with 32-bit ids, and interrupts that can be sent to them.
pub const APIC_ID: u32 = 254;

/// Bytes of all strings of `platform` together, each with a NUL at its end: what the guest's SMBIOS
/// tables have room for.
pub const SMBIOS_LEN: usize = 60 << 10;

/// OEM strings: SMBIOS counts them by a byte.
pub const OEM_STRINGS: usize = 255;

/// The last slot of the PCI bus; slot 0 is the host bridge's.
pub const PCI_SLOTS: u8 = 31;

/// Functions of a slot of the PCI bus.
pub const PCI_FUNCTIONS: usize = 8;

/// Bytes of the path of a unix socket (`sun_path` of `unix(7)`, without the NUL).
pub const SOCKET_PATH_LEN: usize = 107;

/// Bytes of a device's name.
pub const DEVICE_NAME_LEN: usize = 64;

/// Minimum number of characters of an API token. 32 hexadecimal digits are 128 random bits.
pub const API_TOKEN_LEN_MIN: usize = 32;

/// Maximum number of characters of an API token.
pub const API_TOKEN_LEN_MAX: usize = 512;
