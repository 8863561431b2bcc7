//! Handles to running VMs: requests, admission policy, published status.
