//! The client against a service.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::{Bounds, Listener, Service, TcpAccess, serve_within};
use control::Registry;
use control::fake::Fake;
use openapi::{Client, ClientError, News};
use spec::{
    CreateVm, DiskConfig, PayloadConfig, PmemConfig, VmConfig, VmId, VmState, VmmPingResponse,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

struct Served {
    directory: tempfile::TempDir,
    service: Service,
    serving: JoinHandle<()>,
}

impl Served {
    fn start(fake: Fake, bounds: Bounds, one_vm: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let about = VmmPingResponse {
            build_version: "1.2.3".to_owned(),
            version: "1.2.3".to_owned(),
            pid: 1,
            features: Vec::new(),
        };
        let service = Service::new(Registry::new(fake), about);
        let router = match one_vm {
            true => service.vm_router(&"vm".parse::<VmId>().unwrap(), service.shutdown()),
            false => service.router(),
        };
        let listener = Listener::unix(directory.path().join("api.sock")).unwrap();
        let serving = tokio::spawn(serve_within(
            listener,
            router,
            service.shutdown().clone(),
            bounds,
        ));
        Self {
            directory,
            service,
            serving,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::unix(self.path())
    }
}

fn config() -> VmConfig {
    let kernel = Some("/boot/vmlinux".to_owned());
    VmConfig::with_payload(PayloadConfig {
        kernel,
        ..PayloadConfig::default()
    })
}

#[tokio::test]
async fn vm_lifecycle_by_name() {
    let served = Served::start(Fake::default(), Bounds::default(), false);
    let client = served.client();
    assert_eq!(client.ping().await.unwrap().version, "1.2.3");
    assert!(client.vms_list().await.unwrap().is_empty());
    let new = CreateVm {
        id: Some("mine".parse().unwrap()),
        config: config(),
    };
    let vm = client.vms_create(&new).await.unwrap().id;
    assert_eq!(
        client.vms_ensure(&vm, &config()).await.unwrap().state,
        VmState::Created
    );
    client.vms_boot(&vm).await.unwrap();
    client.vms_pause(&vm).await.unwrap();
    assert_eq!(client.vms_info(&vm).await.unwrap().state, VmState::Paused);
    client.vms_resume(&vm).await.unwrap();
    client.vms_reboot(&vm).await.unwrap();
    client.vms_power_button(&vm).await.unwrap();
    client.vms_nmi(&vm).await.unwrap();
    let counters = client.vms_counters(&vm).await.unwrap();
    assert_eq!(counters["_disk0"]["read_bytes"], 7);
    assert!(client.vms_memory_map(&vm).await.unwrap().spaces.is_empty());
    client.vms_shutdown(&vm).await.unwrap();
    assert_eq!(client.vms_list().await.unwrap()[0].state, VmState::Shutdown);
    assert!(
        client
            .metrics()
            .await
            .unwrap()
            .contains("whimbrel_vms{state=\"Shutdown\"} 1")
    );
    assert_eq!(client.openapi().await.unwrap()["info"]["title"], "Whimbrel");
    client.vms_delete(&vm).await.unwrap();
    assert_eq!(
        client.vms_info(&vm).await.unwrap_err().code(),
        Some("no-such-vm")
    );
    client.shut_service_down().await.unwrap();
    served.serving.await.unwrap();
}

#[tokio::test]
async fn vm_lifecycle_on_own_socket() {
    let served = Served::start(Fake::default(), Bounds::default(), true);
    let client = served.client();
    client.vm_create(&config()).await.unwrap();
    client.vm_boot().await.unwrap();
    client.vm_pause().await.unwrap();
    assert_eq!(
        client.vm_pause().await.unwrap_err().code(),
        Some("wrong-state")
    );
    assert_eq!(client.vm_info().await.unwrap().state, VmState::Paused);
    let disk: DiskConfig = serde_json::from_str(r#"{"path":"/d","id":"data"}"#).unwrap();
    let added = client.vm_add_disk(&disk).await.unwrap().unwrap();
    assert_eq!(
        (added.id.as_str(), added.bdf.as_str()),
        ("data", "0000:00:05.0")
    );
    client.vm_shutdown().await.unwrap();
    assert_eq!(client.vm_add_disk(&disk).await.unwrap(), None);
    let pmem: PmemConfig = serde_json::from_str(r#"{"file":"/p"}"#).unwrap();
    assert_eq!(
        client.vm_add_pmem(&pmem).await.unwrap_err().code(),
        Some("not-implemented")
    );
    client.vm_delete().await.unwrap();
    assert_eq!(
        client.vm_info().await.unwrap_err().code(),
        Some("vm-not-created")
    );
}

#[tokio::test]
async fn problem_lists_every_field() {
    let served = Served::start(Fake::default(), Bounds::default(), true);
    let mut config = config();
    config.memory.size = 4097;
    config.cpus.boot_vcpus = 0;
    let error = served.client().vm_create(&config).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("/memory/size") && text.contains("/cpus/boot_vcpus"),
        "{text}"
    );
}

#[tokio::test]
async fn missing_service_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("no.sock");
    let error = Client::unix(&missing).ping().await.unwrap_err();
    assert!(matches!(error, ClientError::NoService { .. }), "{error}");
    assert!(
        error.to_string().contains(missing.to_str().unwrap()),
        "{error}"
    );
    // The socket of a service that was killed.
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let error = Client::unix(&stale).ping().await.unwrap_err();
    assert!(error.to_string().contains("is whimbrel running"), "{error}");
    // A port without a listener.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    assert!(matches!(
        Client::tcp(free).ping().await,
        Err(ClientError::NoService { .. })
    ));
}

