//! Tap interfaces (Linux, Documentation/networking/tuntap.rst), with virtio-net's own header before
//! each frame.

#![expect(
    unsafe_code,
    reason = "ioctls of network interfaces, and the guest's memory"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use memory::DirtySlice;
use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

const DEVICE: &str = "/dev/net/tun";

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;

/// Bytes of `virtio_net_hdr` with its `num_buffers` (virtio 1.3, 5.1.6).
pub(super) const HEADER_LEN: usize = 12;

/// A tap that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The tap cannot be opened or created.
    #[error("the tap `{name}` cannot be used: {}", reason(source))]
    Open {
        /// Its name, or what stands for one.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The name is not one that an interface can have.
    #[error("`{0}` is not an interface name: use 1 to 15 bytes without `/` and spaces")]
    Name(String),
    /// Another program opened the tap with unsuitable settings.
    #[error("the tap `{name}`, passed as descriptors, cannot be used: {why}")]
    Adopted {
        /// Its name.
        name: String,
        /// The reason.
        why: &'static str,
    },
    /// The tap exists and cannot be configured.
    #[error("the host refused to {attempt} of the tap `{name}`: {source}")]
    SetUp {
        /// The attempted operation.
        attempt: &'static str,
        /// Its name.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
}

fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "another program uses it".to_owned(),
        Some(libc::EPERM) => {
            format!("{error}: CAP_NET_ADMIN is needed, or a tap created for this user")
        }
        Some(libc::EINVAL) => {
            format!("{error}: the interface is of another kind, or has another number of queues")
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!("{error}: {DEVICE} is missing; load the module `tun`")
        }
        Some(libc::ENOTTY) => format!("{error}: the descriptor is not a tap"),
        Some(libc::EBADFD) => format!("{error}: the descriptor is not attached to an interface"),
        _ => error.to_string(),
    }
}

/// The host's IP address on a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapIp {
    /// Address and netmask; the host chooses a netmask by the address's class when absent.
    V4(Ipv4Addr, Option<Ipv4Addr>),
    /// Address and length of its prefix, 0 to 128.
    V6(Ipv6Addr, u8),
}

/// How the host's side of a tap is set up; what is absent is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapAddress {
    /// Address.
    pub ip: Option<TapIp>,
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// Largest packet.
    pub mtu: Option<u16>,
}

impl TapAddress {
    /// Returns whether any setting is given.
    pub(super) fn is_given(&self) -> bool {
        *self != Self::default()
    }
}

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    /// Another descriptor of the same queue: an event loop watches each for one task. Made here, because
    /// the tasks start in the stop of a guest that moves.
    twin: Arc<File>,
    name: String,
    multi_queue: bool,
}

