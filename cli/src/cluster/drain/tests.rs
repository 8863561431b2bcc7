use super::super::pacemaker::actions;
use super::*;

const RUNNING: &str = include_str!("../recorded/running.xml");
const BLOCKED: &str = include_str!("../recorded/blocked.xml");
const PLAN: &str = include_str!("../recorded/plan.xml");
const MIGRATE: &str = r#"<rsc_action action="migrate" resource="vm1" source="n2" dest="n1"/>"#;

/// The plan for n2 with another action for the VM, and another state of the cluster.
fn planned(status: &str, action: &str) -> Step {
    assert!(PLAN.contains(MIGRATE));
    let status = Status::read(status).unwrap();
    let actions = actions(&PLAN.replace(MIGRATE, action)).unwrap();
    let [one] = &plan(&status, "n2", &actions)[..] else {
        panic!("one VM is on n2")
    };
    one.step.clone()
}

#[test]
fn plan_says_what_pacemaker_would_do_and_why() {
    let to = "n1".to_owned();
    assert_eq!(planned(RUNNING, MIGRATE), Step::Migrate { to: to.clone() });
    let moved = r#"<rsc_action action="move" resource="vm1" source="n2" dest="n1"/>"#;
    let Step::Restart { to: there, why } = planned(RUNNING, moved) else {
        panic!("a move is a stop and a start")
    };
    assert_eq!(there, to);
    assert!(why.contains("allow-migrate"), "{why}");
    let stopped =
        r#"<rsc_action action="stop" resource="vm1" node="n2" reason="node availability"/>"#;
    let standby = RUNNING.replacen("standby=\"false\"", "standby=\"true\"", 1);
    let why = "n1 is in standby".to_owned();
    assert_eq!(planned(&standby, stopped), Step::Stop { why });
    let why = "Pacemaker does not manage it".to_owned();
    let unmanaged = RUNNING.replace("managed=\"true\"", "managed=\"false\"");
    assert_eq!(planned(&unmanaged, ""), Step::Stay { why });
    let why = "migrate_to on n2: error".to_owned();
    assert_eq!(planned(BLOCKED, ""), Step::Stay { why });
}

#[test]
fn only_live_moves_happen_without_force() {
    let step = |action: &str| Planned {
        vm: "vm1".to_owned(),
        step: planned(RUNNING, action),
    };
    let moved = r#"<rsc_action action="move" resource="vm1" source="n2" dest="n1"/>"#;
    assert!(step(MIGRATE).leaves(false));
    assert!(!step(moved).leaves(false) && step(moved).leaves(true));
    assert!(
        !step("").leaves(true),
        "what Pacemaker does not move cannot be forced"
    );
}

/// Returns the outcome for the VM that had to move from n2.
fn ended(after: &str) -> Vec<Ended> {
    let before = Status::read(RUNNING).unwrap();
    let plan = plan(&before, "n2", &actions(PLAN).unwrap());
    outcomes(&before, &Status::read(after).unwrap(), "n2", &plan)
}

#[test]
fn outcome_tells_moves_from_starts() {
    let vm_at_n1 = RUNNING.replacen(
        r#"<node name="n2" id="2" cached="true"/>
    </resource>
    <clone"#,
        r#"<node name="n1" id="1" cached="true"/>
    </resource>
    <clone"#,
        1,
    );
    assert_ne!(vm_at_n1, RUNNING);
    let to = "n1".to_owned();
    let [one] = &ended(&vm_at_n1)[..] else {
        panic!()
    };
    assert_eq!(one.outcome, Outcome::Restarted { to: to.clone() });
    assert!(!one.is_as_planned(&[]));
    // n2 remembers a move that is newer than the one before the drain.
    let [one] = &ended(&vm_at_n1.replace(
        r#"call="26" task="migrate_to""#,
        r#"call="40" task="migrate_to""#,
    ))[..] else {
        panic!()
    };
    assert_eq!(one.outcome, Outcome::Moved { to });
    assert!(one.is_as_planned(&[]));
}

#[test]
fn outcome_says_why_a_vm_stays() {
    let [one] = &ended(BLOCKED)[..] else { panic!() };
    let why = "migrate_to on n2: error".to_owned();
    assert_eq!(one.outcome, Outcome::Stayed { why });
    assert_eq!(one.line("n2"), "vm1: stays on n2: migrate_to on n2: error");
    // A VM that came during the drain is named, too.
    let more = ended(&RUNNING.replace("vm1", "vm2"));
    let names: Vec<_> = more
        .iter()
        .map(|one| (one.vm.as_str(), &one.outcome))
        .collect();
    assert!(
        matches!(
            names[..],
            [("vm1", Outcome::Stopped), ("vm2", Outcome::Stayed { .. })]
        ),
        "{names:?}"
    );
}

/// While Pacemaker forgets a failed move, it shows the guest as stopped.
#[test]
fn vm_that_is_being_probed_is_not_gone() {
    let before = Status::read(RUNNING).unwrap();
    let vms = |step: Step| {
        vec![Planned {
            vm: "vm1".to_owned(),
            step,
        }]
    };
    let migrates = vms(planned(RUNNING, MIGRATE));
    assert!(!is_any_lost(&before, &migrates));
    let mut probed = before.clone();
    probed.vms[0].nodes.clear();
    assert_eq!(probed.vms_on("n2").count(), 0);
    assert!(is_any_lost(&probed, &migrates));
    let stops = vms(Step::Stop { why: String::new() });
    assert!(!is_any_lost(&probed, &stops), "it has ended");
}

#[test]
fn interrupted_drain_says_what_is_left() {
    let text = left_behind(&Status::read(RUNNING).unwrap(), "n2", &["vm1", "vm2"]);
    assert!(
        text.starts_with("1 of 2 VMs have left n2, which is not in standby"),
        "{text}"
    );
    assert!(text.contains("`wh-remote cluster undrain n2`"), "{text}");
}
