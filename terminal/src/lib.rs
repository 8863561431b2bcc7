//! The terminal of a process that shows a guest's console.
//!
//! In [raw mode](RawMode) every key goes to the guest, Ctrl-C too. [`Escape`] keeps one sequence for
//! the user, so that the console can be left. `whimbrel run` and `wh-remote console` use both.

#![forbid(unsafe_code)]

use std::io;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Raw mode of the terminal on standard input, until it is dropped.
#[derive(Debug)]
pub struct RawMode(Termios);

impl RawMode {
    /// Sets the mode.
    ///
    /// # Errors
    /// Standard input is no terminal, or the host refuses.
    pub fn enter() -> io::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Finds the escape sequence, Ctrl-A x, in what the user types. Ctrl-A a is Ctrl-A for the guest.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last key was Ctrl-A.
    pending: bool,
}

impl Escape {
    const CTRL_A: u8 = 1;

    /// Returns the keys for the guest, and whether the user leaves. There may be one key more than were
    /// typed: a Ctrl-A that was kept back.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut keys = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            match (std::mem::take(&mut self.pending), key) {
                (true, b'x' | b'X') => return (keys, true),
                (true, b'a' | Self::CTRL_A) => keys.push(Self::CTRL_A),
                (true, other) => keys.extend([Self::CTRL_A, other]),
                (false, Self::CTRL_A) => self.pending = true,
                (false, other) => keys.push(other),
            }
        }
        (keys, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_leaves_and_passes_other_keys() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls\r"), (b"ls\r".to_vec(), false));
        // Split over two reads.
        assert_eq!(escape.filter(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(escape.filter(b"x more"), (Vec::new(), true));
        assert_eq!(
            Escape::default().filter(b"\x01a\x01\x01\x01b"),
            (b"\x01\x01\x01b".to_vec(), false)
        );
    }
}