#[tokio::test]
async fn rejects_peer_that_is_no_service() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let answers = [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "SSH-2.0-OpenSSH\r\n",
            "",
        ];
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        std::future::pending::<()>().await;
    });
    let client = Client::unix(&path).with_timeout(Duration::from_millis(300));
    let error = client.ping().await.unwrap_err();
    assert!(
        matches!(&error, ClientError::NotUnderstood { body, .. } if body == "hello"),
        "{error}"
    );
    // The connection was kept, and is closed by now.
    for _ in 0..2 {
        let error = client.ping().await.unwrap_err();
        assert!(matches!(error, ClientError::Broken { .. }), "{error}");
    }
    let error = client.ping().await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
}

/// The service closes an idle connection, and restarts.
#[tokio::test]
async fn connections_are_reused_and_reopened() {
    let header_read_timeout = Duration::from_millis(100);
    let bounds = Bounds {
        header_read_timeout,
        ..Bounds::default()
    };
    let served = Served::start(Fake::default(), bounds, false);
    let client = served.client();
    for _ in 0..3 {
        client.ping().await.unwrap();
        tokio::time::sleep(header_read_timeout * 2).await;
    }
    let path = served.path();
    served.service.shutdown().request();
    served.serving.await.unwrap();
    assert!(matches!(
        client.ping().await,
        Err(ClientError::NoService { .. })
    ));
    let again = Service::new(served.service.registry().clone(), client_about());
    let listener = Listener::unix(&path).unwrap();
    tokio::spawn(api::serve(
        listener,
        again.router(),
        again.shutdown().clone(),
    ));
    assert_eq!(client.ping().await.unwrap().version, "2");
}

fn client_about() -> VmmPingResponse {
    VmmPingResponse {
        build_version: String::new(),
        version: "2".to_owned(),
        pid: 1,
        features: Vec::new(),
    }
}

