//! Descriptors that the program inherits and the command line names by number, and the options that
//! take them.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use api::Listener;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use spec::{Descriptors, NetConfig, RestoreConfig, RestoredNetConfig, options};

/// Returns a duplicate of the inherited descriptor `number`, closed on exec. The inherited one
/// stays open.
///
/// A number alone does not say whether the descriptor is open, or who owns it: to make an `OwnedFd`
/// of it is unsafe. The kernel does both checks when the number goes through a socket as
/// `SCM_RIGHTS` (unix(7)).
///
/// # Errors
/// When no descriptor of this number is open, or the host has no room for two more.
pub(crate) fn duplicate(number: RawFd) -> Result<OwnedFd> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let (out, back) = pair.context("cannot make a pair of sockets")?;
    let numbers = [number];
    sendmsg::<()>(
        out.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &[ControlMessage::ScmRights(&numbers)],
        MsgFlags::empty(),
        None,
    )
    .with_context(|| format!("descriptor {number} was not inherited"))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        &back,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .with_context(|| format!("cannot duplicate descriptor {number}"))?;
    // The kernel drops a descriptor silently (MSG_CTRUNC) if this process may open no more.
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.with_context(|| {
        format!("cannot duplicate descriptor {number}: too many descriptors are open")
    })
}

/// Reads `3`, or `[3,4]`: descriptors of the queues of a tap.
///
/// # Errors
/// When the text is not of this form, or [`duplicate`] fails.
pub(crate) fn duplicate_all(text: &str) -> Result<Vec<OwnedFd>> {
    let list = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    list.unwrap_or(text)
        .split(',')
        .map(|number| duplicate(parse(number)?))
        .collect()
}

/// Reads the number of a descriptor.
pub(crate) fn parse(text: &str) -> Result<RawFd> {
    text.parse()
        .ok()
        .filter(|number| *number >= 0)
        .with_context(|| format!("`{text}` is not the number of a descriptor"))
}

/// The socket at which the API of one VM is served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ApiSocket {
    /// A unix socket to bind.
    Path(PathBuf),
    /// An inherited descriptor.
    Inherited(RawFd),
}

impl ApiSocket {
    /// Reads `PATH`, `path=PATH` or `fd=N`.
    ///
    /// # Errors
    /// When N is not the number of a descriptor.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        Ok(match text.split_once('=') {
            Some(("fd", number)) => {
                let number = parse(number).with_context(|| format!("--api-socket {text}"))?;
                Self::Inherited(number)
            }
            Some(("path", path)) => Self::Path(path.into()),
            _ => Self::Path(text.into()),
        })
    }

    /// Listens there.
    ///
    /// # Errors
    /// When the path cannot be bound, or the descriptor is not a unix socket that listens.
    pub(crate) fn listen(self) -> Result<Listener> {
        Ok(match self {
            Self::Path(path) => Listener::unix(path)?,
            Self::Inherited(number) => duplicate(number)
                .and_then(|socket| Ok(Listener::inherited(socket)?))
                .with_context(|| format!("--api-socket fd={number}"))?,
        })
    }
}

/// Reads `--net`, whose key `fd` is for the command line only: the API takes descriptors as
/// `SCM_RIGHTS`.
///
/// # Errors
/// When a key is not known, a value not possible, or a descriptor not open.
pub(crate) fn net(text: &str) -> Result<NetConfig> {
    let Some((value, rest)) = cut(text, "fd") else {
        return Ok(options::NET.read(text)?);
    };
    let fds = duplicate_all(value).with_context(|| format!("--net {text}"))?;
    let mut net: NetConfig = options::NET.read(&rest)?;
    net.fds = Some(Descriptors::new(fds));
    Ok(net)
}

/// Reads `--restore`, whose key `net_fds` is for the command line only, as `fd` of [`net`]:
/// `net_fds=[net0@[3,4],net1@[5]]`.
///
/// # Errors
/// When a key is not known, a value not possible, or a descriptor not open.
pub(crate) fn restore(text: &str) -> Result<RestoreConfig> {
    let Some((value, rest)) = cut(text, "net_fds") else {
        return Ok(options::RESTORE.read(text)?);
    };
    let entry = |entry: &str| {
        let (id, numbers) = entry
            .split_once('@')
            .with_context(|| format!("`{entry}` is not of the form ID@[NUMBER,...]"))?;
        let fds = Descriptors::new(duplicate_all(numbers)?);
        Ok::<_, anyhow::Error>(RestoredNetConfig {
            id: id.to_owned(),
            num_fds: fds.count(),
            fds: Some(fds),
        })
    };
    let list = value
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let entries = items(list.unwrap_or(value)).into_iter().map(entry);
    let net_fds = entries.collect::<Result<_>>();
    let mut what: RestoreConfig = options::RESTORE.read(&rest)?;
    what.net_fds = Some(net_fds.with_context(|| format!("--restore {text}"))?);
    Ok(what)
}

