use std::os::unix::fs::PermissionsExt as _;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

fn socket() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.sock");
    (directory, path)
}

#[test]
fn socket_is_private_and_removed() {
    let (directory, path) = socket();
    let listener = BoundSocket::bind(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(listener.path(), path);
    drop(listener);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn rejects_second_listener() {
    let (_directory, path) = socket();
    let first = BoundSocket::bind(&path).unwrap();
    let refusal = BoundSocket::bind(&path).unwrap_err().to_string();
    assert!(refusal.contains(&path.display().to_string()), "{refusal}");
    // Not a number: who ends that process ends all that it does.
    assert!(refusal.contains("this process listens"), "{refusal}");
    assert!(
        UnixStream::connect(&path).is_ok(),
        "the first one is left alone"
    );
    drop(first);
    BoundSocket::bind(&path).unwrap();
}

#[test]
fn owner_is_named_by_its_number() {
    for (written, named) in [
        ("1\n", "process 1"),
        ("", "another program"),
        ("x", "another program"),
    ] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(written.as_bytes()).unwrap();
        file.rewind().unwrap();
        assert_eq!(owner(&mut file), named);
    }
}

#[test]
fn replaces_socket_of_dead_program() {
    let (_directory, path) = socket();
    // As `kill -9` leaves it: the file without a listener, and a lock file that no program
    // holds.
    drop(UnixListener::bind(&path).unwrap());
    fs::write(path.with_extension("sock.lock"), "4194304\n").unwrap();
    assert!(path.exists());
    let _listener = BoundSocket::bind(&path).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
}

/// A bound socket without a listener, and the lock file of a program.
fn bound_and_locked(path: &Path) -> (OwnedFd, LockFile) {
    let lock = LockFile::take(path).unwrap();
    let bound = super::socket().unwrap();
    rustix::net::bind(&bound, &SocketAddrUnix::new(path).unwrap()).unwrap();
    (bound, lock)
}

#[test]
fn client_waits_for_program_between_bind_and_listen() {
    let (_directory, path) = socket();
    let (bound, _lock) = bound_and_locked(&path);
    let refused = UnixStream::connect(&path).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let client = thread::spawn(move || connect_to_bound(&path));
    thread::sleep(Duration::from_millis(50));
    assert!(!client.is_finished());
    rustix::net::listen(&bound, BACKLOG).unwrap();
    client.join().unwrap().unwrap();
}

/// A stopped program accepts nothing, and its queue of connections fills up.
#[test]
fn client_does_not_wait_for_a_full_queue() {
    let (_directory, path) = socket();
    let _bound = BoundSocket::bind(&path).unwrap();
    let (refused, refusals) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut streams = Vec::new();
        let error = loop {
            match connect_to_bound(&path) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
        };
        refused.send(error.kind()).unwrap();
    });
    let kind = refusals.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(kind, io::ErrorKind::TimedOut);
}

#[test]
fn client_does_not_wait_for_dead_program() {
    let (_directory, path) = socket();
    let start = Instant::now();
    let absent = connect_to_bound(&path).unwrap_err();
    assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    let (_bound, lock) = bound_and_locked(&path);
    drop(lock);
    let refused = connect_to_bound(&path).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < LISTEN_PATIENCE);
}

#[test]
fn removes_only_sockets_of_dead_programs() {
    let (directory, path) = socket();
    let live = BoundSocket::bind(&path).unwrap();
    assert!(matches!(
        remove_abandoned(&path),
        Err(BindError::InUse { .. })
    ));
    drop(live);
    assert!(!remove_abandoned(&path).unwrap());
    let live = UnixListener::bind(&path).unwrap();
    assert!(remove_abandoned(&path).is_err());
    assert!(path.exists());
    drop(live);
    fs::write(path.with_extension("sock.lock"), "4194304\n").unwrap();
    assert!(remove_abandoned(&path).unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    fs::write(&path, "precious").unwrap();
    assert!(remove_abandoned(&path).is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn keeps_live_socket_without_lock() {
    let (_directory, path) = socket();
    let _other = UnixListener::bind(&path).unwrap();
    assert!(matches!(
        BoundSocket::bind(&path),
        Err(BindError::InUse { .. })
    ));
    assert!(path.exists());
}

/// A program that accepts no connection is still alive, and the test does not wait for it.
#[test]
fn does_not_wait_for_full_backlog() {
    let (_directory, path) = socket();
    let _other = UnixListener::bind(&path).unwrap();
    let mut waiting = Vec::new();
    while connect(&path).is_ok() {
        let more = super::socket().unwrap();
        if rustix::net::connect(&more, &SocketAddrUnix::new(&path).unwrap()).is_err() {
            break;
        }
        waiting.push(more);
    }
    assert!(matches!(
        BoundSocket::bind(&path),
        Err(BindError::InUse { .. })
    ));
}

#[test]
fn never_replaces_a_file() {
    let (_directory, path) = socket();
    fs::write(&path, "precious").unwrap();
    assert!(matches!(
        BoundSocket::bind(&path),
        Err(BindError::NotASocket(_))
    ));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn rejects_invalid_path() {
    let (directory, path) = socket();
    let missing = path.join("deeper.sock");
    let refusal = BoundSocket::bind(&missing).unwrap_err().to_string();
    assert!(refusal.contains("deeper.sock"), "{refusal}");
    let long = directory.path().join("l".repeat(120));
    let BindError::Bind { source, .. } = BoundSocket::bind(&long).unwrap_err() else {
        panic!("another refusal");
    };
    assert!(source.to_string().contains("107 bytes"), "{source}");
}

/// Many start at once over a stale file: exactly one listens, whatever the order.
#[test]
fn one_of_many_starters_listens() {
    for _ in 0..20 {
        let (_directory, path) = socket();
        drop(UnixListener::bind(&path).unwrap());
        let start = Barrier::new(8);
        let listening: Vec<BoundSocket> = thread::scope(|scope| {
            let tries: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        BoundSocket::bind(&path)
                    })
                })
                .collect();
            let tries = tries.into_iter().map(|one| one.join().unwrap());
            tries.flatten().collect()
        });
        assert_eq!(listening.len(), 1);
        assert!(UnixStream::connect(&path).is_ok());
    }
}

