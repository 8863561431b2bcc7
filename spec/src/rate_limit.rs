//! Rate limits of devices, and groups of disks that share one.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::disk::DiskConfig;
use crate::service::FieldProblem;
use crate::validate::problem;
use crate::vm::VmConfig;

/// A budget that refills at a steady rate after an initial burst. A bucket of size 0, or with
/// refill time 0, limits nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds when full.
    pub size: u64,
    /// Tokens beyond `size` that can be spent once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds to fill it from empty.
    pub refill_time: u64,
}

/// Limits of bytes and of operations per second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A limit that several disks share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimitGroupConfig {
    /// Its name.
    pub id: String,
    /// The limit.
    pub rate_limiter_config: RateLimiterConfig,
}

impl DiskConfig {
    /// Returns the problems of a disk to add to a VM, those with what it names of the VM's
    /// configuration among them.
    #[must_use]
    pub fn problems_in(&self, config: &VmConfig) -> Vec<FieldProblem> {
        let mut found = self.problems();
        found.extend(self.group_problem("", config));
        found
    }

    fn group_problem(&self, pointer: &str, config: &VmConfig) -> Option<FieldProblem> {
        let group = self.rate_limit_group.as_ref()?;
        let mut groups = config.rate_limit_groups.iter().flatten();
        let detail = if self.rate_limiter_config.is_some() {
            format!(
                "`rate_limit_group` (`{group}`) and `rate_limiter_config` exclude each other: a \
                 disk has the limit of its group, or its own"
            )
        } else if !groups.any(|there| there.id == *group) {
            format!("`rate_limit_groups` has no group `{group}`")
        } else {
            return None;
        };
        let pointer = format!("{pointer}/rate_limit_group");
        Some(problem(&pointer, "inconsistent", detail))
    }
}

/// Checks the groups of a VM, and that its disks name groups that exist.
pub(crate) fn check(config: &VmConfig, found: &mut Vec<FieldProblem>) {
    let mut names = HashSet::new();
    for (i, group) in config.rate_limit_groups.iter().flatten().enumerate() {
        let pointer = format!("/rate_limit_groups/{i}/id");
        if group.id.is_empty() {
            let detail = "`id` is empty: disks name their group by it".to_owned();
            found.push(problem(&pointer, "out-of-range", detail));
        } else if !names.insert(&group.id) {
            let detail = format!("another group has the id `{}`", group.id);
            found.push(problem(&pointer, "duplicate", detail));
        }
    }
    for (i, disk) in config.disks.iter().flatten().enumerate() {
        found.extend(disk.group_problem(&format!("/disks/{i}"), config));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_name_groups_that_exist() {
        const LIMIT: &str = r#"{"ops":{"size":1,"refill_time":1}}"#;
        let found = |groups: &[&str], disk: &str| {
            let groups = groups
                .iter()
                .map(|id| format!(r#"{{"id":"{id}","rate_limiter_config":{LIMIT}}}"#));
            let groups = groups.collect::<Vec<_>>().join(",");
            let body = format!(
                r#"{{"payload":{{"kernel":"/k"}},"rate_limit_groups":[{groups}],"disks":[{disk}]}}"#
            );
            let config: VmConfig = serde_json::from_str(&body).unwrap();
            let mut problems = Vec::new();
            crate::devices::check(&config, &mut problems);
            // A disk that is added has the same problems.
            let added = config.disks.iter().flatten().next().unwrap();
            let added: Vec<_> = added.problems_in(&config);
            let (own, others): (Vec<_>, Vec<_>) = problems
                .into_iter()
                .partition(|problem| problem.pointer.starts_with("/disks/0"));
            assert_eq!(added.len(), own.len());
            let named = |problem: FieldProblem| (problem.pointer, problem.detail);
            own.into_iter().chain(others).map(named).collect::<Vec<_>>()
        };
        let problem = |at: &str, detail: &str| vec![(at.to_owned(), detail.to_owned())];
        let in_group = r#"{"path":"/a","rate_limit_group":"slow"}"#;
        assert_eq!(found(&["fast", "slow"], in_group), []);
        assert_eq!(
            found(&["fast"], in_group),
            problem(
                "/disks/0/rate_limit_group",
                "`rate_limit_groups` has no group `slow`"
            )
        );
        assert_eq!(
            found(&["slow", "slow"], in_group),
            problem("/rate_limit_groups/1/id", "another group has the id `slow`")
        );
        assert_eq!(
            found(&[""], r#"{"path":"/a"}"#)[0].0,
            "/rate_limit_groups/0/id"
        );
        let both =
            format!(r#"{{"path":"/a","rate_limit_group":"slow","rate_limiter_config":{LIMIT}}}"#);
        let both = &found(&["slow"], &both)[0];
        assert_eq!(both.0, "/disks/0/rate_limit_group");
        assert!(both.1.contains("exclude each other"), "{}", both.1);
    }
}