/// Splits a list at the commas outside of brackets.
fn items(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let is_end = |letter: char| {
        match letter {
            '[' => depth = depth.saturating_add(1),
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    };
    text.split(is_end).collect()
}

/// Takes a key out of the text of an option: its value, and the text without it.
fn cut<'a>(text: &'a str, key: &str) -> Option<(&'a str, String)> {
    let mut items = items(text);
    // Only a key: `tapfd=` or a value that contains `fd=` is none.
    let is_it = |item: &&str| {
        item.strip_prefix(key)
            .is_some_and(|rest| rest.starts_with('='))
    };
    let item = items.remove(items.iter().position(is_it)?);
    let (_, value) = item.split_once('=')?;
    Some((value, items.join(",")))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn duplicate_is_the_same_open_file() {
        let mut file = tempfile::tempfile().unwrap();
        let mut twin = File::from(duplicate(file.as_raw_fd()).unwrap());
        twin.write_all(b"abc").unwrap();
        file.rewind().unwrap();
        let mut found = String::new();
        file.read_to_string(&mut found).unwrap();
        assert_eq!(found, "abc");
        let flags = rustix::io::fcntl_getfd(&twin).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let twins = duplicate_all(&format!("[{0},{0}]", file.as_raw_fd())).unwrap();
        assert_eq!(twins.len(), 2);
    }

    #[test]
    fn refuses_a_descriptor_that_is_not_open() {
        for text in ["-1", "x", "", "[3"] {
            assert!(duplicate_all(text).is_err(), "{text}");
        }
        let refused = duplicate(1 << 20).unwrap_err().to_string();
        assert!(refused.contains("1048576 was not inherited"), "{refused}");
    }

    #[test]
    fn sockets_in_all_forms() {
        let socket = ApiSocket::parse;
        for (text, path) in [("/a/b", "/a/b"), ("path=/c", "/c")] {
            let expected = ApiSocket::Path(path.into());
            assert_eq!(socket(text).unwrap(), expected);
        }
        let inherited = socket("fd=3").unwrap();
        assert_eq!(inherited, ApiSocket::Inherited(3));
        let refused = format!("{:#}", socket("fd=-3").unwrap_err());
        assert!(refused.contains("--api-socket fd=-3"), "{refused}");
    }

    #[test]
    fn tap_by_descriptors_stands_among_other_keys() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        for text in [
            format!("fd={fd},mtu=1400"),
            format!("mtu=1400,fd={fd}"),
            format!("fd=[{fd}],mtu=1400"),
        ] {
            let net = net(&text).unwrap();
            let fds = net.tap_descriptors().unwrap();
            assert!(fds.are_here() && fds.count() == 1, "{text}");
            assert_eq!(net.mtu, Some(1400));
        }
        let two = net(&format!("mtu=1400,fd=[{fd},{fd}]")).unwrap();
        assert_eq!(two.tap_descriptors().unwrap().count(), 2);
        assert!(net("fd=1048576").is_err());
        assert_eq!(net("tap=afd=1").unwrap().tap.as_deref(), Some("afd=1"));
    }

    #[test]
    fn restore_gets_descriptors_by_interface() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let text = format!("source_url=file:///s,net_fds=[a@[{fd},{fd}],b@{fd}],resume=on");
        let what = restore(&text).unwrap();
        assert_eq!((what.source_url.as_str(), what.resume), ("file:///s", true));
        let told = what.net_fds.unwrap();
        let told = told.iter().map(|net| {
            assert!(net.fds.as_ref().unwrap().are_here());
            (net.id.as_str(), net.num_fds)
        });
        assert_eq!(told.collect::<Vec<_>>(), [("a", 2), ("b", 1)]);
        assert_eq!(restore("source_url=file:///s").unwrap().net_fds, None);
        for bad in ["[a]", "[a@x]", "[a@[1048576]]", ""] {
            let bad = restore(&format!("source_url=file:///s,net_fds={bad}"));
            let bad = format!("{:#}", bad.unwrap_err());
            assert!(bad.starts_with("--restore source_url"), "{bad}");
        }
    }
}
