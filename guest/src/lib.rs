//! The pocket guest: a tiny test kernel for any KVM.
