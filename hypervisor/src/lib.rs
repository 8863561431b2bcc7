//! KVM: virtual machines, vCPUs, memslots, interrupt routes.
