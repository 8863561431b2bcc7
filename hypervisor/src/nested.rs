//! State that a vCPU has when its guest runs guests of its own.

use kvm_bindings::kvm_sregs;
use kvm_ioctls::KvmNestedStateBuffer;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use state::Saved;

use crate::kvm::KvmError;
use crate::saved::StateError;
use crate::vcpu::Vcpu;

/// `EFER.SVME`: the guest may use SVM.
const EFER_SVME: u64 = 1 << 12;
/// `CR4.VMXE`: the guest may use VMX.
const CR4_VMXE: u64 = 1 << 13;

/// KVM's state of a vCPU with SVM or VMX switched on, as the bytes of `struct kvm_nested_state`.
/// Frozen as version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NestedState {
    bytes: ByteBuf,
}

impl Saved for NestedState {
    const VERSION: u16 = 1;
}

/// The switch that lets the guest run guests of its own, if it is on.
pub(crate) fn nested_switch(sregs: &kvm_sregs) -> Option<&'static str> {
    if sregs.efer & EFER_SVME != 0 {
        Some("EFER.SVME")
    } else if sregs.cr4 & CR4_VMXE != 0 {
        Some("CR4.VMXE")
    } else {
        None
    }
}

/// Judges KVM's answer for a vCPU with these registers.
///
/// A vCPU with both switches off has no such state, whatever the host can do. With one of them on,
/// a host that does not give the state would leave a guest that breaks after the migration.
fn needed(
    sregs: &kvm_sregs,
    get: impl FnOnce() -> Result<NestedState, kvm_ioctls::Error>,
) -> Result<Option<NestedState>, StateError> {
    let Some(switch) = nested_switch(sregs) else {
        return Ok(None);
    };
    get().map(Some).map_err(|errno| StateError::Nested {
        switch,
        source: std::io::Error::from_raw_os_error(errno.errno()),
    })
}

const LARGEST: usize = size_of::<KvmNestedStateBuffer>();
/// Bytes before the VMCB or VMCS.
const HEADER: usize = std::mem::offset_of!(KvmNestedStateBuffer, data);

/// `KVM_STATE_NESTED_FORMAT_VMX`.
const FORMAT_VMX: u16 = 0;

impl NestedState {
    /// The state of a vCPU that is not in VMX operation.
    pub(crate) fn no_vmx() -> Self {
        let mut buffer = KvmNestedStateBuffer::empty();
        buffer.format = FORMAT_VMX;
        buffer.hdr.vmx.vmxon_pa = u64::MAX;
        buffer.hdr.vmx.vmcs12_pa = u64::MAX;
        buffer.size = u32::try_from(HEADER).unwrap_or(u32::MAX);
        Self::of(&buffer)
    }

    fn of(buffer: &KvmNestedStateBuffer) -> Self {
        // SAFETY: the structure is plain integers in fixed places, all of them initialised
        // (`empty` zeroes it), and the slice covers it exactly.
        let all =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(buffer).cast::<u8>(), LARGEST) };
        let size = (buffer.size as usize).clamp(HEADER, LARGEST);
        Self {
            bytes: ByteBuf::from(&all[..size]),
        }
    }

    /// Returns the structure for KVM. Bytes from a peer determine its content only: the size
    /// that KVM reads is the number of bytes that there are.
    fn buffer(&self) -> Result<KvmNestedStateBuffer, StateError> {
        if !(HEADER..=LARGEST).contains(&self.bytes.len()) {
            return Err(StateError::Length {
                what: "nested state",
                found: self.bytes.len(),
                wanted: LARGEST,
            });
        }
        let mut buffer = KvmNestedStateBuffer::empty();
        // SAFETY: the length was checked, and any bytes are a valid structure of integers.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.bytes.as_ptr(),
                (&raw mut buffer).cast::<u8>(),
                self.bytes.len(),
            );
        }
        buffer.size = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        Ok(buffer)
    }
}

impl Vcpu {
    /// Whether the guest has VMX switched on.
    pub(crate) fn uses_vmx(&self) -> Result<bool, KvmError> {
        Ok(self.sregs()?.cr4 & CR4_VMXE != 0)
    }

    /// Saves the nested state, if the guest has SVM or VMX switched on.
    ///
    /// # Errors
    /// Fails if the guest has SVM or VMX switched on and this host's KVM does not give the state.
    pub fn save_nested(&self) -> Result<Option<NestedState>, StateError> {
        needed(&self.sregs()?, || {
            let mut buffer = KvmNestedStateBuffer::empty();
            self.fd().nested_state(&mut buffer)?;
            Ok(NestedState::of(&buffer))
        })
    }

    /// Loads the nested state, after the system registers, whose switches KVM checks it against.
    pub(crate) fn load_nested(&self, saved: &NestedState) -> Result<(), StateError> {
        let buffer = saved.buffer()?;
        self.fd()
            .set_nested_state(&buffer)
            .map_err(|errno| StateError::NestedRefused {
                source: std::io::Error::from_raw_os_error(errno.errno()),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(efer: u64, cr4: u64) -> kvm_sregs {
        kvm_sregs {
            efer,
            cr4,
            ..Default::default()
        }
    }

    fn refuse() -> Result<NestedState, kvm_ioctls::Error> {
        Err(kvm_ioctls::Error::new(libc::EINVAL))
    }

    #[test]
    fn rejects_nested_switch_without_state() {
        for (sregs, name) in [
            (with(EFER_SVME, 0), "EFER.SVME"),
            (with(0, CR4_VMXE), "CR4.VMXE"),
        ] {
            let why = needed(&sregs, refuse).unwrap_err().to_string();
            assert!(why.contains(name), "{why}");
            let given = needed(&sregs, || {
                Ok(NestedState::of(&KvmNestedStateBuffer::empty()))
            });
            assert!(given.unwrap().is_some());
        }
        // EFER.LMA and CR4.PAE of an ordinary guest.
        assert_eq!(needed(&with(0xd01, 0x20), refuse).unwrap(), None);
    }

    #[test]
    fn nested_state_survives_round_trip() {
        let mut buffer = KvmNestedStateBuffer::empty();
        (buffer.flags, buffer.format, buffer.size) = (0x100, 1, 128 + 4096);
        let saved = NestedState::of(&buffer);
        assert_eq!(saved.bytes.len(), 128 + 4096);
        assert_eq!(NestedState::of(&saved.buffer().unwrap()), saved);

        for len in [0, HEADER - 1, LARGEST + 1] {
            let bytes = ByteBuf::from(vec![0; len]);
            assert!(NestedState { bytes }.buffer().is_err(), "{len} bytes");
        }
        // A size that is more than there is.
        let mut bytes = vec![0; HEADER];
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let bytes = ByteBuf::from(bytes);
        assert_eq!(
            NestedState { bytes }.buffer().unwrap().size as usize,
            HEADER
        );
    }
}
