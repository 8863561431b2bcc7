//! The system calls that each kind of thread may make.
//!
//! One list ([`Scope::Process`]) is for every thread of the program: it has the calls that open files and
//! sockets and make VMs. It leaves out what the program never does, such as starting programs, reading
//! other processes' memory, and loading kernel code. Threads that handle data of guests have stricter
//! lists on top of it: they cannot open, move or remove files, nor reach a network.
//!
//! A call that a list lacks fails the tests that run in the sandbox, and the log names it. The lists have
//! the calls of both C libraries, where these differ.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Which threads a list is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Every thread of the process.
    Process,
    /// vCPUs, which also start the queues of devices.
    Vcpu,
    /// The event loops of devices.
    Devices,
}

/// Compiles the filter of a scope. Calls that it does not allow meet `refusal`.
pub(super) fn compile(scope: Scope, refusal: SeccompAction) -> Result<BpfProgram, BackendError> {
    let mut rules: Rules = WORK.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, ioctls(DEVICE_IOCTLS)?);
    // By the number of this process, which starts no other processes.
    rules.insert(libc::SYS_tgkill, own_signals()?);
    rules.insert(libc::SYS_prctl, names()?);
    // Threads, not processes. The flags of `clone3` are in memory, which a filter cannot read:
    // `without_clone3` has the C library fall back on this call.
    rules.insert(
        libc::SYS_clone,
        vec![masked(
            0,
            flag(libc::CLONE_THREAD),
            flag(libc::CLONE_THREAD),
        )?],
    );
    match scope {
        Scope::Process => {
            rules.extend(PROCESS.iter().map(|call| (*call, Vec::new())));
            // Threads of vCPUs get their cookies for core scheduling before they enter their list.
            let cores = equal(0, u64::from(libc::PR_SCHED_CORE.unsigned_abs()))?;
            rules.insert(libc::SYS_prctl, [names()?, vec![cores]].concat());
            rules.insert(
                libc::SYS_ioctl,
                ioctls([DEVICE_IOCTLS, HOST_IOCTLS].concat().as_slice())?,
            );
            rules.insert(
                libc::SYS_socket,
                sockets(&[
                    libc::AF_UNIX,
                    libc::AF_INET,
                    libc::AF_INET6,
                    libc::AF_NETLINK,
                ])?,
            );
        }
        Scope::Vcpu => rules.extend(START_QUEUES.iter().map(|call| (*call, Vec::new()))),
        Scope::Devices => {
            rules.extend(DEVICES.iter().map(|call| (*call, Vec::new())));
            // A guest's vsock connections end at unix sockets.
            rules.insert(libc::SYS_socket, sockets(&[libc::AF_UNIX])?);
        }
    }
    if scope != Scope::Process {
        // No code but the program's own: guest memory cannot be made executable.
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            rules.insert(call, vec![masked(2, flag(libc::PROT_EXEC), 0)?]);
        }
    }
    program(rules, refusal, SeccompAction::Allow)
}

/// Has `clone3` fail as on kernels that lack it, so that the C library makes threads by `clone`.
pub(super) fn without_clone3() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    program(rules, SeccompAction::Allow, missing)
}

fn program(
    rules: Rules,
    others: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, listed, TargetArch::x86_64)?.try_into()
}

/// Calls of every thread: to use what is open already, memory, time, and other threads.
const WORK: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    // Allowed here, and answered with ENOSYS by `without_clone3`: the stricter answer counts.
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// A guest's driver starts the queues of a device by a write that its vCPU's thread serves.
const START_QUEUES: &[i64] = &[libc::SYS_timerfd_create];

/// Connections of a guest over vsock. Rings are made where disks are opened, and restricted there:
/// with a ring of its own, a thread could open files past its filter.
const DEVICES: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_setsockopt,
];