#[tokio::test]
async fn concurrent_calls_do_not_block() {
    let delay = Duration::from_millis(300);
    let served = Served::start(
        Fake {
            delay,
            ..Fake::default()
        },
        Bounds::default(),
        false,
    );
    let client = served.client();
    let mut vms = Vec::new();
    for _ in 0..4 {
        let new = CreateVm {
            id: None,
            config: config(),
        };
        vms.push(client.vms_create(&new).await.unwrap().id);
    }
    let begun = Instant::now();
    let boots: Vec<_> = vms
        .into_iter()
        .map(|vm| {
            let client = client.clone();
            tokio::spawn(async move { client.vms_boot(&vm).await })
        })
        .collect();
    for boot in boots {
        boot.await.unwrap().unwrap();
    }
    assert!(begun.elapsed() < delay * 3, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn slow_service_times_out() {
    let delay = Duration::from_secs(2);
    let served = Served::start(
        Fake {
            delay,
            ..Fake::default()
        },
        Bounds::default(),
        false,
    );
    let client = served.client().with_timeout(Duration::from_millis(100));
    let vm = client
        .vms_create(&CreateVm {
            id: None,
            config: config(),
        })
        .await
        .unwrap()
        .id;
    let error = client.vms_boot(&vm).await.unwrap_err();
    assert!(error.to_string().contains("bootVm"), "{error}");
    // Its connection is not used for another call.
    assert_eq!(client.vms_info(&vm).await.unwrap().state, VmState::Created);
}

#[tokio::test]
async fn events_are_followed() {
    let served = Served::start(Fake::default(), Bounds::default(), false);
    let client = served.client();
    let vm = client
        .vms_create(&CreateVm {
            id: None,
            config: config(),
        })
        .await
        .unwrap()
        .id;
    let mut events = client.events(Some(0), Some(&vm)).await.unwrap();
    client.vms_boot(&vm).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match events.next().await.unwrap() {
            Some(News::Happened(event)) => seen.push((event.sequence, event.event, event.vm)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        seen,
        [
            (1, "created".to_owned(), vm.clone()),
            (2, "booted".to_owned(), vm)
        ]
    );
    served.service.shutdown().request();
    assert_eq!(events.next().await.unwrap(), None);
}

#[tokio::test]
async fn tcp_is_the_same() {
    let served = Served::start(Fake::default(), Bounds::default(), false);
    let token: spec::ApiToken = "0123456789abcdef0123456789abcdef".parse().unwrap();
    let access = TcpAccess::from(token.clone());
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), access)
        .await
        .unwrap();
    let address = listener
        .place()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let service = &served.service;
    tokio::spawn(api::serve(
        listener,
        service.router(),
        service.shutdown().clone(),
    ));
    let client = Client::tcp(address);
    let refused = client.ping().await.unwrap_err();
    assert_eq!(refused.code(), Some("token-missing"), "{refused}");
    let stranger = "f".repeat(32).parse().unwrap();
    let refused = client.clone().with_token(stranger).ping().await;
    assert_eq!(refused.unwrap_err().code(), Some("token-wrong"));
    let client = client.with_token(token);
    assert_eq!(client.ping().await.unwrap().version, "1.2.3");
    // A stream is a request, too.
    client.events(None, None).await.unwrap();
}

/// A server that answers each connection's first request with these bytes.
async fn answers(listener: UnixListener, answer: &'static str) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

#[tokio::test]
async fn cloud_hypervisors_own_answers_are_understood() {
    let directory = tempfile::tempdir().unwrap();
    let serve = |name: &str, answer| {
        let path = directory.path().join(name);
        tokio::spawn(answers(UnixListener::bind(&path).unwrap(), answer));
        Client::unix(path)
    };
    let info = serve(
        "info",
        "HTTP/1.1 200 \r\nConnection: close\r\n\r\n{\"config\": {\"payload\": {\"kernel\": \"/k\"}, \
         \"later\": {\"x\": 1}}, \"state\": \"Paused\", \"memory_actual_size\": 1, \"later\": true}",
    );
    assert_eq!(info.vm_info().await.unwrap().state, VmState::Paused);
    let refusal = serve(
        "refusal",
        "HTTP/1.1 500 \r\nConnection: close\r\n\r\n[\"Error from API\", \"The VM could not boot\"]",
    );
    let error = refusal.vm_boot().await.unwrap_err();
    assert_eq!(error.code(), Some("cloud-hypervisor"));
    assert!(
        error.to_string().contains("The VM could not boot"),
        "{error}"
    );
}