/// Many replace one dead socket at once, without lock files: exactly one listens, and can be reached.
#[test]
fn one_of_many_replaces_dead_socket() {
    for _ in 0..100 {
        let (directory, path) = socket();
        drop(UnixListener::bind(&path).unwrap());
        let start = Barrier::new(8);
        let listening: Vec<UnixListener> = thread::scope(|scope| {
            let replace = || {
                start.wait();
                bind_replacing(&path)
            };
            let tries: Vec<_> = (0..8).map(|_| scope.spawn(replace)).collect();
            let tries = tries.into_iter().map(|one| one.join().unwrap());
            tries.flatten().collect()
        });
        assert_eq!(listening.len(), 1);
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

#[test]
fn replaces_neither_files_nor_live_sockets() {
    let (directory, path) = socket();
    fs::write(&path, "precious").unwrap();
    let refused = bind_replacing(&path).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(
        refused.to_string(),
        "the path is a file that is not a socket"
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let live = path.with_extension("live");
    let _listener = UnixListener::bind(&live).unwrap();
    for (taken, why) in [
        (live.as_path(), "another program listens there"),
        (directory.path(), "the path is a directory"),
        (&path, "the path is a file that is not a socket"),
    ] {
        for refused in [bind_replacing(taken).map(drop), check_free(taken)] {
            assert_eq!(refused.unwrap_err().to_string(), why);
        }
    }
    let dead = path.with_extension("abandoned");
    drop(UnixListener::bind(&dead).unwrap());
    check_free(&dead).unwrap();
    assert!(dead.exists());
    check_free(&path.with_extension("new")).unwrap();
    let long = check_free(&path.with_extension("x".repeat(107))).unwrap_err();
    assert_eq!(long.kind(), io::ErrorKind::InvalidInput);
    let link = path.with_extension("link");
    drop(UnixListener::bind(path.with_extension("dead")).unwrap());
    std::os::unix::fs::symlink(path.with_extension("dead"), &link).unwrap();
    assert!(bind_replacing(&link).is_err());
    assert!(link.is_symlink());
}

/// Another program's lock on the directory makes a bind fail, and not wait for ever.
#[test]
fn does_not_wait_for_foreign_lock() {
    let (directory, path) = socket();
    let foreign = File::open(directory.path()).unwrap();
    flock(&foreign, FlockOperation::LockExclusive).unwrap();
    let refused = bind_replacing(&path).unwrap_err().to_string();
    assert!(refused.contains("holds a lock"), "{refused}");
    drop(foreign);
    bind_replacing(&path).unwrap();
}

/// Programs come and go on one socket, cleanly and as if killed: there are never two.
#[test]
fn one_listener_at_a_time() {
    let (_directory, path) = socket();
    let (alive, listened) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let churn = |killed: bool| {
        for _ in 0..200 {
            if let Ok(mut socket) = BoundSocket::bind(&path) {
                assert_eq!(alive.fetch_add(1, Ordering::SeqCst), 0);
                thread::yield_now();
                alive.fetch_sub(1, Ordering::SeqCst);
                listened.fetch_add(1, Ordering::SeqCst);
                if killed {
                    // Its file stays behind.
                    socket.identity = (0, 0);
                }
            }
        }
    };
    thread::scope(|scope| {
        for killed in [false, true, false, true] {
            let churn = &churn;
            scope.spawn(move || churn(killed));
        }
    });
    assert!(listened.load(Ordering::SeqCst) > 0);
}