/// The rest of the program, in the order of what for: files, sockets, threads, memory and devices.
const PROCESS: &[i64] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pipe2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_listen,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    libc::SYS_arch_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpgrp,
    libc::SYS_getppid,
    libc::SYS_getrusage,
    libc::SYS_getuid,
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_setpriority,
    // Threads enter stricter lists.
    libc::SYS_seccomp,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_set_tid_address,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    // Memory from one NUMA node of the host.
    libc::SYS_mbind,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_timerfd_create,
    libc::SYS_userfaultfd,
];

/// `ioctl` requests: the bits that count, and their value.
type Request = (u64, u64);

/// The type of a request, in its second byte.
const fn of_type(byte: u8) -> Request {
    (0xff00, (byte as u64) << 8)
}

/// One request of a terminal or descriptor, which have no direction and size in their upper half.
const fn plain(request: u64) -> Request {
    (0xffff_ffff, request)
}

/// `_IO('T', 227)` of `linux/if_tun.h`: the one request of TUN and TAP without a direction.
const TUNGETDEVNETNS: u64 = 0x54e3;

/// Requests to devices that are open: KVM, block devices, userfaultfd, taps, and whether something is a
/// terminal. `TIOCSTI`, which types for the user of a terminal, is not among them.
const DEVICE_IOCTLS: &[Request] = &[
    of_type(0xae),
    of_type(0x12),
    of_type(0xaa),
    // TUN and TAP share their type with terminals, whose requests lack a direction.
    (0xc000_ff00, 0x4000_5400),
    (0xc000_ff00, 0x8000_5400),
    plain(libc::TCGETS),
    plain(libc::TIOCGWINSZ),
    plain(libc::FIONREAD),
    plain(libc::FIONBIO),
    plain(libc::FIOCLEX),
    plain(libc::TIOCOUTQ),
];

/// Requests to terminals that are set up, network interfaces that are configured, and files.
const HOST_IOCTLS: &[Request] = &[
    plain(libc::TCSETS),
    plain(libc::TCSETSW),
    plain(libc::TCSETSF),
    plain(libc::TCFLSH),
    plain(libc::TCSBRK),
    plain(libc::TIOCGPGRP),
    plain(libc::TIOCGPTPEER),
    plain(libc::TIOCSWINSZ),
    // The network namespace of a tap.
    plain(TUNGETDEVNETNS),
    // Sockets' and interfaces' (SIOC...).
    of_type(0x89),
    // File systems' (FS_IOC_...), and the page map's (PAGEMAP_SCAN).
    of_type(0x66),
];

fn ioctls(requests: &[Request]) -> Result<Vec<SeccompRule>, BackendError> {
    requests
        .iter()
        .map(|(bits, value)| masked(1, *bits, *value))
        .collect()
}

fn sockets(families: &[i32]) -> Result<Vec<SeccompRule>, BackendError> {
    let family = |family: &i32| equal(0, u64::from(family.unsigned_abs()));
    families.iter().map(family).collect()
}

/// Signals to threads of this process, and to no other: kicks of vCPUs, and `abort`.
fn own_signals() -> Result<Vec<SeccompRule>, BackendError> {
    Ok(vec![equal(0, u64::from(std::process::id()))?])
}

/// Threads have names, and so do areas of memory (by newer C libraries).
fn names() -> Result<Vec<SeccompRule>, BackendError> {
    let options = [
        libc::PR_SET_NAME,
        libc::PR_GET_NAME,
        libc::PR_SET_VMA,
        libc::PR_SET_NO_NEW_PRIVS,
    ];
    let option = |option: &i32| equal(0, u64::from(option.unsigned_abs()));
    options.iter().map(option).collect()
}

fn flag(flag: i32) -> u64 {
    u64::from(flag.unsigned_abs())
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    rule(argument, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, bits: u64, value: u64) -> Result<SeccompRule, BackendError> {
    rule(argument, SeccompCmpOp::MaskedEq(bits), value)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    // The kernel reads 32 bits of each of these arguments.
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}
