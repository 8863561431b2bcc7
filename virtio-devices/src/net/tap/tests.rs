//! Tests with real interfaces. They need `/dev/net/tun`, CAP_NET_ADMIN and CAP_SYS_ADMIN.

use std::time::Instant;

use ::state::{Store, Writer};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities};

use super::super::{Net, NetConfig, TapSource};
use super::*;
use crate::device::VirtioDevice as _;
use crate::rate_limiter::RateLimits;
use crate::testing::{PATIENCE, workers};

const USUAL: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const SEVERAL: libc::c_int = USUAL | libc::IFF_MULTI_QUEUE;

fn used(tap: TapSource, pairs: u16, address: TapAddress) -> Result<String, String> {
    let config = NetConfig {
        tap,
        address,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        pairs,
        queue_size: 64,
        offload_csum: true,
        offload_tso: true,
        limits: RateLimits::default(),
    };
    let (_event_loop, workers) = workers();
    match Net::new(config, workers) {
        Ok((_, handle)) => Ok(handle.tap().unwrap().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn fd(tap: &Tap) -> OwnedFd {
    tap.file.try_clone().unwrap().into()
}

fn adopted(taps: &[&Tap]) -> Result<String, String> {
    let fds: Vec<OwnedFd> = taps.iter().map(|tap| fd(tap)).collect();
    let pairs = u16::try_from(fds.len()).unwrap();
    used(TapSource::Descriptors(fds), pairs, TapAddress::default())
}

#[test]
fn rejects_unsuitable_tap_descriptors() {
    let make = |flags| Tap::make("wbadopt%d", flags).unwrap();
    let good = make(USUAL);
    assert_eq!(adopted(&[&good]), Ok(good.name.clone()));
    let first = make(SEVERAL);
    let second = Tap::make(&first.name, SEVERAL).unwrap();
    assert_eq!(adopted(&[&first]), Ok(first.name.clone()));
    assert_eq!(adopted(&[&first, &second]), Ok(first.name.clone()));
    let other = make(SEVERAL);
    for (taps, why) in [
        (vec![&make(USUAL & !libc::IFF_VNET_HDR)], "IFF_VNET_HDR"),
        (vec![&make(USUAL ^ libc::IFF_TAP ^ libc::IFF_TUN)], "a tun"),
        (vec![&good, &good], "IFF_MULTI_QUEUE"),
        (vec![&first, &other], "several interfaces"),
    ] {
        let told = adopted(&taps).unwrap_err();
        let name = &taps[0].name;
        assert!(told.contains(why) && told.contains(name), "{told}");
    }
    for (path, why) in [
        ("/dev/null", "not a tap"),
        (DEVICE, "not attached to an interface"),
    ] {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let source = TapSource::Descriptors(vec![file.into()]);
        let told = used(source, 1, TapAddress::default()).unwrap_err();
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn uses_tap_of_other_namespace() {
    let ip = |last| Ipv4Addr::new(10, 213, 77, last);
    let there = std::thread::spawn(move || {
        // SAFETY: no descriptors are unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        let tap = Tap::open("wbelsewhere", 1).unwrap().remove(0);
        tap.set_up(&TapAddress {
            ip: Some(TapIp::V4(ip(1), Some(Ipv4Addr::new(255, 255, 255, 0)))),
            ..TapAddress::default()
        })
        .unwrap();
        (tap, UdpSocket::bind((ip(1), 0)).unwrap())
    });
    let (tap, socket) = there.join().unwrap();
    assert_eq!(adopted(&[&tap]), Ok("wbelsewhere".to_owned()));
    // What is asked for that cannot be done there is refused, and not done to one of its name here.
    let _here = Tap::open("wbelsewhere", 1).unwrap();
    let mtu = TapAddress {
        mtu: Some(9000),
        ..TapAddress::default()
    };
    let source = TapSource::Descriptors(vec![fd(&tap)]);
    let told = used(source, 1, mtu).unwrap_err();
    assert!(told.contains("another network namespace"), "{told}");
    let mtu = std::fs::read_to_string("/sys/class/net/wbelsewhere/mtu").unwrap();
    assert_eq!(mtu.trim(), "1500");
    // Frames come: it is asked for who has the address.
    socket.send_to(b"who", (ip(2), 9)).unwrap();
    let (tap, from) = (
        Tap::adopt(vec![fd(&tap)]).unwrap().remove(0),
        Instant::now(),
    );
    loop {
        assert!(from.elapsed() < PATIENCE, "no frame came");
        let mut frame = [0; 2000];
        match tap.read(&mut frame).unwrap() {
            Some(_) if frame[HEADER_LEN + 12..][..2] == [8, 6] => break,
            _ => std::thread::yield_now(),
        }
    }
}

#[test]
fn tap_that_is_up_needs_no_capability() {
    let taps = Tap::open("wbup%d", 2).unwrap();
    let name = taps[0].name.clone();
    taps[0].set_up(&TapAddress::default()).unwrap();
    let up = taps;
    let unprivileged = std::thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        let source = TapSource::Name(name.clone());
        assert_eq!(used(source, 2, TapAddress::default()), Ok(name.clone()));
        assert_eq!(adopted(&[&up[0], &up[1]]), Ok(name.clone()));
        let mtu = TapAddress {
            mtu: Some(9000),
            ..TapAddress::default()
        };
        let told = used(TapSource::Name(name), 2, mtu).unwrap_err();
        assert!(told.contains("set the MTU"), "{told}");
    });
    unprivileged.join().unwrap();
}

/// Prefix length and scope of a tap's address, as the host shows them.
fn inet6(tap: &str, address: &str) -> Option<(String, String)> {
    let all = std::fs::read_to_string("/proc/net/if_inet6").unwrap();
    all.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        match fields[..] {
            [ip, _, prefix, scope, _, name] if (ip, name) == (address, tap) => {
                Some((prefix.to_owned(), scope.to_owned()))
            }
            _ => None,
        }
    })
}

#[test]
fn tap_gets_an_ipv6_address() {
    let ip: Ipv6Addr = "fd57:6869:6d42::1".parse().unwrap();
    let taps = Tap::open("wbsix%d", 1).unwrap();
    let address = TapAddress {
        ip: Some(TapIp::V6(ip, 80)),
        ..TapAddress::default()
    };
    taps[0].set_up(&address).unwrap();
    let found = inet6(&taps[0].name, "fd5768696d4200000000000000000001");
    // A prefix of 80 bits (0x50), and a global scope.
    assert_eq!(found, Some(("50".to_owned(), "00".to_owned())));
    let refused = taps[0].set_up(&address).unwrap_err().to_string();
    assert!(refused.contains("set the IPv6 address"), "{refused}");
}

/// A load is repeated in the stop of a migration, and each call to the host takes its time there.
#[test]
fn load_changes_only_settings_that_differ() {
    let config = NetConfig {
        tap: TapSource::Name("wbload%d".to_owned()),
        address: TapAddress::default(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        pairs: 3,
        queue_size: 64,
        offload_csum: true,
        offload_tso: true,
        limits: RateLimits::default(),
    };
    let (_event_loop, workers) = workers();
    let (mut device, _) = Net::new(config, workers).unwrap();
    let save = |device: &Net, pairs| {
        device.shared.set_pairs(pairs);
        let mut writer = Writer::default();
        device.save(&mut writer.scope("net").unwrap()).unwrap();
        writer.finish()
    };
    let [one, three] = [1, 3].map(|pairs| save(&device, pairs));
    let load = |device: &mut Net, saved: &[u8]| {
        device.prepare_load();
        let mut store = Store::open(saved).unwrap();
        device.load(&mut store.scope("net").unwrap()).unwrap();
        // Of the last queue. To detach one that is not attached is an error.
        let tap = &device.shared.taps[2];
        let is_attached = tap.queue(libc::IFF_DETACH_QUEUE).is_ok();
        if is_attached {
            tap.attach(true).unwrap();
        }
        is_attached
    };
    assert!(!load(&mut device, &one));
    assert!(load(&mut device, &three));
    // Behind the device's back: nobody sets it again.
    device.shared.taps[2].attach(false).unwrap();
    assert!(!load(&mut device, &three));
    assert!(!load(&mut device, &one));
    assert!(load(&mut device, &three));
    device.reset();
    assert!(device.shared.taps[2].queue(libc::IFF_DETACH_QUEUE).is_err());
}
