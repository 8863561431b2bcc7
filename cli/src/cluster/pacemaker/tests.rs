use super::*;

/// Printed by Pacemaker 2.1.5, without the parts that nothing here reads.
const RUNNING: &str = include_str!("../recorded/running.xml");
const BLOCKED: &str = include_str!("../recorded/blocked.xml");
const PLAN: &str = include_str!("../recorded/plan.xml");

#[test]
fn status_of_a_healthy_cluster() {
    let status = Status::read(RUNNING).unwrap();
    assert_eq!(status.coordinator.as_deref(), Some("n1"));
    let nodes: Vec<_> = status
        .nodes
        .iter()
        .map(|one| (one.name.as_str(), one.state))
        .collect();
    assert_eq!(
        nodes,
        [("n1", NodeState::Online), ("n2", NodeState::Online)]
    );
    assert!(status.nodes.iter().all(|node| node.service));
    // Fence devices and the service are no VMs.
    let [vm] = &status.vms[..] else {
        panic!("{:?}", status.vms)
    };
    assert_eq!((vm.resource.as_str(), vm.role.as_str()), ("vm1", "Started"));
    assert_eq!(vm.nodes, ["n2"]);
    assert!(vm.managed && !vm.blocked && vm.failure.is_none());
    let moves: Vec<_> = vm.moves.iter().map(|one| one.node.as_str()).collect();
    assert_eq!(moves, ["n2", "n1"]);
    assert_eq!(status.vms_on("n2").count(), 1);
    assert_eq!(status.vms_on("n1").count(), 0);
}

#[test]
fn status_after_a_failed_move() {
    let status = Status::read(BLOCKED).unwrap();
    let vm = status.vm("vm1").unwrap();
    assert!(vm.blocked && !vm.managed);
    assert_eq!(vm.failure.as_deref(), Some("migrate_to on n2: error"));
    assert!(
        vm.moves.is_empty(),
        "a move that failed is none: {:?}",
        vm.moves
    );
    assert_eq!(status.node("n2").unwrap().state, NodeState::Standby);
    assert!(!status.node("n2").unwrap().service);
    assert_eq!(status.bans, [ban_id("vm1", "n2")]);
}

#[test]
fn failures_of_other_resources_are_not_taken() {
    let other = BLOCKED.replace(
        "op_key=\"vm1_migrate_to_0\"",
        "op_key=\"vm1_2_migrate_to_0\"",
    );
    assert_eq!(Status::read(&other).unwrap().vms[0].failure, None);
    let reason = BLOCKED.replace("exitreason=\"\"", "exitreason=\"it &lt;is&gt; late\"");
    let status = Status::read(&reason).unwrap();
    assert_eq!(
        status.vms[0].failure.as_deref(),
        Some("migrate_to on n2: it <is> late")
    );
}

#[test]
fn states_of_nodes() {
    for (from, to, state) in [
        ("online=\"true\"", "online=\"false\"", NodeState::Offline),
        ("unclean=\"false\"", "unclean=\"true\"", NodeState::Unclean),
        ("pending=\"false\"", "pending=\"true\"", NodeState::Pending),
        (
            "maintenance=\"false\"",
            "maintenance=\"true\"",
            NodeState::Maintenance,
        ),
        ("standby=\"false\"", "standby=\"true\"", NodeState::Standby),
    ] {
        let status = Status::read(&RUNNING.replacen(from, to, 1)).unwrap();
        assert_eq!(status.node("n1").unwrap().state, state);
        assert_eq!(status.node("n2").unwrap().state, NodeState::Online);
    }
}

#[test]
fn unknown_node_is_refused_by_name() {
    let error = Status::read(RUNNING).unwrap().node("n3").unwrap_err();
    assert_eq!(
        error.to_string(),
        "n3 is no node of this cluster: it has n1, n2"
    );
}

#[test]
fn other_output_is_an_error() {
    assert!(Status::read("").is_err());
    assert!(Status::read("Status of pacemakerd: 'Pacemaker is running'").is_err());
    let error = Status::read(&RUNNING.replace("role=\"Started\"", "")).unwrap_err();
    assert!(error.to_string().contains("without `role`"), "{error}");
}

#[test]
fn actions_of_a_plan() {
    let found = actions(PLAN).unwrap();
    let of = |name: &str| found.iter().find(|one| one.resource == name).unwrap();
    assert_eq!(of("vm1").action, "migrate");
    assert_eq!(of("vm1").destination.as_deref(), Some("n1"));
    assert_eq!(of("whimbrel:0").action, "stop");
    assert_eq!(of("whimbrel:0").destination, None);
}

#[test]
fn notes_and_states_of_other_commands() {
    let noted_xml = r#"<pacemaker-result><attribute name="whimbrel-failed-vm1" value="" host="n2"/>
        <attribute name="whimbrel-failed-vm1" value="&quot;no&quot; space" host="n1"/></pacemaker-result>"#;
    assert_eq!(noted(noted_xml).as_deref(), Some("\"no\" space"));
    assert_eq!(noted(&noted_xml.replace("&quot;no&quot; space", "")), None);
    let idle =
        r#"<pacemaker-result><crmd node_name="n1" state="S_IDLE" result="ok"/></pacemaker-result>"#;
    assert_eq!(controller_state(idle).as_deref(), Some("S_IDLE"));
    let refused = r#"<pacemaker-result><status code="102" message="Not connected"><errors>
        <error>crm_mon: Connection to cluster failed: Connection refused</error></errors></status></pacemaker-result>"#;
    let said = complaint(refused);
    assert_eq!(
        said.as_deref(),
        Some("crm_mon: Connection to cluster failed: Connection refused")
    );
}

#[test]
fn bans_are_one_change() {
    let xml = bans(&["vm1", "vm2"], "n1").unwrap();
    let document = Document::parse(&xml).unwrap();
    let ids: Vec<_> = document
        .descendants()
        .filter_map(|one| one.attribute("id"))
        .collect();
    assert_eq!(ids, ["cli-ban-vm1-on-n1", "cli-ban-vm2-on-n1"]);
    assert!(bans(&["vm1"], "n1\"/><x y=\"").is_err());
}

#[tokio::test]
async fn missing_pacemaker_is_explained() {
    let error = run("whimbrel-has-no-such-command", &[], None)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("works on a node of a Pacemaker cluster"),
        "{error}"
    );
    let error = run("false", &[], None).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is Pacemaker running on this host"),
        "{error}"
    );
}