/// `struct ifreq` with the given name.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let bad = name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name.contains(|c: char| c == '/' || c.is_ascii_whitespace() || c == '\0');
    if bad {
        return Err(TapError::Name(name.to_owned()));
    }
    // SAFETY: plain bytes, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|c| c.cast_unsigned());
    let bytes: Vec<u8> = bytes.take_while(|c| *c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn last_error(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Tap {
    /// Opens `queues` queues of the tap of this name. A missing tap is created (the host replaces `%d` in its
    /// name by a number) and ends with its last queue.
    pub(super) fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        let mut taps: Vec<Self> = Vec::new();
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        for _ in 0..queues {
            // The host has replaced `%d` by now: the other queues must join the same interface.
            let name = taps.first().map_or(name, |first| &first.name);
            let tap = Self::make(name, flags)?;
            tap.set_header()?;
            taps.push(tap);
        }
        Ok(taps)
    }

    fn make(name: &str, flags: libc::c_int) -> Result<Self, TapError> {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_flags = flags as i16;
        let failed = |source| TapError::Open {
            name: name.to_owned(),
            source,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        // A device thread reads and writes: it serves other devices too and must not wait.
        options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(DEVICE).map_err(failed)?;
        // SAFETY: takes and gives an `ifreq`.
        let made = unsafe { ioctl_with_mut_ref(&file, TUNSETIFF, &mut request) };
        last_error(made).map_err(failed)?;
        Ok(Self {
            twin: Arc::new(file.try_clone().map_err(failed)?),
            file,
            name: name_of(&request),
            multi_queue: flags & libc::IFF_MULTI_QUEUE != 0,
        })
    }

    /// Adopts the queues of a tap that another program opened, one for each descriptor. The tap may be in
    /// another namespace, where we have no rights: it is used as it is.
    pub(super) fn adopt(descriptors: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        let multi_queue = descriptors.len() > 1;
        let adopt = |fd: OwnedFd| {
            let file = File::from(fd);
            let failed = |source| TapError::Open {
                name: format!("descriptor {}", file.as_raw_fd()),
                source,
            };
            // SAFETY: plain bytes, for which zeros are a value.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            // SAFETY: gives an `ifreq`.
            let told = unsafe { ioctl_with_mut_ref(&file, TUNGETIFF, &mut request) };
            last_error(told).map_err(failed)?;
            // SAFETY: this member was just filled in.
            let is = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
            let several = if multi_queue {
                libc::IFF_MULTI_QUEUE
            } else {
                0
            };
            // IFF_NO_PI cannot be read back: its bit means IFF_NOFILTER here.
            let wanted = [
                (
                    libc::IFF_TAP,
                    "it is a tun interface, which carries no Ethernet frames",
                ),
                (libc::IFF_VNET_HDR, "it was created without IFF_VNET_HDR"),
                (
                    several,
                    "it needs several queue pairs and was created without IFF_MULTI_QUEUE",
                ),
            ];
            if let Some((_, why)) = wanted.iter().find(|(flag, _)| is & flag != *flag) {
                let name = name_of(&request);
                return Err(TapError::Adopted { name, why });
            }
            let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| failed(error.into()))?;
            rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK)
                .map_err(|error| failed(error.into()))?;
            let tap = Self {
                name: name_of(&request),
                twin: Arc::new(file.try_clone().map_err(failed)?),
                file,
                multi_queue,
            };
            tap.set_header()?;
            Ok(tap)
        };
        let taps: Vec<Self> = descriptors
            .into_iter()
            .map(adopt)
            .collect::<Result<_, _>>()?;
        if let Some(first) = taps.first()
            && taps.iter().any(|tap| tap.name != first.name)
        {
            return Err(first.unfit("the descriptors belong to several interfaces"));
        }
        Ok(taps)
    }

    fn unfit(&self, why: &'static str) -> TapError {
        let name = self.name.clone();
        TapError::Adopted { name, why }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Another descriptor of the same queue.
    pub(super) fn twin(&self) -> Arc<File> {
        Arc::clone(&self.twin)
    }

    fn failed(&self, attempt: &'static str) -> impl FnOnce(io::Error) -> TapError {
        let name = self.name.clone();
        move |source| TapError::SetUp {
            attempt,
            name,
            source,
        }
    }

    fn set_header(&self) -> Result<(), TapError> {
        let len = HEADER_LEN as i32;
        // SAFETY: takes a number.
        let set = unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ, &len) };
        last_error(set).map_err(self.failed("set the header's length"))
    }

    /// Sets the offloads (`TUN_F_*`) that the reader of frames, the guest, understands.
    pub(super) fn set_offloads(&self, flags: u32) -> Result<(), TapError> {
        // SAFETY: takes a number by value.
        let set = unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD, flags.into()) };
        last_error(set).map_err(self.failed("set the offloads"))
    }

    /// Whether frames come to this queue. An interface of one queue has no choice.
    pub(super) fn attach(&self, on: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        let flag = if on {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        match self.queue(flag) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    fn queue(&self, flag: libc::c_int) -> io::Result<()> {
        // SAFETY: plain bytes, for which zeros are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = flag as i16;
        // SAFETY: takes an `ifreq`.
        let set = unsafe { ioctl_with_ref(&self.file, TUNSETQUEUE, &request) };
        last_error(set)
    }

    /// Whether the interface is in another network namespace than we are, as far as the host tells.
    fn is_elsewhere(&self) -> bool {
        // SAFETY: takes nothing.
        let theirs = unsafe { ioctl(&self.file, TUNGETDEVNETNS) };
        if theirs < 0 {
            return false;
        }
        // SAFETY: a new descriptor, which is ours alone.
        let theirs = unsafe { OwnedFd::from_raw_fd(theirs) };
        let id = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let theirs = rustix::fs::fstat(theirs).map(id);
        let ours = rustix::fs::stat("/proc/thread-self/ns/net").map(id);
        matches!((ours, theirs), (Ok(ours), Ok(theirs)) if ours != theirs)
    }

    /// Sets the host's side up, and brings it up.
    pub(super) fn set_up(&self, address: &TapAddress) -> Result<(), TapError> {
        if self.is_elsewhere() {
            // There may be another of its name here.
            let why = "it is in another network namespace, where its address cannot be set";
            return Err(self.unfit(why));
        }
        // Any socket will do to talk about interfaces.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
        let socket = socket.map_err(self.failed("open a socket to set up the address"))?;
        let fd = socket.as_raw_fd();
        if let Some(mac) = address.mac {
            let mut request = request(&self.name)?;
            let mut data = [0; 14];
            data.iter_mut()
                .zip(mac)
                .for_each(|(to, from)| *to = from.cast_signed());
            request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
                sa_family: libc::ARPHRD_ETHER,
                sa_data: data,
            };
            self.change(
                fd,
                libc::SIOCSIFHWADDR,
                &request,
                "set the hardware address",
            )?;
        }
        if let Some(mtu) = address.mtu {
            let mut request = request(&self.name)?;
            request.ifr_ifru.ifru_mtu = mtu.into();
            self.change(fd, libc::SIOCSIFMTU, &request, "set the MTU")?;
        }
        match address.ip {
            Some(TapIp::V4(ip, mask)) => {
                let mask = mask.map(|mask| (libc::SIOCSIFNETMASK, mask, "set the netmask"));
                let ip = (libc::SIOCSIFADDR, ip, "set the address");
                for (kind, value, attempt) in [Some(ip), mask].into_iter().flatten() {
                    let mut request = request(&self.name)?;
                    request.ifr_ifru.ifru_addr = socket_address(value);
                    self.change(fd, kind, &request, attempt)?;
                }
            }
            Some(TapIp::V6(ip, prefix)) => self.add_ipv6(fd, ip, prefix)?,
            None => {}
        }
        let mut request = request(&self.name)?;
        // SAFETY: takes and gives an `ifreq`.
        let told = unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) };
        last_error(told).map_err(self.failed("read the flags"))?;
        // SAFETY: this member was just filled in.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if flags & libc::IFF_UP as i16 != 0 {
            // The program that created the tap may have left us no right to set it again.
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_RUNNING) as i16;
        self.change(fd, libc::SIOCSIFFLAGS, &request, "bring up the interface")
    }

    /// Adds an IPv6 address (`ipv6(7)`), which needs a socket of that family, and the interface's number
    /// in place of its name. `socket` is any other.
    fn add_ipv6(&self, socket: RawFd, ip: Ipv6Addr, prefix: u8) -> Result<(), TapError> {
        let mut number = request(&self.name)?;
        // SAFETY: takes and gives an `ifreq`.
        let told = unsafe { libc::ioctl(socket, libc::SIOCGIFINDEX, &raw mut number) };
        last_error(told).map_err(self.failed("read the number"))?;
        let request = libc::in6_ifreq {
            ifr6_addr: libc::in6_addr {
                s6_addr: ip.octets(),
            },
            ifr6_prefixlen: prefix.into(),
            // SAFETY: this member was just filled in.
            ifr6_ifindex: unsafe { number.ifr_ifru.ifru_ifindex },
        };
        let attempt = "set the IPv6 address";
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).map_err(self.failed(attempt))?;
        // SAFETY: takes an `in6_ifreq`, as the socket is of IPv6.
        let done =
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) };
        last_error(done).map_err(self.failed(attempt))
    }

    fn change(
        &self,
        socket: RawFd,
        kind: libc::Ioctl,
        request: &libc::ifreq,
        attempt: &'static str,
    ) -> Result<(), TapError> {
        // SAFETY: takes an `ifreq`.
        let done = unsafe { libc::ioctl(socket, kind, std::ptr::from_ref(request)) };
        last_error(done).map_err(self.failed(attempt))
    }

    /// The next frame, with its header; `None` when there is none.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.file, frame) {
            Ok(len) => Ok(Some(len)),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a frame, with its header, from where it is. False when the host has no room now.
    pub(super) fn write(&self, frame: &[VolatileSlice<'_, DirtySlice<'_>>]) -> io::Result<bool> {
        let pieces: Vec<libc::iovec> = frame
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        // The caller limits the pieces to `UIO_MAXIOV`, beyond which the host refuses the call.
        let count = i32::try_from(pieces.len()).unwrap_or(i32::MAX);
        // SAFETY: the pieces are within guest memory that the caller keeps mapped, and are read.
        let sent = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), count) };
        if sent >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            error => Err(error),
        }
    }

    /// Sends a frame of our own, with its header.
    pub(super) fn write_bytes(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.file, frame)?;
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // `sockaddr_in`: a port, then the address.
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: data,
    }
}

#[cfg(test)]
mod tests;
