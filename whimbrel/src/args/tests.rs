use clap::CommandFactory;

use super::*;

fn config(line: &str) -> Result<Option<VmConfig>> {
    let words = std::iter::once("whimbrel").chain(line.split(' ').filter(|word| !word.is_empty()));
    Arguments::try_parse_from(words)?.vm.config(None)
}

fn serve(line: &str) -> Result<ServeArguments> {
    let words = ["whimbrel", "serve"].into_iter().chain(line.split(' '));
    match Arguments::try_parse_from(words)?.command {
        Some(Command::Serve(serve)) => Ok(*serve),
        other => bail!("{other:?}"),
    }
}

#[test]
fn tcp_wants_a_token_or_an_explicit_no() {
    let open = serve("--tcp 0.0.0.0:80")
        .unwrap()
        .tcp_access()
        .unwrap_err()
        .to_string();
    assert!(
        open.contains("`--api-token-file`") && open.contains("TLS"),
        "{open}"
    );
    let refused = serve("--tcp [::1]:80").unwrap().tcp_access().unwrap_err();
    assert!(
        refused.to_string().contains("--api-token-file"),
        "{refused}"
    );
    let unreadable = serve("--tcp [::1]:80 --api-token-file /nothing").unwrap();
    let refused = unreadable.tcp_access().unwrap_err().to_string();
    assert!(refused.contains("/nothing"), "{refused}");
    let insecure = serve("--tcp [::1]:80 --api-insecure").unwrap();
    assert!(matches!(
        insecure.tcp_access().unwrap(),
        Some((_, TcpAccess::AnyLocalUser))
    ));
    // An option that would have no effect, or two that contradict each other.
    for line in [
        "--api-token-file /t",
        "--api-insecure",
        "--tcp [::1]:80 --api-insecure --api-token-file /t",
    ] {
        assert!(serve(line).is_err(), "{line}");
    }
    assert!(
        serve("--socket /s")
            .unwrap()
            .tcp_access()
            .unwrap()
            .is_none()
    );
}

#[test]
fn refuses_numbers_out_of_range_by_name() {
    for number in ["0", "1025", "100000", "-1", "99999999999999999999"] {
        let refused = serve(&format!("--threads={number}"))
            .unwrap_err()
            .to_string();
        assert!(refused.contains("--threads"), "{refused}");
        assert!(refused.contains(number), "{refused}");
    }
    assert_eq!(serve("--threads 1024").unwrap().threads, Some(1024));
}

#[test]
fn directories_are_checked_by_option() {
    let dir = tempfile::tempdir().unwrap();
    let (file, absent) = (dir.path().join("file"), dir.path().join("absent"));
    std::fs::write(&file, "").unwrap();
    check_directories("--image-dir", [&dir.path().to_owned()]).unwrap();
    for (path, why) in [(&file, "not a directory"), (&absent, "No such file")] {
        let refused = check_directories("--image-dir", [path]).unwrap_err();
        let refused = format!("{refused:#}");
        let shown = format!("--image-dir {}: ", path.display());
        assert!(
            refused.starts_with(&shown) && refused.contains(why),
            "{refused}"
        );
    }
}

#[test]
fn command_line_is_valid() {
    Arguments::command().debug_assert();
}

#[test]
fn reads_zones_and_nodes() {
    let line = "--kernel /k --cpus boot=4 --memory size=0,hotplug_method=virtio-mem \
        --memory-zone id=a,size=1G,host_numa_node=1 id=b,size=512M,hotplug_size=1G,hotplugged_size=128M \
        --numa guest_numa_id=0,cpus=[0-1,3],memory_zones=a,distances=[1@25,0@10],pci_segments=[0] \
        --numa guest_numa_id=1,cpus=2,memory_zones=[b],distances=0@30";
    let read = |line| config(line).unwrap().unwrap();
    let alone = read("--kernel /k --memory-zone id=a,size=1G");
    assert_eq!(alone.memory.boot_size(), 1 << 30);
    let config = read(line);
    let zones = config.memory.all_zones();
    let zones: Vec<_> = zones
        .iter()
        .map(|zone| {
            (
                zone.id,
                zone.size >> 20,
                zone.host_node,
                zone.hotplugged() >> 20,
            )
        })
        .collect();
    assert_eq!(zones, [("a", 1024, Some(1), 0), ("b", 512, None, 128)]);
    let nodes = [0, 1, 2, 3].map(|vcpu| config.node_of_vcpu(vcpu));
    assert_eq!(nodes, [Some(0), Some(0), Some(1), Some(0)]);
    let distances = [(0, 1), (1, 0)].map(|(from, to)| config.numa_distance(from, to));
    assert_eq!((distances, config.node_of_segment(0)), ([25, 30], Some(0)));
    let host = spec::HostLimits {
        max_vcpus: 8,
        max_memory: 1 << 40,
        host_cpus: 8,
    };
    assert_eq!(config.validate(&host), Ok(()));
}

#[test]
fn reads_cloud_hypervisor_options() {
    let config = config(
        "--kernel /k --initramfs /i --cmdline console=ttyS0 --cpus boot=2 --memory size=1G,shared=on \
         --serial file=/log --console off --debug-console file=/dbg,iobase=0x402 --disk path=/a path=/b,readonly=on --disk path=/c,rate_limit_group=g \
         --rate-limit-group id=g,bw_size=1M,bw_refill_time=100 \
         --platform num_pci_segments=2,oem_strings=[a,b] --pci-segment pci_segment=1,mmio32_aperture_weight=3",
    );
    let config = config.unwrap().unwrap();
    assert_eq!(config.payload.initramfs.as_deref(), Some("/i"));
    assert_eq!(
        (
            config.cpus.boot_vcpus,
            config.memory.size,
            config.memory.shared
        ),
        (2, 1 << 30, true)
    );
    assert_eq!(
        (config.serial.mode, config.console.mode),
        (ConsoleMode::File, ConsoleMode::Off)
    );
    assert_eq!(config.pci_segment_weights(), [[1, 1], [3, 1]]);
    let debug = config.debug_console.unwrap();
    assert_eq!((debug.mode, debug.port()), (ConsoleMode::File, 0x402));
    let platform = config.platform.unwrap();
    assert_eq!(platform.oem_strings.unwrap(), ["a", "b"]);
    let disks = config.disks.unwrap();
    assert_eq!(disks.len(), 3);
    assert_eq!(disks[2].rate_limit_group.as_deref(), Some("g"));
    let groups = config.rate_limit_groups.unwrap();
    let limit = groups[0].rate_limiter_config.bandwidth.as_ref();
    assert_eq!((&*groups[0].id, limit.unwrap().size), ("g", 1 << 20));
}

#[test]
fn no_payload_boots_nothing() {
    assert_eq!(config("--api-socket /s").unwrap(), None);
    assert!(config("--kernel /k --cpus boots=2").is_err());
}

#[test]
fn vm_options_need_no_subcommand() {
    let check = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap().check();
    assert!(check("whimbrel -v serve").is_ok());
    assert!(check("whimbrel serve -v --log-format json").is_ok());
    assert!(check("whimbrel --kernel /k serve").is_err());
}

#[test]
fn sandbox_goes_with_every_subcommand_and_is_on_by_default() {
    let mode = |line: &str| {
        let parsed = Arguments::try_parse_from(line.split(' '));
        parsed.map(|arguments| arguments.sandbox.seccomp).ok()
    };
    assert_eq!(mode("whimbrel serve"), Some(SeccompMode::True));
    let on = "whimbrel --kernel /k --seccomp true";
    assert_eq!(mode(on), Some(SeccompMode::True));
    assert_eq!(mode("whimbrel serve --seccomp log"), Some(SeccompMode::Log));
    let errno = "whimbrel --seccomp errno run --kernel /k";
    assert_eq!(mode(errno), Some(SeccompMode::Errno));
    let off = "whimbrel --api-socket /s --seccomp false";
    assert_eq!(mode(off), Some(SeccompMode::False));
    assert_eq!(mode("whimbrel serve --seccomp off"), None);
}
